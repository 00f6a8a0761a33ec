"""Management over MQTT: each command is one retained message that goes through states, as in thin-edge.io [1].

Whoever may write it publishes ``init`` on ``.../cmd/{type}/{id}``; the device replaces the message with ``executing``
and at last with ``successful`` or ``failed``. So a command waits at the broker for a device that is away, its outcome
for a client that is, and a device that comes back finds out what it was doing when it ended.

[1] https://thin-edge.github.io/thin-edge.io/references/mqtt-api/#command-status
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, get_args

from edge.errors import QwedgeError, RequestError
from edge.management import Kind, Management, Operation
from edge.mqtt.inbox import Inbox
from edge.mqtt.messages import Command, CommandStatus, command_error, parse_command
from edge.mqtt.packets import Incoming, Outgoing
from edge.mqtt.topics import CommandTopic, Layout

log = logging.getLogger(__name__)

PROGRESS_S: Final = 1.0
"""Shortest time between two messages that differ in progress only."""
_MAX_SEEN: Final = 1024
_KINDS: Final = get_args(Kind)
_STATUS: Final[dict[str, CommandStatus]] = {"running": "executing", "done": "successful", "failed": "failed"}
_INTERRUPTED: Final = RequestError("the device restarted meanwhile", hint="look at its state and send a new command")


class Commands:
    """Takes commands and tells what becomes of them.

    Args:
        management: carries them out.
        layout: our topics.
        publish: sends a message, or keeps it while there is no link.
    """

    def __init__(self, management: Management, layout: Layout, publish: Callable[[Outgoing], object]) -> None:
        self._management = management
        self._layout = layout
        self._publish = publish
        self._inbox = Inbox()
        self._thread: threading.Thread | None = None
        self._begun: OrderedDict[str, None] = OrderedDict()
        """Topics of commands that this process has begun: what arrives on them is our own."""
        self._running: dict[str, tuple[Command, float]] = {}
        """By topic of the commands that run or are about to: what was last told of them, and when."""
        management.listen(self._changed)

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._take_all, name="mqtt-commands", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a running command goes on."""
        self._inbox.close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def put(self, message: Incoming) -> None:
        """Take a message; on the network thread. There is room for more than anybody sends in good faith."""
        if not self._inbox.put(message):
            log.warning("ignored a command: there are too many")
        message.ack()

    def _take_all(self) -> None:
        while (message := self._inbox.get()) is not None:
            try:
                self._take(message)
            except Exception:  # whatever a payload does to us, the next one is looked at
                log.exception("a command could not be taken")

    def _take(self, message: Incoming) -> None:
        if not message.payload:
            return  # its sender has cleared it
        try:
            topic = self._layout.parse_command(message.topic)
        except RequestError as error:
            log.warning("ignored a message on %.200r: %s", message.topic, error.message)
            return
        try:
            command = parse_command(message.payload)
        except RequestError as error:
            self._tell(message.topic, Command(status="failed", error=command_error(error)))
            return
        if command.status == "init":
            self._begin(message.topic, topic, command)
        elif command.status == "executing" and message.topic not in self._begun:
            self._tell(message.topic, self._left_over(topic, command))

    def _begin(self, name: str, topic: CommandTopic, command: Command) -> None:
        self._begun[name] = None
        self._begun.move_to_end(name)
        while len(self._begun) > _MAX_SEEN:
            self._begun.popitem(last=False)
        if name in self._running:  # a copy of its order
            self._tell(name, self._running[name][0])
            return
        self._running[name] = (Command(status="executing"), 0.0)
        try:
            kind = _kind(topic.type)
            self._management.begin(kind, command.name, operation_id=f"{topic.type}/{topic.id}")
        except QwedgeError as error:
            del self._running[name]
            self._tell(name, Command(status="failed", name=command.name, error=command_error(error)))

    def _left_over(self, topic: CommandTopic, command: Command) -> Command:
        """What became of a command that was being carried out when the process ended."""
        if topic.type in {"reload", "restart"} or (topic.type == "switch" and self._management.serves(command.name)):
            return Command(status="successful", name=command.name)
        return Command(status="failed", name=command.name, error=command_error(_INTERRUPTED))

    def _changed(self, operation: Operation) -> None:
        """On the operation's thread."""
        name = f"{self._layout.commands.removesuffix('+/+')}{operation.id}"
        if name not in self._running:
            return
        told, told_at = self._running[name]
        command = Command(
            status=_STATUS[operation.state],
            name=operation.name,
            step=operation.step or None,
            progress=round(operation.progress, 2) if operation.step else None,
            error=None if operation.error is None else command_error(operation.error),
        )
        moved_only = command.model_copy(update={"progress": told.progress}) == told
        if moved_only and time.monotonic() - told_at < PROGRESS_S:
            return
        if operation.state == "running":
            self._running[name] = (command, time.monotonic())
        else:
            del self._running[name]
        self._tell(name, command)

    def _tell(self, topic: str, command: Command) -> None:
        self._publish(Outgoing(topic, command.encode(), qos=1, retain=True))


def _kind(word: str) -> Kind:
    if word not in _KINDS:
        raise RequestError(f"there is no command {word!r}", hint=f"the commands are {', '.join(_KINDS)}", param="topic")
    return word  # type: ignore[return-value]
