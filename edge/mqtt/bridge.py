"""The MQTT front end as a whole: one device on one broker."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from edge.errors import UnavailableError
from edge.journal import Journal
from edge.management import Management, Operation
from edge.mqtt import homeassistant
from edge.mqtt.answers import Answers
from edge.mqtt.commands import Commands
from edge.mqtt.connection import Connection
from edge.mqtt.intake import Intake
from edge.mqtt.ledger import Ledger
from edge.mqtt.messages import MAX_PAYLOAD_BYTES
from edge.mqtt.packets import Identity, Incoming, Outgoing
from edge.mqtt.password import read_password
from edge.mqtt.pool import Pool
from edge.mqtt.presence import TEMPERATURE_STEP_C, LoadReporter, make_info, make_load, status_message
from edge.mqtt.resume import MAX_STARTS
from edge.mqtt.rules import check_with, load_rules
from edge.mqtt.rules_runner import RuleRunner
from edge.mqtt.rules_topics import disjoint, match
from edge.mqtt.tls import client_context
from edge.mqtt.topics import Layout, pool_filter
from edge.mqtt.trace import Trace
from edge.power import Thermometer
from edge.service import Service
from edge.settings.mqtt import BrokerAddress, MqttSettings

log = logging.getLogger(__name__)

CANCEL_TIMEOUT_S: Final = 5.0
"""How long cancelled requests may take to end when the bridge stops."""
FLUSH_S: Final = 5.0
"""How long the last answers may take to reach the broker when the bridge stops."""
POOL_SUFFIX: Final = "-pool"
"""Last part of the client id of the pool's connection."""


@dataclass(frozen=True)
class BridgeStats:
    """A snapshot for health and metrics."""

    connected: bool
    protocol: str
    """MQTT version in use: ``5`` or ``3.1.1``."""
    problem: str
    """Why there is no link; empty where there is one, and before the first attempt has failed."""
    num_running: int
    """Requests that came over MQTT and have no outcome yet."""
    num_requests: int
    """Requests taken, copies and refused ones included."""
    num_outcomes: int
    """Outcomes published; one for each request, and one for each copy of an answered one."""


