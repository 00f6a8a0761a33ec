"""The client over a real broker and a real server: the same words, whatever the transport."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge.client import Client, Progress
from edge.errors import (
    CancelledError,
    ConfigError,
    DeadlineError,
    EngineError,
    ModelNotFoundError,
    OverloadedError,
    QwedgeError,
    RequestError,
    UnavailableError,
)
from tests.client.conftest import MakeWay
from tests.edge.mqtt.conftest import wait_until
from tests.fakes import FakeEngine

pytestmark = pytest.mark.broker

LONG = "The quick brown fox jumps over the lazy dog, 你好 and ünïcödé. " * 4
ENDLESS = "z" * 4000


def test_a_question_gets_its_answer(make_way: MakeWay) -> None:
    with make_way().client() as client:
        assert client.ask("hello") == "You said: hello"
        assert client.ask("hello", system="Be brief.", max_tokens=3) == "You"


def test_a_whole_request_gets_a_whole_answer(make_way: MakeWay) -> None:
    with make_way().client() as client:
        answer = client.chat({"messages": [{"role": "user", "content": "x"}], "n": 2})
        assert [choice["message"]["content"] for choice in answer["choices"]] == ["You said: x"] * 2
        text = client.chat({"prompt": "x", "max_tokens": 4})
        assert (text["object"], text["choices"][0]["text"]) == ("text_completion", "You ")


def test_text_comes_as_it_is_made(make_way: MakeWay) -> None:
    way = make_way(FakeEngine(lambda _: LONG, step_s=0.002))
    with way.client() as client:
        stream = client.stream("go")
        pieces = list(stream)
        assert "".join(pieces) == LONG
        assert len(pieces) > 3
        assert stream.answer is not None
        assert stream.answer["choices"][0]["message"]["content"] == LONG
        assert stream.answer["choices"][0]["finish_reason"] == "stop"
        assert stream.answer["usage"]["completion_tokens"] == len(LONG.encode()) + 1


def test_a_streamed_answer_is_the_one_that_is_not_streamed(make_way: MakeWay) -> None:
    reply = '<think>\nhm</think>\n\nYes<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool]}
    with make_way(FakeEngine(lambda _: reply)).client() as client:
        plain, stream = client.chat(body), client.stream(body)
        text = "".join(stream)
        assert stream.answer is not None
        messages = [answer["choices"][0]["message"] for answer in (plain, stream.answer)]
        for message in messages:
            for call in message["tool_calls"]:
                call.pop("id"), call.pop("index", None)
        assert messages[0] == messages[1]
        assert text == messages[0]["content"]
        assert stream.answer["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"] == "tool_calls"


def test_leaving_a_stream_cancels_the_request(make_way: MakeWay) -> None:
    way = make_way(FakeEngine(lambda _: ENDLESS, step_s=0.005))
    with way.client() as client:
        for _ in client.stream("go"):
            assert way.service.stats().num_running == 1
            break
        wait_until(lambda: way.service.stats().num_running == 0)


def test_async_clients_ask_and_stream_at_once(make_way: MakeWay) -> None:
    way = make_way(FakeEngine(slots=4, step_s=0.002))

    async def stream(number: int) -> str:
        return "".join([text async for text in client.stream(f"s{number}")])

    async def main() -> list[str]:
        nonlocal client
        async with client:
            await client.check()
            return await asyncio.gather(*(client.ask(f"a{i}") for i in range(4)), *(stream(i) for i in range(4)))

    client = way.async_client()
    expected = [f"You said: {kind}{i}" for kind in "as" for i in range(4)]
    assert asyncio.run(main()) == expected


def test_leaving_an_async_stream_or_task_cancels_the_request(make_way: MakeWay) -> None:
    way = make_way(FakeEngine(lambda _: ENDLESS, step_s=0.005))

    def idle() -> bool:
        return way.service.stats().num_running == 0

    async def main() -> None:
        async with way.async_client() as client:
            async for _ in client.stream("go"):
                break
            await asyncio.to_thread(wait_until, idle)
            task = asyncio.create_task(client.ask("go"))
            await asyncio.to_thread(wait_until, lambda: not idle())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(wait_until, idle)

    asyncio.run(main())


def test_progress_is_told(make_way: MakeWay) -> None:
    way = make_way(FakeEngine(slots=1))
    told: list[Progress] = []
    way.engine.gate.clear()
    with way.client() as client:
        first = threading.Thread(target=client.ask, args=("first",))
        first.start()
        wait_until(lambda: way.service.stats().num_running == 1)
        second = threading.Thread(target=lambda: list(client.stream("second", on_progress=told.append)))
        second.start()
        wait_until(lambda: any(p.name == "queued" and p.eta_s is not None for p in told))
        way.engine.gate.set()
        first.join()
        second.join()
    assert told[0].name in {"accepted", "sent"}


def test_many_threads_may_ask_at_once(make_way: MakeWay) -> None:
    answers: dict[int, str] = {}
    with make_way(FakeEngine(slots=4), max_queue=64).client() as client:
        threads = [threading.Thread(target=lambda i=i: answers.update({i: client.ask(f"n{i}")})) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {i: f"You said: n{i}" for i in range(16)}


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [
        ({"messages": []}, RequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "model": "gpt-9"}, ModelNotFoundError, "model"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, RequestError, "messages"),
    ],
)
def test_a_wrong_request_raises_what_is_wrong(
    make_way: MakeWay, body: dict[str, object], error: type[QwedgeError], param: str
) -> None:
    with make_way().client() as client:
        for ask in (client.chat, lambda body: list(client.stream(body))):
            with pytest.raises(error) as caught:
                ask(body)
            assert caught.value.param == param
            assert caught.value.status == error.status


def test_a_full_queue_is_waited_for(make_way: MakeWay) -> None:
    way = make_way(FakeEngine(slots=1), max_queue=1)
    answers: list[str] = []
    way.engine.gate.clear()
    with way.client() as client:
        threads = [threading.Thread(target=lambda: answers.append(client.ask("x"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: way.service.stats().num_waiting == 1)
        time.sleep(0.2)  # the others are refused meanwhile
        way.engine.gate.set()
        for thread in threads:
            thread.join()
    assert answers == ["You said: x"] * 4


def test_a_queue_that_stays_full_is_the_reason_of_the_failure(make_way: MakeWay) -> None:
    way = make_way(FakeEngine(slots=1), max_queue=1)
    way.engine.gate.clear()
    with way.client() as client:
        busy = [threading.Thread(target=client.ask, args=(word,)) for word in ("one", "two")]
        for thread in busy:
            thread.start()
        wait_until(lambda: (way.service.stats().num_running, way.service.stats().num_waiting) == (1, 1))
        with pytest.raises(OverloadedError):
            client.ask("three", timeout_s=0.5)
        way.engine.gate.set()
        for thread in busy:
            thread.join()


def test_a_deadline_ends_the_request(make_way: MakeWay) -> None:
    way = make_way(FakeEngine(lambda _: ENDLESS, step_s=0.005))
    with way.client() as client:
        began = time.monotonic()
        with pytest.raises(DeadlineError):
            client.ask("x", timeout_s=0.4)
        assert time.monotonic() - began < 5
        wait_until(lambda: way.service.stats().num_running == 0)


def test_a_failure_is_tried_once_more(make_way: MakeWay) -> None:
    failures = [RuntimeError("one"), RuntimeError("two"), RuntimeError("three")]

    def reply(_: str) -> str:
        if failures:
            raise failures.pop()
        return "fine"

    with make_way(FakeEngine(reply)).client() as client:
        with pytest.raises(EngineError):
            client.ask("x")
        assert len(failures) == 1
        assert client.ask("y") == "fine"


def test_closing_cancels_what_runs(make_way: MakeWay) -> None:
    way = make_way(FakeEngine(lambda _: ENDLESS, step_s=0.005))
    client = way.client()
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(client.ask, "x")
        wait_until(lambda: way.service.stats().num_running == 1)
        client.close()
        with pytest.raises(CancelledError):
            answer.result(5)
    wait_until(lambda: way.service.stats().num_running == 0)


def test_nobody_there_is_said_at_once() -> None:
    for url, target in {"mqtt://127.0.0.1:9": {"device": "d"}, "http://127.0.0.1:9": {}}.items():
        client = Client(url, connect_timeout_s=0.3, **target)
        with pytest.raises(UnavailableError, match=r"no connection to .*refused"):
            client.ask("x")
        client.close()


def test_a_server_is_checked(make_way: MakeWay) -> None:
    with make_way().client() as client:
        client.check()


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("mqtt://h", {}),
        ("mqtt://h", {"device": "d", "pool": "m"}),
        ("mqtt://h", {"device": "a/b"}),
        ("mqtt://h", {"device": "d", "root": "a/+"}),
        ("http://h", {"device": "d"}),
        ("ftp://h", {}),
        ("mqtt://", {"device": "d"}),
        ("mqtt://h:99999", {"device": "d"}),
        ("mqtt://user:secret@h", {"device": "d"}),
    ],
)
def test_targets_that_make_no_sense_are_refused(url: str, target: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Client(url, **target)
    assert "secret" not in str(caught.value)


def test_names_that_cannot_stand_in_a_topic_are_refused() -> None:
    with pytest.raises(RequestError):
        Client("mqtt://h", client="a/b", device="d")
    client = Client("mqtt://h", device="d")
    with pytest.raises(RequestError):
        client.ask("x", id="a/b")
    with pytest.raises(RequestError):
        client.stream({"messages": [], "n": 2})
