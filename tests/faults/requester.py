"""A client that follows the protocol: it sends a request again, under the same id, until it is answered.

Where the device gives a request up because the process ended each time it ran, the client, who knows that the question
is not to blame, asks again under a new id.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from types import TracebackType
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

RETRY_S = 1.0
GIVEN_UP = (500, "crashed")
WINDOW = 16
"""Requests under way at once."""


class Requester:
    """Connected between ``with`` and its end.

    Args:
        port: of the broker.
        device: whom to ask.
        name: ours; begins every topic of answers.
    """

    def __init__(self, port: int, device: str, name: str = "asker") -> None:
        self.outcomes: dict[str, list[tuple[int, str]]] = defaultdict(list)
        """By request id, the status and text of every final outcome; copies included."""
        self.ids: dict[str, str] = {}
        """By question, the id of its newest request."""
        self.num_given_up = 0
        """Requests whose runs all ended with the process."""
        self.accepted: set[str] = set()
        """Requests that the device has said it will answer."""
        self.num_sent = 0
        self._topic = f"qwedge/v1/dev/{device}/req/{name}"
        self._filters = [(f"qwedge/v1/res/{name}/+/{kind}", 1) for kind in ("evt", "done")]
        self._changed = threading.Condition()
        self._ready = threading.Event()
        self._paho = paho.Client(CallbackAPIVersion.VERSION2, f"faults-{name}", protocol=MQTTProtocolVersion.MQTTv5)
        self._paho.reconnect_delay_set(1, 1)
        self._paho.max_queued_messages_set(WINDOW)
        self._paho.on_connect = lambda client, *_: client.subscribe(self._filters)
        self._paho.on_subscribe = lambda *_: self._ready.set()
        self._paho.on_message = self._received
        self._paho.connect_async("127.0.0.1", port, 5)

    def __enter__(self) -> Self:
        self._paho.loop_start()
        assert self._ready.wait(20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._paho.disconnect()
        self._paho.loop_stop()

    def send(self, request_id: str, text: str) -> paho.MQTTMessageInfo:
        """Publish a request once."""
        self.num_sent += 1
        body = {"messages": [{"role": "user", "content": text}]}
        return self._paho.publish(f"{self._topic}/{request_id}", json.dumps({"v": 1, "body": body}), 1)

    def ask_all(self, number: int, *, prefix: str = "r", times: int = 1, timeout_s: float = 60) -> list[str]:
        """Ask ``number`` questions until each was answered that many times; returns those that were not."""
        deadline = time.monotonic() + timeout_s
        questions = [f"{prefix}{index}" for index in range(number)]
        due: dict[str, float] = {}
        while questions and time.monotonic() < deadline:
            with self._changed:
                questions = [each for each in questions if not self._is_answered(each, times)]
            now = time.monotonic()
            for request_id, question in [(self.ids[each], each) for each in questions[:WINDOW]]:
                if due.get(request_id, 0.0) <= now:
                    due[request_id] = now + RETRY_S
                    self.send(request_id, f"question {question}")
            with self._changed:
                self._changed.wait(0.05)
        return questions

    def _is_answered(self, question: str, times: int) -> bool:
        request_id = self.ids.setdefault(question, question)
        outcomes = self.outcomes[request_id]
        if outcomes and outcomes[0] == GIVEN_UP:
            self.ids[question] = f"{request_id}.again"
            self.num_given_up += 1
            return False
        return len(outcomes) >= times

    def heard(self) -> tuple[set[str], dict[str, tuple[int, str]]]:
        """The requests that were accepted, and the outcomes that were told, up to now."""
        with self._changed:
            return set(self.accepted), {each: told[0] for each, told in self.outcomes.items() if told}

    def contradictions(self) -> list[str]:
        """Ids that got two different outcomes."""
        return [each for each, outcomes in self.outcomes.items() if len(set(outcomes)) > 1]

    def num_answered(self) -> int:
        """Questions that got an answer."""
        return sum(1 for each in self.ids.values() if self.outcomes[each] and self.outcomes[each][0][0] == 200)

    def _received(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        request_id, kind = message.topic.split("/")[-2:]
        payload = json.loads(message.payload)
        with self._changed:
            if kind == "done" and (outcome := final(payload)) is not None:
                self.outcomes[request_id].append(outcome)
            elif payload.get("event") == "accepted":
                self.accepted.add(request_id)
            self._changed.notify_all()


def final(done: dict[str, Any]) -> tuple[int, str] | None:
    """Status and text of an outcome; None for one that may pass: the request is sent again then."""
    if done["status"] == 200:
        return 200, done["body"]["choices"][0]["message"]["content"]
    return GIVEN_UP if done["body"]["error"]["code"] == "crashed" else None
