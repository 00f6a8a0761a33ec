"""Runs the rules: one thread takes messages to the service and publishes the answers.

A rule answers one message at a time, in the order of arrival; what comes meanwhile waits in its gate. Rules use the
same service as everybody else. A message of a rule is not kept on disk: one that is being answered when the device
loses power is lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from edge.errors import EngineError, OverloadedError, QwedgeError, UnavailableError
from edge.mqtt.messages import RuleFailure
from edge.mqtt.packets import Incoming, Outgoing
from edge.mqtt.rules import Rule, RuleMessage
from edge.mqtt.rules_gate import Fate, Gate
from edge.mqtt.topics import Layout
from edge.openai import Answer, parse_chat, prepare
from edge.service import Event, Failed, Finished, Service, Ticket

log = logging.getLogger(__name__)

END_TIMEOUT_S: Final = 5.0
"""How long cancelled answers may take to end."""
BUSY_RETRY_S: Final = 1.0
"""When to try again after the service had no room, unless it says when."""


@dataclass(eq=False)
class _Run:
    """A message that is being answered."""

    lane: _Lane
    message: RuleMessage
    topic: str
    """Where the answer goes."""
    answer: Answer
    events: list[tuple[int, Event]] = field(default_factory=list)
    """Written by the engine's thread until the last one; bounded by the answer's tokens."""
    ticket: Ticket | None = None


@dataclass(eq=False)
class _Lane:
    """A rule at work; its run is the rules thread's."""

    rule: Rule
    gate: Gate
    run: _Run | None = None


class RuleRunner:
    """Answers the messages that rules take.

    Args:
        service: runs the prompts; it must be started when the runner is.
        layout: our topics.
        rules: checked with the service's model.
        publish: sends a message; returns False where it was dropped.
    """

    def __init__(
        self, service: Service, layout: Layout, rules: Sequence[Rule], publish: Callable[[Outgoing], bool]
    ) -> None:
        self._service = service
        self._layout = layout
        self._publish = publish
        self._lanes = [_Lane(rule, Gate(rule.settings)) for rule in rules]
        self._changed = threading.Condition()  # guards the gates and what follows
        self._ended: list[_Run] = []
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._work, name="mqtt-rules", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs, let go of what waits, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def put(self, message: Incoming) -> bool:
        """Take a message off the network thread; returns whether it is for any rule."""
        lanes = [lane for lane in self._lanes if lane.rule.captures(message.topic) is not None]
        if not lanes:
            return False
        with self._changed:
            for lane in lanes:
                payload = message.payload
                if payload is not None and len(payload) > lane.rule.settings.max_payload_bytes:
                    payload = None
                fates = lane.gate.offer(RuleMessage(message.topic, payload), time.monotonic())
                self._count(lane, fates)
            self._changed.notify_all()
        return True

    # --- the rules thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stopping:
            for run in self._take_ended():
                self._finish(run)
            for lane in self._lanes:
                if lane.run is None:
                    self._advance(lane)
            with self._changed:
                if not (self._ended or self._stopping):
                    self._changed.wait(self._pause_s())
        self._end_all()

    def _pause_s(self) -> float | None:
        """Seconds until a message of an idle rule is due; None where none waits."""
        dues = [lane.gate.next_due for lane in self._lanes if lane.run is None]
        return min((max(0.0, due - time.monotonic()) for due in dues if due is not None), default=None)

    def _take_ended(self) -> list[_Run]:
        with self._changed:
            ended, self._ended = self._ended, []
            return ended

    def _advance(self, lane: _Lane) -> None:
        """Answer the rule's next message, if one is due."""
        with self._changed:
            message, fates = lane.gate.take(time.monotonic())
        self._count(lane, fates)
        if message is not None:
            self._guarded(lane, message, lambda: self._begin(lane, message))

    def _guarded(self, lane: _Lane, message: RuleMessage, action: Callable[[], None]) -> None:
        """Do something for a message; where that fails, say so."""
        try:
            action()
        except QwedgeError as error:
            self._fail(lane, message, error)
        except Exception:  # whatever a message does to us, the next one is answered
            log.exception("the rule %s failed", lane.rule.name)
            self._fail(lane, message, EngineError("the rule failed", hint="see the device's log"))

    def _begin(self, lane: _Lane, message: RuleMessage) -> None:
        """Submit a message; one that the service has no room for is tried again later."""
        try:
            lane.run = self._submit(lane, message)
        except OverloadedError as error:
            due = time.monotonic() + (error.retry_after_s or BUSY_RETRY_S)
            with self._changed:
                fates = lane.gate.put_back(message, due)
            self._count(lane, fates)

    def _submit(self, lane: _Lane, message: RuleMessage) -> _Run:
        rule, model = lane.rule, self._service.model
        topic = rule.output_topic(message.topic)
        request = parse_chat(rule.request(rule.render(message)))
        generations = [replace(each, identity=f"rule:{rule.name}") for each in prepare(model, request)]
        run = _Run(lane, message, topic, Answer(model, request, generations))

        def on_event(index: int, event: Event) -> None:
            run.events.append((index, event))
            if isinstance(event, Finished | Failed):
                with self._changed:
                    self._ended.append(run)
                    self._changed.notify_all()

        run.ticket = self._service.submit_all(generations, on_event)
        return run

    def _finish(self, run: _Run) -> None:
        run.lane.run = None
        self._guarded(run.lane, run.message, lambda: self._deliver(run))

    def _deliver(self, run: _Run) -> None:
        """Publish the answer of a run that has ended.

        Raises:
            QwedgeError: there is none.
        """
        rule = run.lane.rule
        for index, event in run.events:
            run.answer.chunks(index, event)
        payload = rule.read(run.answer.body()).encode("utf-8", errors="replace")
        kind = "application/json" if rule.schema is not None else "text/plain"
        if not self._publish(Outgoing(run.topic, payload, rule.settings.qos, rule.settings.retain, kind)):
            raise UnavailableError("the broker cannot be reached", hint="see the device's log")
        self._service.metrics.rule(rule.name, "answered")

    def _fail(self, lane: _Lane, message: RuleMessage, error: QwedgeError) -> None:
        """Say on the rule's error topic that a message got no answer."""
        with self._changed:
            lane.gate.forget(message)
        name = lane.rule.name
        log.warning("the rule %s gave no answer on %.200r: %s", name, message.topic, error.message)
        self._service.metrics.rule(name, "failed")
        failure = RuleFailure.of(name, message.topic, error)
        self._publish(Outgoing(self._layout.rule_error(name), failure.encode(), qos=1))

    def _count(self, lane: _Lane, fates: Iterable[Fate]) -> None:
        for fate in fates:
            self._service.metrics.rule(lane.rule.name, fate)

    def _end_all(self) -> None:
        """End what runs, each with its outcome, and drop what waits."""
        for lane in self._lanes:
            if lane.run is not None and lane.run.ticket is not None:
                lane.run.ticket.cancel()
        deadline = time.monotonic() + END_TIMEOUT_S
        while any(lane.run for lane in self._lanes) and time.monotonic() < deadline:
            with self._changed:
                self._changed.wait_for(lambda: self._ended, deadline - time.monotonic())
            for run in self._take_ended():
                self._finish(run)
        with self._changed:
            for lane in self._lanes:
                self._count(lane, ["dropped"] * lane.gate.clear())
