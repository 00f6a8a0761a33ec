"""Models with states behind the service: guessing, reuse, recomputing and cancelling change no answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.bundle import Manifest, verify_bundle
from edge.config import load_settings
from edge.engine.engine import Engine
from edge.engine.grammar_source import Grammar
from edge.engine.prefix import MIN_TOKENS
from edge.engine.prefix_cache import EVERYONE, PrefixCache
from edge.engine.sampler import SamplingParams
from edge.engine.speculation import Draft, StepCosts, share_out
from edge.generation import Delta, Failed, Finished, PromptScored, Queued, Started
from edge.loader import load_service
from edge.metrics import Metrics
from edge.scheduler import Scheduler
from edge.sequence import Sequence
from edge.service import Loaded, Service
from edge.snapshots import TAIL_TOKENS, chunk_end, snapshot_lengths
from export.quantize.recipes import RECIPES
from tests.edge.test_scheduler import Client, until
from tests.export import tiny, tiny_qwen3_5
from tests.fakes import EOS_ID, make_model
from tests.tiny_bundles import export_tiny

TEXT = "def push(self, item): self.items.append(item)\n"
CONTEXT = 224
GREEDY, WARM = SamplingParams(), SamplingParams(temperature=0.9, top_p=0.9, seed=3)


@dataclass(frozen=True)
class Case:
    """An exported model."""

    bundle: Path
    manifest: Manifest

    def engine(self, **options: Any) -> Engine:
        settings = {"slots": 3, "context": CONTEXT, "threads": 1, "prefill_chunk": 32} | options
        return Engine(self.bundle, self.manifest, **settings)

    @contextmanager
    def serving(
        self,
        *,
        draft_tokens: int = 0,
        prefix_bytes: int = 0,
        engine: Engine | None = None,
        eos_ids: frozenset[int] = frozenset(),
        **options: Any,
    ) -> Iterator[Service]:
        engine = engine or self.engine(draft_tokens=draft_tokens)
        scheduler = Scheduler(
            engine, max_queue=16, draft_tokens=draft_tokens, prefixes=PrefixCache(prefix_bytes), **options
        )
        model = replace(make_model(CONTEXT), manifest=self.manifest, eos_ids=eos_ids)
        service = Service(Loaded(model, scheduler), Metrics())
        service.start()
        try:
            yield service
        finally:
            service.stop()


def make_case(folder: Path, recipe: str) -> Case:
    config = tiny_qwen3_5.config(hidden_size=256, intermediate_size=384, linear_num_value_heads=4)
    return Case(folder / "bundle", export_tiny(folder, config, RECIPES[recipe]))


@pytest.fixture(scope="module", params=["fp32", "balanced"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("qwen3_5"), request.param)


def ids_of(client: Client) -> list[int]:
    client.end()
    return tokens_of(client)


def tokens_of(client: Client) -> list[int]:
    """What has come so far."""
    return [event.token_id for event in client.events if isinstance(event, Delta)]


def alone(case: Case, request: Mapping[str, Any]) -> list[int]:
    """What a request is answered with nothing else going on."""
    with case.serving() as service:
        return ids_of(Client(service, **request))


def random_text(length: int, seed: int) -> str:
    return bytes(np.random.default_rng(seed).integers(32, 127, length).tolist()).decode()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's steps are all overhead: guess as if they were a large one's."""
    monkeypatch.setattr(StepCosts, "of", lambda _, rows: 1 + 0.05 * rows)


def oracle(answers: Mapping[bytes, list[int]], seed: int) -> Callable[[Sequence, int], Draft]:
    """Guesses what will come, and is wrong now and then: a random model does not repeat itself."""
    rng = np.random.default_rng(seed)

    def draft(sequence: Sequence, most: int) -> Draft:
        coming = answers[sequence.prompt_ids.tobytes()][sequence.num_output_tokens :][:most]
        guesses = [token if rng.random() < 0.85 else (token + 1) % tiny.NUM_IDS for token in coming]
        return Draft(tuple(guesses), tuple(0.99**i for i in range(1, len(guesses) + 1)))

    return draft


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("slots", [1, 3])
def test_guesses_change_no_answer(case: Case, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": TEXT, "sampling": GREEDY, "max_tokens": 80},
        {"prompt": TEXT * 2, "sampling": WARM, "max_tokens": 79},
        {"prompt": "x = 1\n", "sampling": GREEDY, "max_tokens": 33},
    ]
    plain = [alone(case, request) for request in requests]
    prompts = [np.array(list(request["prompt"].encode())).tobytes() for request in requests]
    monkeypatch.setattr(Sequence, "draft", oracle(dict(zip(prompts, plain, strict=True)), seed=5))
    with case.serving(engine=case.engine(slots=slots, draft_tokens=6), draft_tokens=6) as service:
        together = [Client(service, **request) for request in requests]
        assert [ids_of(client) for client in together] == plain
        stats = service.stats()
        assert stats.num_drafted > stats.num_accepted > 20


