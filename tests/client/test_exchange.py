"""The rules of one request, without any transport: what is sent again when, and which text is trusted."""

from __future__ import annotations

import re
from collections.abc import Generator
from types import SimpleNamespace

import pytest

from edge.client import AnswerChangedError
from edge.client.answer import error_of
from edge.client.exchange import BACKOFF_S, SILENCE_S, Exchange
from edge.client.wire import Ended, Event, Lost, Progress, Text
from edge.errors import (
    CancelledError,
    ConflictError,
    DeadlineError,
    EngineError,
    OverloadedError,
    QwedgeError,
    RequestError,
    UnavailableError,
)


class Script:
    """A call that notes what is asked of it."""

    first_word_s = (3.0, 30.0)

    def __init__(self) -> None:
        self.attempts: list[int] = []
        self.cancelled = False
        self.closed = False

    def send(self, attempt: int, remaining_s: float | None) -> None:
        assert remaining_s is None or remaining_s > 0
        self.attempts.append(attempt)

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True


class Clock:
    """Time that passes only as a request waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("edge.client.exchange.time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def answered(text: str) -> Ended:
    return Ended(200, {"choices": [{"message": {"content": text}}]})


def failed(status: int, retry_after_s: float | None = None) -> Ended:
    return Ended(status, {"error": {"message": "no", "hint": "later", "param": None}}, retry_after_s)


class Run:
    """Plays events to an exchange and notes text and waits."""

    def __init__(self, clock: Clock, timeout_s: float | None = None) -> None:
        self.call = Script()
        self.exchange = Exchange(self.call, timeout_s)
        self.pieces: list[str] = []
        self._clock = clock
        self._steps: Generator[float | str, Event | None, None] = self.exchange.steps()
        self.wait_s = self._next(None)

    def tell(self, event: Event) -> None:
        """An event comes at once."""
        self.wait_s = self._next(event)

    def wait(self) -> None:
        """Nothing comes."""
        self._clock.now += self.wait_s
        self.wait_s = self._next(None)

    def wait_for_ever(self) -> None:
        for _ in range(1000):
            self.wait()

    def leave(self) -> None:
        self._steps.close()

    def _next(self, event: Event | None) -> float:
        try:
            step = self._steps.send(event)
            while isinstance(step, str):
                self.pieces.append(step)
                step = next(self._steps)
        except StopIteration:
            return 0.0
        return step


def test_an_answer_ends_it(clock: Clock) -> None:
    run = Run(clock)
    run.tell(answered("hi"))
    assert run.exchange.answer()["choices"][0]["message"]["content"] == "hi"
    assert (run.call.attempts, run.call.cancelled, run.call.closed) == ([1], False, True)


def test_silence_sends_it_again_later_and_later(clock: Clock) -> None:
    run, waits = Run(clock), []
    for _ in range(6):
        waits.append(run.wait_s)
        run.wait()
    assert waits == [3, 6, 12, 24, 30, 30]
    assert run.call.attempts == [1, 2, 3, 4, 5, 6, 7]


def test_somebody_who_works_on_it_is_asked_after_when_silent(clock: Clock) -> None:
    run = Run(clock)
    run.tell(Progress("accepted", "edge-1"))
    assert run.wait_s == SILENCE_S
    run.wait()
    assert run.call.attempts == [1, 2]
    assert run.wait_s == 3
    run.tell(Progress("accepted", "edge-1"))
    assert run.wait_s == SILENCE_S


@pytest.mark.parametrize("status", [429, 503])
def test_those_who_are_full_say_when_to_come_back(clock: Clock, status: int) -> None:
    run = Run(clock)
    run.tell(failed(status, 7.0))
    assert 7.0 <= run.wait_s <= 8.5
    assert run.call.attempts == [1]
    run.wait()
    assert run.call.attempts == [1, 2]


def test_a_copy_that_reached_nobody_is_sent_again_soon(clock: Clock) -> None:
    run = Run(clock)
    for number in range(2, 12):
        run.tell(Lost("nobody"))
        assert 0 < run.wait_s <= BACKOFF_S[1]
        run.wait()
        assert run.call.attempts[-1] == number


def test_an_answer_that_comes_during_a_pause_counts(clock: Clock) -> None:
    run = Run(clock)
    run.tell(failed(429, 60.0))
    run.tell(answered("after all"))
    assert run.exchange.answer()["choices"][0]["message"]["content"] == "after all"


def test_a_failure_of_the_device_is_tried_once_more(clock: Clock) -> None:
    run = Run(clock)
    run.tell(failed(500))
    run.wait()
    run.tell(failed(500))
    assert run.call.attempts == [1, 2]
    with pytest.raises(EngineError):
        run.exchange.answer()


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, RequestError), (408, DeadlineError), (409, ConflictError), (499, CancelledError), (418, RequestError)],
)
def test_what_no_copy_can_change_is_final(clock: Clock, status: int, error: type[QwedgeError]) -> None:
    run = Run(clock)
    run.tell(failed(status))
    with pytest.raises(error, match=re.escape("no (hint: later)")):
        run.exchange.answer()
    assert run.call.attempts == [1]
    assert not run.call.cancelled


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([], UnavailableError),
        ([Progress("accepted", "d")], DeadlineError),
        ([failed(429, 60.0)], OverloadedError),
        ([Lost("gone")], UnavailableError),
        ([failed(429, 60.0), Progress("accepted", "d")], DeadlineError),
    ],
)
def test_the_end_of_time_says_what_was_in_the_way(clock: Clock, events: list[Event], error: type[QwedgeError]) -> None:
    run = Run(clock, timeout_s=2.0)
    for event in events:
        run.tell(event)
    with pytest.raises(error):
        run.wait_for_ever()
    assert clock.now <= 1002.001
    assert run.call.cancelled
    assert run.call.closed


def test_leaving_cancels(clock: Clock) -> None:
    run = Run(clock)
    run.tell(Text(0, "a"))
    run.leave()
    assert run.call.cancelled
    assert run.call.closed


def test_a_gap_is_repaired_from_the_whole_answer(clock: Clock) -> None:
    run = Run(clock)
    for event in (
        Text(0, "The "),
        Text(1, "quick "),
        Text(3, "fox "),
        Text(4, "jumps"),
        answered("The quick brown fox jumps"),
    ):
        run.tell(event)
    assert run.pieces == ["The ", "quick "]
    assert run.exchange.rest() == "brown fox jumps"


def test_a_second_run_neither_repeats_nor_mixes_text(clock: Clock) -> None:
    run = Run(clock)
    for event in (Text(0, "abc"), Text(0, "a"), Text(1, "bcd"), Text(2, "e"), answered("abcde")):
        run.tell(event)
    assert "".join(run.pieces) + run.exchange.rest() == "abcde"


def test_a_second_run_that_reads_differently_is_an_error_with_the_answer_at_hand(clock: Clock) -> None:
    run = Run(clock)
    for event in (Text(0, "red"), Text(0, "blue"), answered("blue")):
        run.tell(event)
    assert run.pieces == ["red"]
    with pytest.raises(AnswerChangedError):
        run.exchange.rest()
    assert run.exchange.answer()["choices"][0]["message"]["content"] == "blue"


def test_an_error_without_words_is_one_too() -> None:
    error = error_of(Ended(502, {}))
    assert isinstance(error, EngineError)
    assert "502" in error.message
