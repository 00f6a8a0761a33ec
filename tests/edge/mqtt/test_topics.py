"""The topic layout: what it builds it parses, and it refuses what could reach foreign topics."""

from __future__ import annotations

import pytest

from edge.errors import ConfigError, RequestError
from edge.mqtt.topics import MAX_TOPIC_BYTES, CancelTopic, Layout, RequestId, RequestTopic, pool_filter, pool_request

LAYOUT = Layout("plant7/llm", "press-3")


def test_the_layout_is_that_of_the_protocol() -> None:
    request = RequestId("hmi.1", "0001")
    assert LAYOUT.status == "plant7/llm/v1/dev/press-3/status"
    assert LAYOUT.info == "plant7/llm/v1/dev/press-3/info"
    assert LAYOUT.load == "plant7/llm/v1/dev/press-3/load"
    assert LAYOUT.filters == ("plant7/llm/v1/dev/press-3/req/+/+", "plant7/llm/v1/dev/press-3/cancel/+/+")
    assert LAYOUT.request(request) == "plant7/llm/v1/dev/press-3/req/hmi.1/0001"
    assert LAYOUT.cancel(request) == "plant7/llm/v1/dev/press-3/cancel/hmi.1/0001"
    reply = LAYOUT.reply(request)
    assert [reply.evt, reply.tok, reply.done, reply.text, reply.error] == [
        f"plant7/llm/v1/res/hmi.1/0001/{end}" for end in ("evt", "tok", "done", "done/text", "done/error")
    ]


def test_what_is_built_is_parsed() -> None:
    request = RequestId("a-Z_0.9", "x" * 64)
    assert LAYOUT.parse(LAYOUT.request(request)) == RequestTopic(request)
    assert LAYOUT.parse(LAYOUT.cancel(request)) == CancelTopic(request)


@pytest.mark.parametrize(
    "topic",
    [
        "plant7/llm/v1/dev/press-3/status",
        "plant7/llm/v1/dev/other/req/a/1",
        "plant7/llm/v1/dev/press-3/req/a",
        "plant7/llm/v1/dev/press-3/req/a/1/2",
        "plant7/llm/v1/dev/press-3/req//1",
        "plant7/llm/v1/dev/press-3/req/a b/1",
        "plant7/llm/v1/dev/press-3/req/a/ü",
        "plant7/llm/v1/dev/press-3/req/a/" + "x" * 65,
        "plant7/llm/v1/dev/press-3/req/a/1\n",
        "",
    ],
)
def test_other_topics_are_refused(topic: str) -> None:
    with pytest.raises(RequestError):
        LAYOUT.parse(topic)


def test_a_response_topic_inside_the_own_branch_takes_the_outcome() -> None:
    reply = LAYOUT.reply(RequestId("hmi", "1"), "plant7/llm/v1/res/hmi/my/inbox")
    assert reply.done == "plant7/llm/v1/res/hmi/my/inbox"
    assert reply.tok == "plant7/llm/v1/res/hmi/my/inbox/tok"
    assert reply.text == "plant7/llm/v1/res/hmi/my/inbox/text"


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "plant7/llm/v1/res/hmi",
        "plant7/llm/v1/res/hmi/",
        "plant7/llm/v1/res/hmi//x",
        "plant7/llm/v1/res/hmi2/x",
        "plant7/llm/v1/res/hmi/+",
        "plant7/llm/v1/res/hmi/#",
        "plant7/llm/v1/res/hmi/$SYS",
        "plant7/llm/v1/res/hmi/a\0b",
        "plant7/llm/v1/dev/press-3/req/hmi/2",
        "$SYS/broker",
        "plant7/llm/v1/res/hmi/" + "x" * MAX_TOPIC_BYTES,
    ],
)
def test_a_response_topic_elsewhere_is_refused(topic: str) -> None:
    with pytest.raises(RequestError) as caught:
        LAYOUT.reply(RequestId("hmi", "1"), topic)
    assert caught.value.param == "response_topic"
    assert "plant7/llm/v1/res/hmi/" in caught.value.hint


@pytest.mark.parametrize(("root", "device"), [("a/+", "d"), ("", "d"), ("a//b", "d"), ("a", "b/c"), ("a", "#")])
def test_a_root_or_device_that_is_no_topic_is_a_config_error(root: str, device: str) -> None:
    with pytest.raises(ConfigError):
        Layout(root, device)


def test_a_pool_has_topics_of_its_own() -> None:
    request = RequestId("hmi", "1")
    topic = pool_request("plant7/llm", "qwen3-0.6b", request)
    assert topic == "plant7/llm/v1/pool/qwen3-0.6b/req/hmi/1"
    assert pool_filter("plant7/llm", "qwen3-0.6b") == "$share/qwedge/plant7/llm/v1/pool/qwen3-0.6b/req/+/+"
    assert LAYOUT.parse(topic) == RequestTopic(request)


@pytest.mark.parametrize("model", ["", "+", "a/b", "Model", "$share"])
def test_a_model_that_is_no_topic_level_has_no_pool(model: str) -> None:
    with pytest.raises(ConfigError):
        pool_filter("plant7/llm", model)