def test_many_requests_at_once_get_the_answers_they_get_alone(case: Case) -> None:
    rng = np.random.default_rng(8)
    requests: list[dict[str, Any]] = [
        {"prompt": random_text(int(rng.integers(1, 120)), seed), "max_tokens": int(rng.integers(1, 40))}
        for seed in range(10)
    ]
    expected = [alone(case, request) for request in requests]
    with case.serving(draft_tokens=4, prefix_bytes=1 << 24) as service:
        clients = [Client(service, **request) for request in requests]
        assert [ids_of(client) for client in clients] == expected
        assert service.stats().kv_bytes == 0


def test_requests_that_come_and_go_at_random_disturb_nobody(case: Case) -> None:
    """Guesses, prefixes, a budget that is too small, cancelled requests: whoever gets to the end has his own answer."""
    seed = 77
    rng = np.random.default_rng(seed)
    texts = [random_text(150, seed) for seed in range(3)]
    requests: list[dict[str, Any]] = [
        {"prompt": texts[rng.integers(3)][: rng.integers(30, 150)], "max_tokens": int(rng.integers(1, 60))}
        for _ in range(8)
    ]
    expected = [alone(case, request) for request in requests]
    assert case.manifest.state is not None
    budget = 3 * case.manifest.state.bytes_per_slot + 400 * case.manifest.kv.bytes_per_token
    finished = 0
    with case.serving(draft_tokens=4, prefix_bytes=1 << 21, kv_cache_bytes=budget) as service:
        for _ in range(5):
            order = rng.permutation(len(requests)).tolist()
            clients = [Client(service, **requests[i]) for i in order]
            for leaving in (clients[i] for i in rng.choice(len(clients), 3, replace=False)):
                time.sleep(float(rng.uniform(0, 0.02)))
                leaving.ticket.cancel()
            for i, client in zip(order, clients, strict=True):
                tokens = ids_of(client)
                assert tokens == expected[i][: len(tokens)], f"seed {seed}"
                finished += len(tokens) == len(expected[i])
        assert service.stats().kv_bytes == 0
    assert finished >= 5 * (len(requests) - 3)


def cached(client: Client) -> int:
    end = client.end()
    assert isinstance(end, Finished)
    return end.timings.num_cached_tokens


def test_a_conversation_goes_on_from_where_its_last_prompt_ended(case: Case) -> None:
    """Even though its history is written differently from the answer."""
    first = random_text(91, 1)
    second = f"{first[:84]} as it is in the history {random_text(40, 2)}"
    with case.serving(prefix_bytes=1 << 24) as service:
        assert cached(Client(service, first, max_tokens=12)) == 0
        client = Client(service, second, max_tokens=12)
        assert cached(client) == (91 - TAIL_TOKENS) // 2 * 2
        answer = tokens_of(client)
        again = Client(service, second, max_tokens=12)
        assert cached(again) == (len(second) - TAIL_TOKENS) // 2 * 2
    assert answer == alone(case, {"prompt": second, "max_tokens": 12})
    assert answer == tokens_of(again)


def test_what_follows_an_answer_goes_on_from_its_end(case: Case) -> None:
    with case.serving(prefix_bytes=1 << 24) as service:
        first = Client(service, random_text(60, 3), max_tokens=40)
        ids = [*random_text(60, 3).encode(), *ids_of(first), *b"and then?"]
        second = Client(service, ids, max_tokens=12)
        assert cached(second) == 60 + 40 - 1
    expected = alone(case, {"prompt": ids, "max_tokens": 12})
    if case.manifest.recipe["name"] == "fp32":
        assert tokens_of(second) == expected


def test_several_answers_to_one_prompt_read_it_once(case: Case) -> None:
    text = random_text(110, 12)
    expected = alone(case, {"prompt": text, "max_tokens": 30})
    with case.serving(prefix_bytes=1 << 24) as service:
        clients = [Client(service, text, max_tokens=30) for _ in range(3)]
        assert [cached(client) for client in clients] == [0, 94, 94]
    assert [tokens_of(client) for client in clients] == [expected] * 3


def test_the_end_of_an_answer_does_not_displace_its_prompt(case: Case) -> None:
    assert case.manifest.state is not None
    text = random_text(100, 3)
    one = case.manifest.state.bytes_per_slot + 160 * case.manifest.kv.bytes_per_token
    for budget, expected in ((one, 84), (2 * one, 100 + 50 - 1)):
        with case.serving(prefix_bytes=budget) as service:
            answer = ids_of(Client(service, text, max_tokens=50))
            assert cached(Client(service, [*text.encode(), *answer, 1, 2, 3], max_tokens=1)) == expected


