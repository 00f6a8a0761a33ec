"""Guessing tokens ahead: where guesses come from, when they pay, and that they change nothing but the speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edge.engine.engine import Engine
from edge.engine.grammar_source import Grammar
from edge.engine.sampler import SamplingParams
from edge.engine.speculation import MAX_DRAFT, DraftLength, PromptLookup
from edge.metrics import Metrics
from edge.scheduler import Scheduler
from edge.service import Delta, Finished, Service
from export.checkpoint import open_checkpoint
from export.pipeline import export_bundle
from export.progress import Silent
from export.quantize.recipes import RECIPES
from tests.edge.test_scheduler import Client
from tests.export import tiny
from tests.fakes import FakeEngine, make_model

TEXT = "def push(self, item): self.items.append(item)\n"


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert lookup.guess(2) == [4, 5]
    assert lookup.guess(10) == [4, 5, 6, 1, 2, 3]
    lookup.extend([9])
    assert lookup.guess(2) == []
    lookup.extend([1, 2, 3])
    assert lookup.guess(3) == [9, 1, 2], "the latest occurrence counts"


def test_without_a_precedent_nothing_is_guessed() -> None:
    assert PromptLookup([]).guess(4) == []
    assert PromptLookup([1, 2]).guess(4) == []
    assert PromptLookup([1, 2, 3]).guess(4) == [], "the last tokens are no precedent of themselves"


def feed(draft: DraftLength, right: Callable[[int], int], price: Callable[[int], float], steps: int) -> int:
    for _ in range(steps):
        draft.took(1, price(1))  # now and then there is no precedent
        guesses = draft.best()
        draft.took(guesses + 1, price(guesses + 1))
        draft.guessed(guesses, right(guesses))
    return draft.best()


def test_right_guesses_make_longer_ones_and_wrong_ones_stop_them() -> None:
    draft = DraftLength(MAX_DRAFT)
    cheap = lambda tokens: 0.02 * (1 + 0.1 * (tokens - 1))  # noqa: E731
    assert feed(draft, lambda guesses: guesses, cheap, 60) == MAX_DRAFT
    assert feed(draft, lambda _: 0, cheap, 60) <= 1


def test_nothing_is_guessed_where_a_longer_step_costs_as_much_as_its_tokens() -> None:
    draft = DraftLength(MAX_DRAFT)
    assert feed(draft, lambda guesses: guesses // 2, lambda tokens: 0.02 * tokens, 100) == 0
    assert DraftLength(0).best() == 0


def answer(draft_tokens: int, **options: object) -> tuple[str, int]:
    engine = FakeEngine(reply=lambda prompt: prompt * 4, slots=2, prefill_chunk=64)
    service = Service(make_model(), Scheduler(engine, max_queue=4, draft_tokens=draft_tokens), Metrics())
    service.start()
    client = Client(service, TEXT, **options)
    end = client.end()
    service.stop()
    assert isinstance(end, Finished)
    return client.text, engine.num_steps


@pytest.mark.parametrize("options", [{}, {"max_tokens": 101}, {"stop": ("append",)}, {"max_tokens": 1}])
def test_guesses_change_the_number_of_steps_and_nothing_else(options: dict[str, object]) -> None:
    plain, plain_steps = answer(0, **options)
    guessed, guessed_steps = answer(15, **options)
    assert guessed == plain
    if not options:
        assert guessed_steps < plain_steps / 3


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.9, top_p=0.9, seed=3)])
@pytest.mark.parametrize("config", [tiny.qwen2_config(), tiny.qwen3_config()], ids=["qwen2", "qwen3"])
def test_answers_of_a_real_engine_stay_the_same(
    config: dict[str, object], sampling: SamplingParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(tiny.write_folder(tmp_path / "checkpoint", config)) as checkpoint:
        manifest = export_bundle(checkpoint, tmp_path / "bundle", RECIPES["fp32"], progress=Silent()).manifest
    verified = []
    verify = Engine.verify
    monkeypatch.setattr(Engine, "verify", lambda *args: verified.append(len(args[2])) or verify(*args))
    answers = []
    for draft_tokens in (0, 6):
        engine = Engine(tmp_path / "bundle", manifest, slots=1, context=128, threads=1)
        model = replace(make_model(128), manifest=manifest, eos_ids=frozenset())
        service = Service(model, Scheduler(engine, max_queue=2, draft_tokens=draft_tokens), Metrics())
        service.start()
        client = Client(service, TEXT, max_tokens=60, sampling=sampling)
        client.end()
        service.stop()
        answers.append([event.token_id for event in client.events if isinstance(event, Delta)])
    assert answers[0] == answers[1]
    if sampling.greedy:
        assert verified, "a greedy answer of a random model repeats itself, so something was guessed"


def test_tokens_that_a_grammar_forces_need_no_step_of_their_own() -> None:
    grammar = Grammar("choice", '["the pump is running within its limits"]')
    steps = []
    for draft_tokens in (0, 15):
        engine = FakeEngine(reply=lambda _: "the pump is running within its limits", slots=1)
        service = Service(make_model(), Scheduler(engine, max_queue=2, draft_tokens=draft_tokens), Metrics())
        service.start()
        client = Client(service, "state?", grammar=grammar)
        end = client.end()
        service.stop()
        assert isinstance(end, Finished)
        assert client.text == "the pump is running within its limits"
        steps.append(engine.num_steps)
    assert steps[1] < steps[0] / 3
