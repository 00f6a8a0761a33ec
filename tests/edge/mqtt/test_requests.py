"""Requests over a real mosquitto: answers, tokens, progress, cancels, copies and refusals."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from edge.mqtt.messages import Done
from tests.edge.mqtt.client import Client, chat, text_of
from tests.edge.mqtt.conftest import MakeDevice, wait_until
from tests.fakes import MODEL_NAME, FakeEngine

pytestmark = pytest.mark.broker

LONG = "The quick brown fox jumps over the lazy dog, 你好 and ünïcödé. " * 4


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_request_gets_progress_and_one_answer(make_device: MakeDevice, protocol: str) -> None:
    client = make_device().client(protocol)
    client.send("1", chat("hello"))
    done = client.done("1")
    assert (done.id, done.status, done.replayed) == ("1", 200, False)
    assert text_of(done) == "You said: hello"
    assert done.body["model"] == MODEL_NAME
    assert done.usage is not None
    assert done.usage.completion_tokens == len("You said: hello") + 1
    assert [e.event for e in client.of("1", "evt")] == ["accepted", "queued", "started"]
    assert client.of("1", "tok") == []


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_tokens_arrive_in_order_and_make_up_the_answer(make_device: MakeDevice, protocol: str) -> None:
    client = make_device(FakeEngine(lambda _: LONG, step_s=0.002)).client(protocol)
    client.send("1", chat("go", stream=True))
    done = client.done("1")
    batches = client.of("1", "tok")
    assert text_of(done) == LONG
    assert "".join(batch.text for batch in batches) == LONG
    assert [batch.seq for batch in batches] == list(range(len(batches)))
    assert 1 < len(batches) < len(LONG) / 4, "tokens go out in batches"
    topics = [message.topic.rsplit("/", 1)[-1] for message in client.received]
    assert topics.index("tok") < topics.index("done") == len(topics) - 1


def test_the_first_token_does_not_wait_for_a_batch(make_device: MakeDevice) -> None:
    engine = FakeEngine(lambda _: "abc")
    device = make_device(engine)
    client = device.client()
    engine.gate.clear()
    client.send("1", chat("go", stream=True))
    client.event("1", "queued")
    engine.gate.set()
    assert text_of(client.done("1")) == "abc"
    assert client.of("1", "tok")[0].text == "a"


def test_the_bodys_own_stream_field_counts_too(make_device: MakeDevice) -> None:
    client = make_device().client()
    client.send("1", {"body": {"messages": [{"role": "user", "content": "x"}], "stream": True}})
    assert client.done("1").status == 200
    assert client.of("1", "tok")


def test_the_tokens_of_several_choices_can_be_told_apart(make_device: MakeDevice) -> None:
    client = make_device(FakeEngine(lambda _: LONG, step_s=0.002)).client()
    request = chat("go", stream=True)
    request["body"]["n"] = 3
    client.send("1", request)
    done = client.done("1")
    assert [choice["message"]["content"] for choice in done.body["choices"]] == [LONG] * 3
    batches = client.of("1", "tok")
    for index in range(3):
        assert "".join(batch.text for batch in batches if batch.index == index) == LONG
    assert [batch.seq for batch in batches] == list(range(len(batches)))
    assert [e.event for e in client.of("1", "evt")] == ["accepted", "queued", "started"]
    assert len(client.of("1", "done")) == 1


def test_a_cancel_ends_all_choices(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(lambda _: "z" * 4000, step_s=0.01, slots=2))
    client = device.client()
    client.send("1", {"body": {"prompt": ["a", "b", "c"]}, "stream": True})
    client.wait(lambda: client.of("1", "tok"))
    client.cancel("1")
    assert client.done("1").status == 499
    wait_until(lambda: device.service.stats().num_running + device.service.stats().num_waiting == 0)
    assert len(client.of("1", "done")) == 1


def test_a_batch_that_does_not_fit_the_queue_is_refused_as_a_whole(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(slots=1), max_queue=3)
    client = device.client()
    device.engine.gate.clear()
    client.send("running", chat("a"))
    client.event("running", "started")
    client.send("waiting", chat("b"))
    client.event("waiting", "queued")
    client.send("batch", {"body": {"prompt": ["a", "b", "c"]}})
    assert client.done("batch").status == 429
    assert device.service.stats().num_waiting == 1
    device.engine.gate.set()
    assert client.done("waiting").status == 200
    client.send("batch", {"body": {"prompt": ["a", "b", "c"]}})
    assert len(client.done("batch", 2).body["choices"]) == 3


def test_an_echo_is_part_of_the_text(make_device: MakeDevice) -> None:
    client = make_device(FakeEngine(lambda prompt: prompt.upper())).client()
    client.send("1", {"body": {"prompt": "abc", "echo": True}, "stream": True})
    assert client.done("1").body["choices"][0]["text"] == "abcABC"
    assert "".join(batch.text for batch in client.of("1", "tok")) == "abcABC"
    client.send("2", {"body": {"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 0}})
    (choice,) = client.done("2").body["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("abc", ["a", "b", "c"])
    assert choice["logprobs"]["token_logprobs"] == [None, 0.0, 0.0]


def test_an_answer_that_no_broker_takes_is_an_error(make_device: MakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.mqtt.answers.MAX_OUTCOME_BYTES", 3000)
    device = make_device(FakeEngine(lambda _: "x" * 100))
    client = device.client()
    client.send("1", {"body": {"prompt": "abc", "logprobs": 5}})
    done = client.done("1")
    assert (done.status, done.body["error"]["code"]) == (413, "too_large")
    assert done.body["error"]["hint"]
    client.send("2", {"body": {"prompt": "abc"}})
    assert client.done("2").status == 200


def test_embeddings(make_device: MakeDevice) -> None:
    client = make_device().client()
    client.send("1", {"v": 1, "body": {"input": ["DDDD", [69, 69, 70, 70]]}, "stream": True})
    done = client.done("1")
    assert done.status == 200
    assert [entry["embedding"] for entry in done.body["data"]] == [
        [1.0, 0.0, 0.0, 0.0],
        pytest.approx([0, 0.5**0.5, 0.5**0.5, 0]),
    ]
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (8, 0)
    assert client.of("1", "tok") == []
    client.send("2", {"v": 1, "body": {"input": ""}})
    assert (client.done("2").status, client.done("2").body["error"]["param"]) == (400, "input")


def test_a_text_completion(make_device: MakeDevice) -> None:
    client = make_device(FakeEngine(lambda prompt: prompt.upper())).client()
    client.send("1", {"body": {"prompt": "abc"}, "stream": True})
    assert client.done("1").body["choices"][0]["text"] == "ABC"
    assert "".join(batch.text for batch in client.of("1", "tok")) == "ABC"


def test_reasoning_is_told_from_the_answer(make_device: MakeDevice) -> None:
    client = make_device(FakeEngine(lambda _: "<think>\nhm\n</think>\n\nYes")).client()
    client.send("1", chat("go", stream=True))
    done = client.done("1")
    assert text_of(done) == "Yes"
    assert "".join(batch.text for batch in client.of("1", "tok")) == "Yes"
    reasoning = "".join(batch.reasoning or "" for batch in client.of("1", "tok"))
    assert done.body["choices"][0]["message"]["reasoning_content"] == reasoning
    assert reasoning.strip() == "hm"


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_bare_text_is_answered_with_bare_text(make_device: MakeDevice, protocol: str) -> None:
    client = make_device().client(protocol)
    client.send("1", b"Zustand der Presse? [42]")
    client.wait(lambda: client.of("1", "done/text"))
    assert client.of("1", "done/text") == [b"You said: Zustand der Presse? [42]"]
    assert text_of(client.done("1")) == "You said: Zustand der Presse? [42]"


def test_the_padding_of_a_plcs_string_is_not_part_of_the_prompt(make_device: MakeDevice) -> None:
    client = make_device().client()
    client.send("1", b"hello".ljust(254, b"\0"))
    assert text_of(client.done("1")) == "You said: hello"


def test_the_mark_that_windows_editors_begin_a_file_with_is_not_part_of_a_request(make_device: MakeDevice) -> None:
    client = make_device().client()
    client.send("1", b"\xef\xbb\xbf" + json.dumps(chat("hello")).encode())
    assert text_of(client.done("1")) == "You said: hello"
    client.send("2", b"\xef\xbb\xbfhello")
    assert text_of(client.done("2")) == "You said: hello"


def test_bare_text_that_fails_is_answered_with_one_bare_line(make_device: MakeDevice) -> None:
    client = make_device(FakeEngine(context_length=64)).client()
    client.send("1", b"x" * 100)
    client.wait(lambda: client.of("1", "done/error"))
    assert client.done("1").status == 400
    assert client.of("1", "done/error")[0].startswith(b"400 the prompt has ")
    assert client.of("1", "done/text") == []


@pytest.mark.parametrize(
    ("request_body", "status", "param"),
    [
        (b"{", 400, None),
        (b"\xff\xfe", 400, None),
        (b"", 400, None),
        (b"{}", 400, "body"),
        ({"messages": [{"role": "user", "content": "x"}]}, 400, "body"),
        (chat("x", surprise=1), 400, "surprise"),
        (chat("x", deadline_ms=0), 400, "deadline_ms"),
        ({"v": 2, "body": {}}, 400, "v"),
        ({"body": {}}, 400, "messages"),
        ({"body": {"messages": [{"role": "user", "content": "x"}], "temperature": 99}}, 400, "temperature"),
        ({"body": {"messages": [{"role": "user", "content": "x"}], "model": "gpt-9"}}, 404, "model"),
        (chat("x" * 5000), 400, "messages"),
        (b"x" * ((1 << 20) + 1), 413, None),
    ],
)
def test_a_bad_request_gets_one_clear_outcome(
    make_device: MakeDevice, request_body: Any, status: int, param: str | None
) -> None:
    client = make_device().client()
    client.send("bad", request_body)
    done = client.done("bad")
    error = done.body["error"]
    assert (done.status, error["param"]) == (status, param)
    assert error["message"]
    client.send("good", chat("still there?"))
    assert client.done("good").status == 200
    assert len(client.of("bad", "done")) == 1


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_waiting_and_a_running_request_can_be_cancelled(make_device: MakeDevice, protocol: str) -> None:
    device = make_device(FakeEngine(lambda _: "z" * 4000, step_s=0.01, slots=1))
    client = device.client(protocol)
    client.send("running", chat("a", stream=True))
    client.wait(lambda: client.of("running", "tok"))
    client.send("waiting", chat("b"))
    client.event("waiting", "queued")
    client.cancel("waiting")
    assert client.done("waiting").status == 499
    assert client.of("running", "done") == []
    client.cancel("running")
    assert client.done("running").status == 499
    wait_until(lambda: device.service.stats().num_running == 0)


def test_nobody_can_cancel_anothers_request(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(step_s=0.01))
    owner, other = device.client(), device.client()
    owner.send("1", chat("mine"))
    owner.event("1", "started")
    other.cancel("1")
    assert owner.done("1").status == 200


def test_a_cancel_of_nothing_is_ignored(make_device: MakeDevice) -> None:
    client = make_device().client()
    client.cancel("never")
    client.send("1", chat("x"))
    assert client.done("1").status == 200
    client.cancel("1")
    client.send("2", chat("y"))
    assert client.done("2").status == 200
    assert client.of("never", "done") == []
    assert len(client.of("1", "done")) == 1


def test_a_copy_of_a_running_request_shares_its_answer(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine())
    client = device.client()
    device.engine.gate.clear()
    client.send("1", chat("x", attempt=1))
    client.event("1", "started")
    client.send("1", chat("x", attempt=2, deadline_ms=5000))
    client.wait(lambda: any(e.event == "accepted" and e.duplicate for e in client.of("1", "evt")))
    device.engine.gate.set()
    client.done("1")
    client.send("fence", chat("y"))
    client.done("fence")
    assert len(client.of("1", "done")) == 1
    assert device.bridge.stats().num_running == 0


def test_a_copy_of_an_answered_request_gets_the_same_answer_again(make_device: MakeDevice) -> None:
    device = make_device()
    client = device.client()
    client.send("1", chat("x"))
    first = client.done("1")
    steps = device.engine.num_steps
    client.send("1", chat("x", attempt=2))
    second = client.done("1", 2)
    assert second.replayed
    assert second.body == first.body
    assert device.engine.num_steps == steps, "it was not run again"


def test_a_cancelled_request_stays_cancelled(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(lambda _: "z" * 4000, step_s=0.01))
    client = device.client()
    client.send("1", chat("x"))
    client.event("1", "started")
    client.cancel("1")
    assert not client.done("1").replayed
    client.send("1", chat("x", attempt=2))
    assert (client.done("1", 2).status, client.done("1", 2).replayed) == (499, True)


def test_an_id_stands_for_one_request(make_device: MakeDevice) -> None:
    device = make_device()
    client, other = device.client(), device.client()
    device.engine.gate.clear()
    client.send("1", chat("x"))
    client.event("1", "started")
    client.send("1", chat("something else"))
    assert client.done("1").status == 409
    device.engine.gate.set()
    assert text_of(client.done("1", 2)) == "You said: x"
    client.send("1", chat("something else"))
    assert client.done("1", 3).status == 409
    other.send("1", chat("another client"))
    assert text_of(other.done("1")) == "You said: another client"


def test_a_full_queue_refuses_with_a_hint_when_to_come_back(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(slots=1), max_queue=1)
    client = device.client()
    device.engine.gate.clear()
    client.send("running", chat("a"))
    client.event("running", "started")
    client.send("waiting", chat("b"))
    client.event("waiting", "queued")
    client.send("refused", chat("c"))
    done = client.done("refused")
    assert done.status == 429
    assert done.retry_after_ms is not None
    assert done.retry_after_ms >= 1000
    device.engine.gate.set()
    assert client.done("running").status == client.done("waiting").status == 200
    client.send("refused", chat("c", attempt=2))
    assert text_of(client.done("refused", 2)) == "You said: c"


def test_a_deadline_ends_a_request_and_a_later_attempt_runs(make_device: MakeDevice) -> None:
    client = make_device(FakeEngine(lambda _: "z" * 200, step_s=0.005)).client()
    client.send("1", chat("x", deadline_ms=100))
    assert client.done("1").status == 408
    client.send("1", chat("x", attempt=2))
    assert client.done("1", 2).status == 200


def test_the_life_of_an_mqtt5_message_is_a_deadline(make_device: MakeDevice) -> None:
    device = make_device()
    client = device.client()
    device.engine.gate.clear()
    client.send("1", chat("x"), MessageExpiryInterval=1)
    client.event("1", "queued")
    time.sleep(1.1)
    device.engine.gate.set()
    assert client.done("1").status == 408


def test_correlation_data_and_response_topic_are_honoured(make_device: MakeDevice) -> None:
    client = make_device().client()
    inbox = f"{client.branch}/my/inbox"
    client.send("1", chat("x", stream=True), ResponseTopic=inbox, CorrelationData=b"\x00\xffkey")
    client.wait(lambda: any(message.topic == inbox for message in client.received))
    assert {message.topic for message in client.received} == {inbox, f"{inbox}/evt", f"{inbox}/tok"}
    assert {message.correlation for message in client.received} == {b"\x00\xffkey"}
    done = Done.model_validate_json(client.received[-1].payload)
    assert text_of(done) == "You said: x"


def test_a_response_topic_outside_the_own_branch_is_refused(make_device: MakeDevice) -> None:
    device = make_device()
    client = device.client(extra=("qwedge/v1/res/victim/#", "elsewhere/#"))
    for number, topic in enumerate(["qwedge/v1/res/victim/1/done", "elsewhere/1", f"{client.device}/status"]):
        client.send(str(number), chat("x"), ResponseTopic=topic)
        done = client.done(str(number))
        assert (done.status, done.body["error"]["param"]) == (400, "response_topic")
    assert all(message.topic.startswith(client.branch) for message in client.received)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_retained_request_is_ignored(make_device: MakeDevice, protocol: str) -> None:
    device = make_device()
    client = device.client(protocol)
    client.send("old", chat("x"), retain=True)
    client.send("new", chat("y"))
    assert client.done("new").status == 200
    assert client.of("old", "done") == []
    client.publish(f"{client.device}/req/{client.name}/old", b"", retain=True)


def test_requests_under_names_that_are_not_allowed_are_ignored(make_device: MakeDevice) -> None:
    device = make_device()
    client = device.client()
    client.publish(f"{client.device}/req/{client.name}/a b", b"x")
    client.publish(f"{client.device}/req/{client.name}/{'x' * 65}", b"x")
    client.publish(f"{client.device}/req//1", b"x")
    client.send("1", chat("x"))
    assert client.done("1").status == 200
    assert {message.topic.split("/")[4] for message in client.received} == {"1"}


def test_an_engine_that_fails_gives_a_500_and_the_next_request_an_answer(make_device: MakeDevice) -> None:
    client = make_device(FakeEngine(lambda prompt: "ok" if "short" in prompt else LONG, fail_after=3)).client()
    client.send("1", chat("long", stream=True))
    done = client.done("1")
    assert (done.status, done.body["error"]["code"]) == (500, "engine_failed")
    client.send("2", chat("short"))
    assert text_of(client.done("2")) == "ok"


def test_a_long_queue_does_not_fill_the_link_with_positions(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(slots=1), max_queue=20)
    client = device.client()
    device.engine.gate.clear()
    for number in range(20):
        client.send(str(number), chat("x"))
    client.event("19", "queued")
    device.engine.gate.set()
    client.done("19")
    positions = [e.position for e in client.of("19", "evt") if e.event == "queued"]
    assert positions[0] >= 18
    assert len(positions) < 10


def test_many_requests_at_once_get_one_outcome_each(make_device: MakeDevice) -> None:
    device = make_device(FakeEngine(slots=4), max_queue=64)
    clients: list[Client] = [device.client(protocol) for protocol in ("5", "3.1.1")]
    for number in range(30):
        for client in clients:
            client.send(str(number), chat(f"n{number}", stream=True))
    for client in clients:
        for number in range(30):
            done = client.done(str(number))
            assert text_of(done) == f"You said: n{number}"
            assert "".join(batch.text for batch in client.of(str(number), "tok")) == text_of(done)
            assert len(client.of(str(number), "done")) == 1