def test_a_shared_beginning_is_read_twice_and_then_known(case: Case) -> None:
    system = random_text(101, 4)
    prompts = [system + random_text(60, seed) for seed in (5, 6, 7)]
    with case.serving(prefix_bytes=1 << 24) as service:
        clients = [Client(service, prompt, max_tokens=8) for prompt in prompts[:2]]
        assert [cached(client) for client in clients] == [0, 0]
        third = Client(service, prompts[2], max_tokens=8)
        assert cached(third) == 100
        assert cached(Client(service, prompts[2], max_tokens=8, identity="bob")) == 0
    tokens = [tokens_of(client) for client in [*clients, third]]
    assert tokens == [alone(case, {"prompt": prompt, "max_tokens": 8}) for prompt in prompts]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("prefix_bytes", [0, 1 << 24])
def test_a_sequence_that_gave_its_slot_back_goes_on_where_it_was(case: Case, prefix_bytes: int) -> None:
    prompts = [random_text(40, seed) for seed in (1, 2)]
    size = case.manifest.kv.bytes_per_token
    assert case.manifest.state is not None
    budget = 2 * case.manifest.state.bytes_per_slot + 224 * size
    with case.serving(draft_tokens=4, prefix_bytes=prefix_bytes, kv_cache_bytes=budget) as service:
        clients = [Client(service, prompt, max_tokens=120) for prompt in prompts]
        answers = [ids_of(client) for client in clients]
        assert service.stats().num_preempted > 0
        assert service.stats().kv_bytes == 0
    assert answers == [alone(case, {"prompt": prompt, "max_tokens": 120}) for prompt in prompts]


def test_the_budget_counts_states(case: Case) -> None:
    """Room for one state, and for the tokens of many sequences."""
    assert case.manifest.state is not None
    budget = case.manifest.state.bytes_per_slot * 3 // 2 + CONTEXT * case.manifest.kv.bytes_per_token
    engine = case.engine()
    with case.serving(engine=engine, kv_cache_bytes=budget) as service:
        first = Client(service, "a" * 20, max_tokens=150)
        first.wait_for(Delta)
        second = Client(service, "b" * 20, max_tokens=5)
        assert service.stats().num_running == 1
        assert service.stats().kv_bytes > engine.bytes_per_slot == case.manifest.state.bytes_per_slot
        first.end()
        second.end()
        begun = [type(event) for event in second.events]
    assert begun.index(Started) > begun.index(Queued)


