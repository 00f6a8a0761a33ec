"""Admission, batching, deadlines and cancellation, over the fake engine; and once over the real one."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.assembly import assemble
from edge.engine.sampler import SamplingParams
from edge.errors import (
    BundleError,
    CancelledError,
    ContextOverflowError,
    DeadlineError,
    EngineError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from edge.scheduler import Scheduler
from edge.sequence import Sequence, SequenceStatus
from edge.service import Delta, Event, Failed, Finished, GenerationRequest, Queued, Service, Started, Ticket
from tests.fakes import FakeEngine, make_service

TIMEOUT_S = 60


class Client:
    """One request and the events it got."""

    def __init__(self, service: Service, prompt: str | list[int] = "hello", **options: object) -> None:
        self.events: list[Event] = []
        self._queue: queue.Queue[Event] = queue.Queue()
        options.setdefault("sampling", SamplingParams())
        ids = tuple(prompt.encode() if isinstance(prompt, str) else prompt)
        request = GenerationRequest(ids, **options)  # type: ignore[arg-type]
        self.ticket: Ticket = service.submit(request, self._queue.put)

    def wait_for(self, kind: type[Event] | tuple[type[Event], ...]) -> Event:
        while True:
            event = self._queue.get(timeout=TIMEOUT_S)
            self.events.append(event)
            if isinstance(event, kind):
                return event

    def end(self) -> Finished | Failed:
        event = self.wait_for((Finished, Failed))
        assert isinstance(event, Finished | Failed)
        assert self._queue.empty(), "nothing follows the terminal event"
        return event

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta | Finished))


@contextmanager
def running(engine: FakeEngine, max_queue: int = 8, **options: object) -> Iterator[Service]:
    service = make_service(engine, max_queue=max_queue, **options)
    service.start()
    try:
        yield service
    finally:
        engine.gate.set()
        service.stop()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "condition not reached"
        time.sleep(0.002)


def test_a_request_is_queued_started_streamed_and_finished_once() -> None:
    with running(FakeEngine(reply=lambda _: "Guten Tag")) as service:
        client = Client(service)
        end = client.end()
    kinds = [type(event) for event in client.events]
    assert kinds[:2] == [Queued, Started]
    assert set(kinds[2:-1]) == {Delta}
    assert isinstance(end, Finished)
    assert (end.reason, client.text) == ("stop", "Guten Tag")
    assert end.timings.num_prompt_tokens == 5
    assert end.timings.num_output_tokens == len("Guten Tag") + 1, "the closing eos is generated too"


def test_many_requests_share_the_engine_and_keep_their_answers() -> None:
    engine = FakeEngine(reply=lambda prompt: prompt * 3, slots=3)
    with running(engine, max_queue=50) as service:
        clients = [Client(service, f"<{i}>" * (1 + i % 5)) for i in range(40)]
        for i, client in enumerate(clients):
            assert isinstance(client.end(), Finished)
            assert client.text == f"<{i}>" * (1 + i % 5) * 3


def test_running_streams_go_on_while_a_long_prompt_is_prefilled() -> None:
    engine = FakeEngine(reply=lambda _: "x" * 200, slots=2, prefill_chunk=8)
    with running(engine) as service:
        first = Client(service)
        first.wait_for(Delta)
        engine.gate.clear()
        second = Client(service, "y" * 400)  # 50 chunks
        engine.gate.set()
        second.wait_for(Delta)
        first.end()
    # Between two chunks of the second's prefill the first gets a token.
    assert sum(isinstance(event, Delta) for event in first.events) == 200
    assert engine.num_steps <= 50 + 400 + 2


@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_cancel_ends_a_request_in_every_phase(phase: str) -> None:
    engine = FakeEngine(reply=lambda _: "x" * 2000, slots=1, prefill_chunk=4)
    with running(engine) as service:
        engine.gate.clear()
        if phase == "queue":
            other = Client(service)
            other.wait_for(Started)
        client = Client(service, "z" * 64)
        if phase == "prefill":
            client.wait_for(Started)
        if phase == "decode":
            engine.gate.set()
            client.wait_for(Delta)
        client.ticket.cancel()
        engine.gate.set()
        end = client.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, CancelledError)
        steps = engine.num_steps
        if phase != "queue":
            until(lambda: service.stats().num_running == 0)
            assert engine.num_steps <= steps + 1
            assert isinstance(Client(service, max_tokens=3).end(), Finished), "the slot is free again"


def test_cancelling_after_the_end_does_nothing() -> None:
    with running(FakeEngine()) as service:
        client = Client(service)
        client.end()
        client.ticket.cancel()
        assert isinstance(Client(service).end(), Finished)


def test_a_leaving_sequence_does_not_disturb_its_batch_mates() -> None:
    engine = FakeEngine(reply=lambda prompt: prompt * 20, slots=4, prefill_chunk=4, step_s=0.002)
    with running(engine) as service:
        clients = [Client(service, name * 6) for name in "abcd"]
        for client in clients:
            client.wait_for(Delta)
        late = Client(service, "e" * 30)
        for leaving in (0, 2):
            clients[leaving].ticket.cancel()
            assert isinstance(clients[leaving].end(), Failed)
        for client, name in ((clients[1], "b"), (clients[3], "d")):
            client.end()
            assert client.text == name * 120
        late.end()
        assert late.text == "e" * 600


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    engine = FakeEngine(reply=lambda _: "x" * 1000, slots=1, step_s=0.01)
    with running(engine) as service:
        running_one = Client(service, deadline_s=0.2)
        waiting = Client(service, deadline_s=0.1)
        for client in (waiting, running_one):
            end = client.end()
            assert isinstance(end, Failed)
            assert isinstance(end.error, DeadlineError)
        assert running_one.text, "it had begun"
        assert not waiting.text


def test_a_full_queue_refuses_with_a_retry_hint() -> None:
    engine = FakeEngine(slots=1)
    with running(engine, max_queue=2) as service:
        engine.gate.clear()
        first = Client(service)
        first.wait_for(Started)
        waiting = [Client(service) for _ in range(2)]
        with pytest.raises(OverloadedError) as refused:
            Client(service)
        assert refused.value.retry_after_s is not None
        assert refused.value.retry_after_s >= 1
        engine.gate.set()
        assert all(isinstance(client.end(), Finished) for client in [first, *waiting])


def test_positions_count_down_as_the_queue_moves() -> None:
    engine = FakeEngine(slots=1)
    with running(engine) as service:
        engine.gate.clear()
        Client(service).wait_for(Started)
        clients = [Client(service) for _ in range(3)]
        engine.gate.set()
        for client in clients:
            client.end()
    positions = [[event.position for event in client.events if isinstance(event, Queued)] for client in clients]
    assert positions[2][0] == 2
    assert all(seen == sorted(seen, reverse=True) for seen in positions)
    assert positions[2][-1] == 0


def test_an_engine_failure_ends_the_request_and_spares_the_service() -> None:
    def reply(prompt: str) -> str:
        if "bad" in prompt:
            raise RuntimeError("broken kernel")
        return "fine"

    with running(FakeEngine(reply=reply)) as service:
        end = Client(service, "bad").end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, EngineError)
        assert "broken" not in end.error.message, "internals stay in the log"
        assert isinstance(Client(service).end(), Finished)


def test_a_front_end_that_raises_does_not_stop_the_engine() -> None:
    def explode(event: Event) -> None:
        raise RuntimeError(event)

    with running(FakeEngine()) as service:
        service.submit(GenerationRequest((65,), SamplingParams()), explode)
        assert isinstance(Client(service).end(), Finished)


def test_stop_lets_running_requests_finish_within_the_drain_time() -> None:
    service = make_service(FakeEngine(reply=lambda _: "x" * 20, step_s=0.005))
    service.start()
    client = Client(service)
    client.wait_for(Started)
    service.stop(drain_s=TIMEOUT_S)
    assert isinstance(client.end(), Finished)
    with pytest.raises(UnavailableError):
        Client(service)


def test_stop_fails_what_does_not_finish_in_time() -> None:
    service = make_service(FakeEngine(reply=lambda _: "x" * 3000, slots=1, step_s=0.005))
    service.start()
    clients = [Client(service), Client(service)]
    clients[0].wait_for(Delta)
    service.stop(drain_s=0.05)
    for client in clients:
        end = client.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, UnavailableError)


@pytest.mark.parametrize(
    ("options", "reason", "text"),
    [
        ({"max_tokens": 4}, "length", "abcd"),
        ({"stop": ("ef", "zz")}, "stop", "abcd"),
        ({}, "stop", "abcdefgh"),
        ({"max_tokens": 10**9}, "stop", "abcdefgh"),
    ],
)
def test_generation_ends_at_limits_and_stop_strings(options: dict[str, object], reason: str, text: str) -> None:
    with running(FakeEngine(reply=lambda _: "abcdefgh")) as service:
        client = Client(service, **options)
        end = client.end()
    assert isinstance(end, Finished)
    assert (end.reason, client.text) == (reason, text)


def test_generation_stops_at_the_context_with_length() -> None:
    with running(FakeEngine(reply=lambda _: "x" * 100, context_length=32)) as service:
        client = Client(service, "p" * 20)
        end = client.end()
    assert isinstance(end, Finished)
    assert (end.reason, client.text) == ("length", "x" * 12)


def test_prompts_that_cannot_run_are_refused_at_once() -> None:
    with running(FakeEngine(context_length=32)) as service:
        with pytest.raises(ContextOverflowError) as overflow:
            Client(service, "p" * 32)
        assert (overflow.value.n_prompt, overflow.value.n_ctx) == (32, 32)
        with pytest.raises(RequestError, match="empty"):
            Client(service, "")
        with pytest.raises(RequestError, match="vocabulary"):
            service.submit(GenerationRequest((-1,), SamplingParams()), lambda _: None)
        assert isinstance(Client(service, "p" * 31).end(), Finished)


def test_health_follows_progress() -> None:
    engine = FakeEngine()
    with running(engine) as service:
        assert service.stats().seconds_since_progress == 0
        engine.gate.clear()
        client = Client(service)
        client.wait_for(Started)
        time.sleep(0.05)
        assert service.stats().seconds_since_progress >= 0.05
        engine.gate.set()
        client.end()
        until(lambda: service.stats().seconds_since_progress == 0)


def test_counters_equal_the_sum_of_the_requests() -> None:
    with running(FakeEngine(reply=lambda _: "abc")) as service:
        ends = [Client(service, "hello").end() for _ in range(3)]
        text = service.metrics.render(service.stats()).decode()
    prompt_tokens = sum(end.timings.num_prompt_tokens for end in ends)
    output_tokens = sum(end.timings.num_output_tokens for end in ends)
    assert f"qwedge_prompt_tokens_total {float(prompt_tokens)}" in text
    assert f"qwedge_output_tokens_total {float(output_tokens)}" in text
    assert 'qwedge_requests_total{outcome="stop"} 3.0' in text


def test_a_prompt_that_is_running_already_is_not_read_again() -> None:
    engine = FakeEngine(reply=lambda _: "x" * 300, slots=3, prefill_chunk=16, step_s=0.001)
    with running(engine) as service:
        first = Client(service, "s" * 100)
        first.wait_for(Delta)
        again, other = Client(service, "s" * 100), Client(service, "s" * 100, identity="bob")
        assert again.end().timings.num_cached_tokens == 99
        assert other.end().timings.num_cached_tokens == 0
        assert again.text == first.text + "x" * (300 - len(first.text)), "whatever had come by then"
        first.end()


def test_without_room_the_youngest_waits_and_goes_on_where_it_was() -> None:
    # Room for 200 tokens: both prompts fit, both answers do not.
    engine = FakeEngine(reply=lambda prompt: prompt[0] * 100, slots=2, prefill_chunk=16)
    with running(engine, kv_cache_bytes=200 * 4) as service:
        engine.gate.clear()
        clients = [Client(service, letter * 20, max_tokens=100) for letter in "ab"]
        engine.gate.set()
        for client, letter in zip(clients, "ab", strict=True):
            assert isinstance(client.end(), Finished)
            assert client.text == letter * 100
            assert sum(isinstance(event, Started) for event in client.events) == 1
        assert service.stats().num_preempted > 0
        assert service.stats().kv_bytes == 0


def test_a_sequence_that_waits_for_room_can_be_cancelled() -> None:
    engine = FakeEngine(reply=lambda _: "x" * 1000, slots=2, step_s=0.002)
    with running(engine, kv_cache_bytes=400 * 4) as service:
        first = Client(service, "a" * 100)
        first.wait_for(Delta)
        second = Client(service, "b" * 300)
        time.sleep(0.05)
        assert service.stats().num_running == 1, "a slot is free, but not the memory"
        second.ticket.cancel()
        assert isinstance(second.end(), Failed)
        first.ticket.cancel()
        first.end()


def test_the_weights_leave_when_idle_and_come_back_with_the_next_request() -> None:
    engine = FakeEngine(reply=lambda _: "ok")
    with running(engine, sleep_after_s=0.05) as service:
        until(lambda: service.stats().asleep)
        assert isinstance(Client(service).end(), Finished)
        until(lambda: engine.naps == 2)
        assert service.stats().seconds_since_progress == 0


def test_weights_that_do_not_come_back_fail_the_request_and_not_the_service() -> None:
    engine = FakeEngine(reply=lambda _: "ok")
    wake = engine.wake

    def fail() -> None:
        raise BundleError("model.onnx.data has another hash", hint="export it again")

    engine.wake = fail  # type: ignore[method-assign]
    with running(engine, sleep_after_s=0.02) as service:
        until(lambda: service.stats().asleep)
        end = Client(service).end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, BundleError)
        engine.wake = wake  # type: ignore[method-assign]
        assert isinstance(Client(service).end(), Finished)


def scheduler_of(service: Service) -> Scheduler:
    assert service._loaded is not None
    return service._loaded.scheduler


def sequence_of(service: Service, request: GenerationRequest) -> Sequence:
    return assemble(service.model, request, lambda _: None, service.metrics)


class CountingReader:
    """Notes which tokens it was shown."""

    reads: Literal["logits"] = "logits"

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, start: int, rows: NDArray[np.float32]) -> None:
        self.seen.append((start, len(rows)))


def test_nothing_is_generated_where_nothing_is_asked_for() -> None:
    service = make_service(FakeEngine())
    reader = CountingReader()
    sequence = sequence_of(service, GenerationRequest(tuple(b"p" * 40), SamplingParams()))
    sequence.max_tokens = 0
    sequence.prompt_reader = reader
    service.start()
    scheduler_of(service).submit(sequence)
    until(lambda: sequence.status is SequenceStatus.FINISHED)
    service.stop()
    assert sequence.output_ids == []
    assert reader.seen == [(0, 16), (16, 16), (32, 8)]


def test_sequences_are_queued_together_or_not_at_all() -> None:
    service = make_service(FakeEngine(), max_queue=3)
    request = GenerationRequest(tuple(b"hello"), SamplingParams())
    sequences = [sequence_of(service, request) for _ in range(4)]
    service.start()
    with pytest.raises(OverloadedError):
        scheduler_of(service).submit(*sequences)
    scheduler_of(service).submit(*sequences[:3])
    until(lambda: all(sequence.status is SequenceStatus.FINISHED for sequence in sequences[:3]))
    assert sequences[3].status is SequenceStatus.WAITING
    service.stop()
