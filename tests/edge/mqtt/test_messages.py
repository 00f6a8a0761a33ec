"""Every message class: its JSON reads back as itself, and nothing that is not in the specification passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from edge.errors import OverloadedError, RequestError
from edge.mqtt import messages
from edge.mqtt.messages import (
    Accepted,
    Command,
    Done,
    Info,
    Limits,
    Load,
    ModelInfo,
    Queued,
    Request,
    RuleFailure,
    Started,
    Tokens,
    Usage,
    Versions,
    parse_request,
)  # fmt: skip

SPECIFICATION = Path(__file__).parents[3] / "docs" / "mqtt-protocol.md"
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}}
SAMPLES = [
    Request(body={"messages": []}, stream=True, deadline_ms=60_000, attempt=2),
    Accepted(id="1", device="d", duplicate=True),
    Queued(id="1", position=3, eta_ms=1500),
    Started(id="1"),
    Tokens(id="1", seq=0, index=2, text="ünï\n\"'", reasoning="hm"),
    Done.success("1", {"choices": [], "usage": USAGE}),
    Done.failure("1", OverloadedError("full", hint="later", retry_after_s=1.5)),
    Info(
        device="d",
        models=(ModelInfo(id="m", model_type="qwen2", context_length=4096),),
        limits=Limits(slots=4, max_queue=64, max_payload_bytes=1 << 20),
        versions=Versions(qwedge="0.1.0", protocol=1, mqtt="5"),
    ),
    Load(slots=4, busy=1, queue=0, accepting=True, tokens_per_s=45.1, temperature_c=61.0),
    Load(slots=4, busy=1, queue=0, accepting=True, tokens_per_s=33.8, speed=0.75, slowed_by="heat"),
    Command(status="failed", name="m@0123456789ab", step="loading", progress=0.5, error={"message": "no"}),
    RuleFailure.of("advice", "plant/7/alarm", RequestError("no", hint="see there", param="prompt")),
]


def _message_classes() -> set[type]:
    return set(messages.Message.__subclasses__())


def test_every_message_class_has_a_sample() -> None:
    assert {type(sample) for sample in SAMPLES} == _message_classes()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_message_reads_back_as_itself(sample: messages.Message) -> None:
    encoded = sample.encode()
    assert json.loads(encoded)["v"] == 1
    assert type(sample).model_validate_json(encoded) == sample
    with pytest.raises(ValidationError):
        type(sample).model_validate_json(json.dumps({**json.loads(encoded), "surprise": 1}))
    with pytest.raises(ValidationError):
        type(sample).model_validate_json(json.dumps({**json.loads(encoded), "v": 2}))


def test_a_failure_carries_the_hint_and_when_to_retry() -> None:
    done = Done.failure("1", OverloadedError("full", hint="later", retry_after_s=1.5))
    assert (done.status, done.retry_after_ms, done.usage) == (429, 1500, None)
    assert done.body["error"]["hint"] == "later"


def test_usage_keeps_the_details() -> None:
    usage = Done.success("1", {"usage": USAGE}).usage
    assert isinstance(usage, Usage)
    assert usage.model_dump() == USAGE


@pytest.mark.parametrize(
    ("payload", "param"),
    [
        (b'{"body":{},"deadline_ms":86400001}', "deadline_ms"),
        (b'{"body":{},"deadline_ms":"1"}', "deadline_ms"),
        (b'{"body":{},"stream":1}', "stream"),
        (b'{"body":[]}', "body"),
        (b'{"bodie":{}}', "body"),
        (b"[]", None),
    ],
)
def test_a_request_that_is_none_names_the_field(payload: bytes, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(payload)
    assert caught.value.param == param


def test_the_specification_documents_every_field() -> None:
    text = SPECIFICATION.read_text(encoding="utf-8")
    names = {name for cls in [*_message_classes(), ModelInfo, Limits, Versions] for name in cls.model_fields}
    assert [name for name in sorted(names) if f'"{name}"' not in text and f"`{name}`" not in text] == []
