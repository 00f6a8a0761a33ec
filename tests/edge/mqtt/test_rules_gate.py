"""The gate of a rule by a clock of the test's: what is answered, when, and what is not."""

from __future__ import annotations

import random
from typing import Any

from edge.mqtt.rules import RuleMessage
from edge.mqtt.rules_gate import MAX_TOPICS, Gate
from tests.edge.mqtt.test_rules import make_settings


def make_gate(**changes: Any) -> Gate:
    return Gate(make_settings(**changes))


def message(payload: str = "hot", topic: str = "plant/7/alarm") -> RuleMessage:
    return RuleMessage(topic, payload.encode())


def taken(gate: Gate, now: float) -> list[str]:
    """Payloads of everything that may be answered now."""
    found = []
    while (next_one := gate.take(now)[0]) is not None:
        found.append((next_one.payload or b"").decode())
    return found


def test_without_limits_every_message_counts_in_its_order() -> None:
    gate = make_gate()
    assert [gate.offer(message(text), 0.0) for text in "abca"] == [[], [], [], []]
    assert gate.next_due == 0.0
    assert taken(gate, 0.0) == ["a", "b", "c", "a"]
    assert gate.next_due is None


def test_the_last_message_of_a_burst_counts_once_it_is_over() -> None:
    gate = make_gate(debounce_s=2.0)
    assert gate.offer(message("a"), 0.0) == []
    assert gate.offer(message("b"), 1.5) == ["superseded"]
    assert gate.offer(message("other", "plant/8/alarm"), 1.6) == []
    assert taken(gate, 3.4) == []
    assert taken(gate, 3.5) == ["b"]
    assert taken(gate, 3.6) == ["other"]


def test_a_topic_is_answered_so_often_and_then_with_its_newest_message() -> None:
    gate = make_gate(min_interval_s=10.0)
    gate.offer(message("a"), 0.0)
    assert taken(gate, 0.0) == ["a"]
    gate.offer(message("b"), 1.0)
    assert gate.offer(message("c"), 2.0) == ["superseded"]
    gate.offer(message("other", "plant/8/alarm"), 2.0)
    assert taken(gate, 2.0) == ["other"]
    assert gate.next_due == 10.0
    assert taken(gate, 10.0) == ["c"]


def test_the_same_payload_again_does_nothing_on_its_topic() -> None:
    gate = make_gate(on_change=True)
    for text, topic in [("a", "x"), ("a", "x"), ("a", "y"), ("b", "x"), ("a", "x")]:
        gate.offer(message(text, topic), 0.0)
    fates = []
    found = []
    while True:
        next_one, skipped = gate.take(0.0)
        fates += skipped
        if next_one is None:
            break
        found.append(((next_one.payload or b"").decode(), next_one.topic))
    assert found == [("a", "x"), ("a", "y"), ("b", "x"), ("a", "x")]
    assert fates == ["unchanged"]


def test_what_failed_may_be_tried_again_although_nothing_changed() -> None:
    gate = make_gate(on_change=True)
    gate.offer(message(), 0.0)
    first, _ = gate.take(0.0)
    assert first is not None
    gate.forget(first)
    gate.offer(message(), 1.0)
    assert taken(gate, 1.0) == ["hot"]


def test_too_many_push_the_oldest_out_or_do_not_get_in() -> None:
    for policy, left in (("drop-oldest", ["c", "d"]), ("drop-newest", ["a", "b"])):
        gate = make_gate(max_queue=2, when_full=policy)
        assert [gate.offer(message(text), 0.0) for text in "abcd"] == [[], [], ["dropped"], ["dropped"]]
        assert taken(gate, 0.0) == left


def test_a_message_that_could_not_be_tried_is_the_next_one_again() -> None:
    gate = make_gate(on_change=True)
    gate.offer(message("a"), 0.0)
    gate.offer(message("b"), 0.0)
    first, _ = gate.take(0.0)
    assert first is not None
    assert gate.put_back(first, 1.0) == []
    assert taken(gate, 1.0) == ["a", "b"]


def test_a_newer_message_wins_over_one_that_is_put_back() -> None:
    gate = make_gate(debounce_s=0.5)
    gate.offer(message("a"), 0.0)
    first, _ = gate.take(0.5)
    assert first is not None
    gate.offer(message("b"), 0.6)
    assert gate.put_back(first, 1.0) == ["superseded"]
    assert taken(gate, 2.0) == ["b"]


def test_a_gate_stays_small_whatever_comes() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    source = random.Random(seed)
    gate = make_gate(max_queue=8, on_change=True, min_interval_s=0.01)
    now, offered, answered, lost = 0.0, 0, 0, 0
    for _ in range(5_000):
        now += source.random() / 100
        offered += 1
        lost += len(gate.offer(message(str(source.randrange(3)), f"t/{source.randrange(3_000)}"), now))
        if source.random() < 0.7:
            found, fates = gate.take(now)
            answered += found is not None
            lost += len(fates)
        assert len(gate) <= 8
        assert len(gate._last) <= MAX_TOPICS
    assert offered == answered + lost + gate.clear()
