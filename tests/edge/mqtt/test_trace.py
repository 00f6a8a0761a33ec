"""The ring of the newest MQTT messages."""

from __future__ import annotations

import pytest

from edge.mqtt.trace import MAX_TOPIC, Trace


@pytest.mark.parametrize(
    ("topic", "kind"),
    [
        ("plant/llm/v1/dev/edge-1/status", "status"),
        ("plant/llm/v1/dev/edge-1/req/hmi/17", "req"),
        ("plant/llm/v1/pool/qwen/req/hmi/17", "req"),
        ("plant/llm/v1/res/hmi/17/done", "done"),
        ("plant/llm/v1/res/hmi/17/done/text", "done"),
        ("plant/llm/v1/dev/edge-1", "other"),
        ("plant/llm/v2/dev/edge-1/status", "other"),
        ("plant/press/alarm", "other"),
        ("dev/edge-1/status", "other"),
    ],
)
def test_kinds(topic: str, kind: str) -> None:
    trace = Trace("plant/llm")
    trace.add("in", topic, 3)
    (message,) = trace.messages()
    assert (message.topic, message.kind, message.bytes, message.count) == (topic, kind, 3, 1)


def test_what_repeats_counts_as_one_entry() -> None:
    trace = Trace("q", capacity=3)
    for _ in range(50):
        trace.add("out", "q/v1/dev/a/load", 10)
    trace.add("in", "q/v1/dev/a/load", 10)
    trace.add("out", "q/v1/dev/a/load", 10)
    assert [(each.number, each.direction, each.count, each.bytes) for each in trace.messages()] == [
        (50, "out", 50, 500),
        (51, "in", 1, 10),
        (52, "out", 1, 10),
    ]


def test_the_oldest_go_and_long_topics_are_cut() -> None:
    trace = Trace("q", capacity=2)
    for number in range(5):
        trace.add("in", f"{number}" * 1000, 0)
    assert [message.topic for message in trace.messages()] == ["3" * MAX_TOPIC, "4" * MAX_TOPIC]