def slow_down(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = engine.prefill

    def slowly(slot: int, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        time.sleep(0.01)
        return prefill(slot, ids, past)

    monkeypatch.setattr(engine, "prefill", slowly)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_cancelling_frees_the_slot(case: Case, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(case, {"prompt": "c" * 30, "max_tokens": 10})
    engine = case.engine(slots=1, prefill_chunk=8, draft_tokens=4)
    slow_down(engine, monkeypatch)
    with case.serving(engine=engine) as service:
        for _ in range(3):
            client = Client(service, "a" * 200, max_tokens=20)
            client.wait_for(Started if phase == "prefill" else Delta)
            client.ticket.cancel()
            assert isinstance(client.end(), Failed) or phase == "decode"
            until(lambda: service.stats().num_running == 0)
            assert engine.kept_length(0, CONTEXT) == 0
        assert ids_of(Client(service, "c" * 30, max_tokens=10)) == expected


def test_a_cancelled_prompt_is_not_read_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = case.engine(slots=1, prefill_chunk=8)
    slow_down(engine, monkeypatch)
    text = random_text(200, 6)
    with case.serving(engine=engine, prefix_bytes=1 << 24) as service:
        client = Client(service, text)
        until(lambda: service.stats().kv_bytes > engine.bytes_per_slot + 80 * engine.bytes_per_token)
        client.ticket.cancel()
        assert isinstance(client.end(), Failed)
        again = Client(service, text, max_tokens=8)
        assert cached(again) >= 80
    assert tokens_of(again) == alone(case, {"prompt": text, "max_tokens": 8})


def test_a_conversation_outlasts_sleep(case: Case) -> None:
    text = random_text(100, 9)
    with case.serving(prefix_bytes=1 << 24, sleep_after_s=0.02) as service:
        expected = ids_of(Client(service, text, max_tokens=8))
        until(lambda: service.stats().asleep)
        again = Client(service, text, max_tokens=8)
        assert cached(again) == 84
        assert tokens_of(again) == expected


def test_prompts_are_scored_alike_in_any_company(case: Case) -> None:
    text = random_text(75, 3)
    request: dict[str, Any] = {"prompt": text, "max_tokens": 4, "num_logprobs": 2, "score_prompt": True}
    scores = []
    with case.serving(prefix_bytes=1 << 24) as service:
        for busy in (False, True):
            other = Client(service, TEXT, max_tokens=150) if busy else None
            if other:
                other.wait_for(Delta)
            client = Client(service, **request)
            assert cached(client) == 0
            (scored,) = (event for event in client.events if isinstance(event, PromptScored))
            scores.append([each.logprob for each in scored.logprobs])
    assert len(scores[0]) == 74
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("eager")
def test_a_grammars_tokens_are_guessed_and_kept(case: Case) -> None:
    choice = "the pump is running within its limits"
    for draft_tokens in (0, 6):
        with case.serving(draft_tokens=draft_tokens, eos_ids=frozenset({EOS_ID})) as service:
            client = Client(service, "state?", grammar=Grammar("choice", f'["{choice}", "off"]'), max_tokens=60)
            client.end()
            assert client.text in {choice, "off"}
            assert (service.stats().num_accepted > 0) == (draft_tokens > 0)


@contextmanager
def configured(case: Case, store: Path) -> Iterator[Service]:
    env = {
        "QWEDGE_ENGINE_THREADS": "1",
        "QWEDGE_ENGINE_CONTEXT": "256",
        "QWEDGE_ENGINE_PREFIX_STORE": str(store),
    }
    service = load_service(case.bundle, verify_bundle(case.bundle), load_settings(env=env))
    service.start()
    try:
        yield service
    finally:
        service.stop()


def test_a_restarted_service_knows_the_shared_beginning(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.engine.prefix_store.MIN_STORED_TOKENS", 64)
    system = random_text(121, 5)
    prompts = [system + random_text(60, seed) for seed in range(3)]
    expected = [alone(case, {"prompt": prompt, "max_tokens": 8}) for prompt in prompts]
    with configured(case, tmp_path / "store") as service:
        answers = [ids_of(Client(service, prompt, max_tokens=8, ignore_eos=True)) for prompt in prompts[:2]]
        until(lambda: bool(list((tmp_path / "store").glob("*.prefix"))))
    for _ in range(2):
        with configured(case, tmp_path / "store") as service:
            client = Client(service, prompts[2], max_tokens=8, ignore_eos=True)
            assert cached(client) == 120
            assert tokens_of(client) == expected[2]
    assert answers == expected[:2]


def test_what_is_for_everyone_serves_all_who_begin_alike(case: Case) -> None:
    system = random_text(80, 5)
    with case.serving(prefix_bytes=1 << 24) as service:
        Client(service, f"{system}?<end of turn>", max_tokens=1, identity=EVERYONE).end()
        assert cached(Client(service, system + random_text(40, 6), max_tokens=2, identity="alice")) == 78


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 399), st.integers(0, 399))
def test_snapshots_are_where_they_can_be_of_use(num_tokens: int, known: int, shared: int) -> None:
    lengths = snapshot_lengths(num_tokens, min(known, num_tokens - 1), shared)
    assert list(lengths) == sorted(set(lengths))
    for length in lengths:
        assert min(known, num_tokens - 1) + MIN_TOKENS <= length <= num_tokens - TAIL_TOKENS
        assert length % 2 == 0


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(1, 64), st.integers(0, 150), st.integers(0, 150))
def test_a_prompt_is_read_in_even_steps_to_its_stops(num_tokens: int, most: int, first: int, known: int) -> None:
    stops = tuple(2 * each for each in (first, first + 20) if 2 * each <= num_tokens - TAIL_TOKENS)
    past, ends = min(2 * known, (num_tokens - 2) // 2 * 2), []
    while past < num_tokens:
        end = chunk_end(past, most, num_tokens, stops)
        assert past < end <= past + max(most, 2)
        assert (end - past) % 2 == 0 or end == num_tokens
        if most >= 4:
            assert end - past > 1
        ends.append(end)
        past = end
    assert {stop for stop in stops if stop >= ends[0]} <= set(ends)


def test_guesses_that_may_have_to_be_repeated_are_made_more_carefully() -> None:
    costs = StepCosts()
    for rows in range(1, 10):
        costs.took(rows, 1 + 0.3 * (rows - 1))
    chances = [[0.35, 0.12], [0.6**i for i in range(1, 7)], [0.97**i for i in range(1, 7)]]
    free = [share_out([each], 1, costs, 8)[0] for each in chances]
    again = [share_out([each], 1, costs, 8, all_or_again=True)[0] for each in chances]
    assert all(few <= many for few, many in zip(again, free, strict=True))
    assert (free[0], again[0]) == (1, 0)
    assert (free[2], again[2]) == (6, 5), "an even number of rows"