class MqttBridge:
    """Answers requests that arrive over a broker.

    Args:
        service: runs the requests; it must be started when the bridge is.
        settings: root, device, credentials and rules.
        address: the broker.
        journal: makes requests durable; opened and closed with the bridge. None: one in memory.
        management: carries commands out, where the settings allow for them; None takes none.
        problem: why the device does less than it should (safe mode); requests that were there when the process ended
            are not run again then. None: it does all.

    Raises:
        ConfigError: the root or the device cannot stand in a topic, a file of a password, certificate or key cannot be
            used, or a rule does not go with this model.
    """

    def __init__(
        self,
        service: Service,
        settings: MqttSettings,
        address: BrokerAddress,
        journal: Journal | None = None,
        management: Management | None = None,
        *,
        problem: str | None = None,
    ) -> None:
        self._service = service
        self._problem = problem
        self._settings = settings
        self._management = management if settings.management == "on" else None
        self._thermometer = Thermometer(step_c=TEMPERATURE_STEP_C)
        self.layout = Layout(settings.root, settings.device)
        """Our topics."""
        self.trace = Trace(settings.root)
        """The newest messages, those of a pool aside."""
        self.address = address
        """The broker."""
        rules = load_rules(settings)
        check_with(service.model, rules)
        own = [
            *self.layout.filters,
            *homeassistant.subscriptions(settings, self.layout),
            *([self.layout.commands] if self._management is not None else []),
        ]
        filters = disjoint([*own, *(rule.settings.subscribe for rule in rules)])
        self._connection = Connection(
            address,
            _identity(settings, address),
            keepalive_s=settings.keepalive_s,
            will=status_message(self.layout, "offline"),
            filters=filters,
            optional=set(filters) - set(own) if set(own) <= set(filters) else (),
            max_payload=MAX_PAYLOAD_BYTES,
            on_ready=self._announce,
            on_message=self._receive,
            retained=[self.layout.commands],
            trace=self.trace,
        )
        self._journal = journal or Journal()
        self._ledger = Ledger(self._journal)
        self._answers = Answers(self._connection, self._ledger, self._journal, settings.device)
        max_starts = MAX_STARTS if problem is None else 1
        self._intake = Intake(service, self.layout, self._journal, self._ledger, self._answers, max_starts=max_starts)
        self._rules = RuleRunner(service, self.layout, rules, self._connection.publish)
        self._pool = (
            Pool(
                service,
                address,
                _identity(settings, address, POOL_SUFFIX),
                pool_filter(settings.root, service.model.manifest.name),
                keepalive_s=settings.keepalive_s,
                slots=settings.pool_slots,
                take=self._intake.put,
                refuse=self._intake.refuse,
            )
            if settings.pool == "on"
            else None
        )
        self._commands = (
            None if self._management is None else Commands(self._management, self.layout, self._connection.publish)
        )
        if management is not None:
            management.listen(self._managed)
        self._load = LoadReporter(
            self._connection,
            self.layout.load,
            lambda: make_load(service, self._answers.tokens_per_s, self._thermometer.read()),
        )

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and our subscriptions: requests arrive."""
        return self._connection.ready

    @property
    def pool_member(self) -> bool:
        """Whether requests of the pool arrive."""
        return self._pool is not None and self._pool.member

    def stats(self) -> BridgeStats:
        """What the bridge did and does."""
        return BridgeStats(
            connected=self.connected,
            protocol=self._connection.protocol,
            problem="" if self.connected else self._connection.reason,
            num_running=len(self._ledger.running()),
            num_requests=self._intake.num_requests,
            num_outcomes=self._answers.num_outcomes,
        )

    def start(self) -> None:
        """Take up what was not answered before, connect in the background for as long as it takes, and answer.

        Raises:
            ConfigError: the journal's folder belongs to another user, or others may look into it.
            UnavailableError: another process uses the journal.
        """
        self._journal.open()
        self._answers.start()
        self._intake.start()
        self._rules.start()
        if self._commands is not None:
            self._commands.start()
        self._load.start()
        self._connection.start()
        if self._pool is not None:
            self._pool.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give the running ones ``drain_s`` seconds, answer the rest with 503, disconnect.

        Where the service has been stopped before, nothing runs any more and only the last answers are sent.
        """
        if self._pool is not None:
            self._pool.stop()
        self._answers.stopping = True
        self._intake.leave_stored()
        if not self._ledger.wait_idle(drain_s):
            self._end_running()
        self._intake.stop()
        self._rules.stop()
        if self._commands is not None:
            self._commands.stop()
        self._answers.stop()
        self._load.stop()
        self._connection.stop(status_message(self.layout, "offline"), FLUSH_S)
        self._answers.confirm()
        self._journal.close()

    def _end_running(self) -> None:
        for job in self._ledger.running():
            if job.ticket is not None:
                job.ticket.cancel()
        if not self._ledger.wait_idle(CANCEL_TIMEOUT_S):
            log.error("%d requests did not end in time", len(self._ledger.running()))
            stuck = UnavailableError("the device is stopping", hint="send the request again", retry_after_s=5)
            for job in self._ledger.running():
                self._answers.refuse(job.reply, stuck)

    def _managed(self, operation: Operation) -> None:
        """Say who we are now that an operation has ended: the model may be another one."""
        if operation.state == "running":
            return
        if self._connection.ready:
            self._announce()
        if self._pool is not None:
            self._pool.serve(pool_filter(self._settings.root, self._service.model.manifest.name))

    def _announce(self) -> None:
        """Say who we are, whenever a connection is made, on the network thread; and when that has changed."""
        protocol, device = self._connection.protocol, self.layout.device
        info = make_info(self._service, device, protocol, self._management, problem=self._problem)
        self._connection.publish(Outgoing(self.layout.info, info.encode(), qos=1, retain=True))
        self._connection.publish(status_message(self.layout, "online"))
        model, has_temperature = self._service.model.manifest.name, self._thermometer.read() is not None
        card = homeassistant.discovery(
            self._settings,
            self.layout,
            model,
            has_temperature=has_temperature,
            takes_commands=self._management is not None,
            bundles=info.bundles,
        )
        if card is not None:
            self._connection.publish(card)
        self._load.refresh()

    def _receive(self, message: Incoming) -> None:
        """Tell our protocol's messages from those of the rules; on the network thread."""
        if any(match(each, message.topic) is not None for each in self.layout.filters):
            self._intake.put(message)
            return
        if self._commands is not None and match(self.layout.commands, message.topic) is not None:
            self._commands.put(message)
            return
        if message.topic == self.layout.prompt:
            self._intake.put(homeassistant.as_request(message, self.layout))
            return
        # MQTT 3.1.1 brings what is retained with every new link: old news, which must not be answered each time.
        if not (message.retain and self._connection.protocol == "3.1.1"):
            self._rules.put(message)
        message.ack()


def _identity(settings: MqttSettings, address: BrokerAddress, suffix: str = "") -> Identity:
    client_id = f"{settings.client_id}-{settings.device}{suffix}"
    password = None if settings.password_file is None else read_password(settings.password_file)
    context = client_context(settings) if address.tls else None
    return Identity(client_id, settings.username, password, context)
