"""Guessing tokens ahead: where guesses come from, when they pay, and that they change nothing but the speed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from edge.bundle import Manifest
from edge.engine.engine import Engine
from edge.engine.grammar_source import Grammar
from edge.engine.sampler import SamplingParams
from edge.engine.speculation import Draft, PromptLookup, StepCosts, share_out
from edge.metrics import Metrics
from edge.scheduler import Scheduler, SchedulerStats
from edge.service import Delta, Finished, Loaded, Service
from export.quantize.recipes import RECIPES
from tests.edge.test_scheduler import Client
from tests.export import tiny
from tests.fakes import FakeEngine, make_model, make_service
from tests.tiny_bundles import export_tiny

TEXT = "def push(self, item): self.items.append(item)\n"


def ids_of(lookup: PromptLookup, most: int, forced: tuple[int, ...] = ()) -> tuple[int, ...]:
    return lookup.draft(most, forced).ids


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert ids_of(lookup, 2) == (4, 5)
    assert ids_of(lookup, 10) == (4, 5, 6, 1, 2, 3)
    lookup.extend([9])
    assert lookup.draft(2) == Draft()
    lookup.extend([1, 2, 3])
    assert ids_of(lookup, 3) == (9, 1, 2), "the latest occurrence counts"


def test_the_longest_precedent_counts() -> None:
    long, short = PromptLookup([1, 2, 3, 4, 50, 7, 3, 4, 60, 1, 2, 3, 4]), PromptLookup([3, 4, 60, 8, 9, 3, 4])
    assert (ids_of(long, 1), ids_of(short, 1)) == ((50,), (60,))
    assert long.draft(1).chances > short.draft(1).chances


def test_a_copy_goes_on_where_it_was_although_something_came_between() -> None:
    # After "1 2 3 4" both 5 and 7 followed; the copy that began further back is the one that counts.
    lookup = PromptLookup([9, 8, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 7, 0, 9, 8])
    lookup.extend([1, 2, 3, 4])
    assert ids_of(lookup, 2) == (5, 6)


def test_without_a_precedent_nothing_is_guessed() -> None:
    assert PromptLookup([]).draft(4) == Draft()
    assert PromptLookup([1, 2]).draft(4) == Draft()
    assert PromptLookup([1, 2, 3]).draft(4) == Draft(), "the last tokens are no precedent of themselves"


def test_what_is_forced_comes_first_and_what_followed_it_before_comes_next() -> None:
    lookup = PromptLookup([5, 6, 7, 8, 9, 1, 2])
    assert ids_of(lookup, 4, (5, 6)) == (5, 6, 7, 8)
    assert ids_of(lookup, 2, (5, 6)) == (5, 6)
    assert ids_of(lookup, 1, (5, 6)) == (5,)
    assert ids_of(lookup, 4, (77,)) == (77,)
    chances = lookup.draft(4, (5, 6)).chances
    assert chances == tuple(sorted(chances, reverse=True))
    assert chances[1] > 0.9 > chances[2]


def test_trust_follows_what_came_whether_it_was_verified_or_not() -> None:
    text = list(range(100, 160))
    copying = PromptLookup(text)
    copying.extend(text[:50])
    assert min(copying.draft(8).chances) > 0.9
    straying = PromptLookup([token for pair in itertools.pairwise(text) for token in (*pair, 0)])
    for first, second in itertools.pairwise(text):
        straying.extend([first, second, 1])
    assert max(straying.draft(8).chances, default=0) < 0.1
    straying.extend(text[:20])
    straying.extend(text[:20] * 3)
    assert min(straying.draft(4).chances) > 0.5, "and it comes back"


def costs(per_row: float) -> StepCosts:
    measured = StepCosts()
    for rows in range(1, 17):
        measured.took(rows, 0.02 * (1 + per_row * (rows - 1)))
    return measured


def test_likely_guesses_make_long_drafts_and_unlikely_ones_none() -> None:
    cheap = costs(0.1)
    assert share_out([[0.98**i for i in range(1, 9)]], 1, cheap, 15) == [8]
    assert share_out([[0.05**i for i in range(1, 9)]], 1, cheap, 15) == [0]
    assert share_out([[0.6**i for i in range(1, 9)]], 1, cheap, 15)[0] in {2, 3, 4}


def test_nothing_is_guessed_where_a_longer_step_costs_as_much_as_its_tokens() -> None:
    assert share_out([[0.8, 0.7, 0.6]], 1, costs(1.0), 15) == [0]
    assert share_out([[0.9, 0.9]], 1, costs(0.1), 0) == [0]
    assert share_out([], 1, costs(0.1), 5) == []


def test_rows_go_to_the_likeliest_guesses() -> None:
    assert share_out([[0.5, 0.4], [0.95, 0.9, 0.85], []], 3, costs(0.05), 3) == [0, 3, 0]


def test_a_size_that_was_slow_once_is_tried_again() -> None:
    measured = costs(0.1)
    measured.took(4, 1000.0)
    assert measured.of(4) < 2 * measured.of(1), "something else held it up"
    for _ in range(100):
        measured.took(4, 10 * measured.of(1))
    assert measured.of(4) > 4 * measured.of(1)
    for _ in range(4000):
        measured.took(1, 0.02)
    assert measured.of(4) < 2 * measured.of(1)


def answer(draft_tokens: int, **options: object) -> tuple[str, int]:
    engine = FakeEngine(reply=lambda prompt: prompt * 4, slots=2, prefill_chunk=64, draft_tokens=draft_tokens)
    service = make_service(engine, draft_tokens=draft_tokens)
    service.start()
    client = Client(service, TEXT, **options)
    end = client.end()
    service.stop()
    assert isinstance(end, Finished)
    return client.text, engine.num_steps


@pytest.mark.parametrize("options", [{}, {"max_tokens": 101}, {"stop": ("append",)}, {"max_tokens": 1}])
def test_guesses_change_the_number_of_steps_and_nothing_else(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fake engine computes nothing: what its steps take is what else the machine does.
    monkeypatch.setattr(StepCosts, "of", lambda _, rows: 1 + 0.05 * rows)
    plain, plain_steps = answer(0, **options)
    guessed, guessed_steps = answer(15, **options)
    assert guessed == plain
    if not options:
        assert guessed_steps < plain_steps / 3


def generate(
    bundle: Path, manifest: Manifest, requests: list[dict[str, object]], draft_tokens: int
) -> tuple[list[list[int]], SchedulerStats]:
    """Token ids of the answers to requests that run at the same time."""
    engine = Engine(bundle, manifest, slots=3, context=160, draft_tokens=draft_tokens, threads=1)
    model = replace(make_model(160), manifest=manifest, eos_ids=frozenset())
    service = Service(Loaded(model, Scheduler(engine, max_queue=4, draft_tokens=draft_tokens)), Metrics())
    service.start()
    clients = [Client(service, max_tokens=60, **request) for request in requests]  # type: ignore[arg-type]
    for client in clients:
        client.end()
    stats = service.stats()
    for _ in range(2):
        text = service.metrics.render(stats).decode()
        assert f'qwedge_guessed_tokens_total{{outcome="right"}} {float(stats.num_accepted)}' in text
    service.stop()
    return [[event.token_id for event in client.events if isinstance(event, Delta)] for client in clients], stats


@pytest.mark.parametrize("recipe", ["fp32", "balanced"])
@pytest.mark.parametrize("config", [tiny.qwen2_config(), tiny.qwen3_config()], ids=["qwen2", "qwen3"])
def test_answers_of_a_real_engine_stay_the_same(
    config: dict[str, object], recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny model's steps are all overhead: guess as if they were a large one's.
    monkeypatch.setattr(StepCosts, "of", lambda _, rows: 1 + 0.05 * rows)
    manifest = export_tiny(tmp_path, config, RECIPES[recipe])
    greedy, warm = SamplingParams(), SamplingParams(temperature=0.9, top_p=0.9, seed=3)
    requests: list[dict[str, object]] = [
        {"prompt": TEXT, "sampling": greedy},
        {"prompt": TEXT * 2, "sampling": warm},
        {"prompt": "x = 1\n", "sampling": greedy},
    ]
    together, stats = generate(tmp_path / "bundle", manifest, requests, 6)
    assert stats.num_drafted > stats.num_accepted > 0, "a greedy answer of a random model repeats itself"
    for request, ids in zip(requests, together, strict=True):
        assert generate(tmp_path / "bundle", manifest, [request], 0)[0] == [ids]
        assert generate(tmp_path / "bundle", manifest, [request], 6)[0] == [ids]


def test_tokens_that_a_grammar_forces_need_no_step_of_their_own() -> None:
    grammar = Grammar("choice", '["the pump is running within its limits"]')
    steps = []
    for draft_tokens in (0, 15):
        engine = FakeEngine(reply=lambda _: "the pump is running within its limits", slots=1, draft_tokens=draft_tokens)
        service = make_service(engine, draft_tokens=draft_tokens)
        service.start()
        client = Client(service, "state?", grammar=grammar)
        end = client.end()
        service.stop()
        assert isinstance(end, Finished)
        assert client.text == "the pump is running within its limits"
        steps.append(engine.num_steps)
    assert steps[1] < steps[0] / 3
