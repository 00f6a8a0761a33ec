"""Who gets in, what they can do there, and what they are told: against the real broker with TLS and clients."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge.errors import ConfigError
from edge.mqtt import EmbeddedBroker, MqttBridge
from edge.mqtt.broker_clients import BrokerClient, add_client, hash_password, remove_client
from edge.mqtt.broker_setup import as_owner, clients_folder, make_broker
from edge.settings.mqtt import MqttSettings
from edge.settings.rules import RuleSettings
from tests.edge.mqtt.certificates import Authority, Pair
from tests.edge.mqtt.client import chat
from tests.edge.mqtt.conftest import accepts, wait_until
from tests.fakes import FakeEngine, make_service

pytestmark = pytest.mark.broker
DEVICE = "guarded"
ROOT = f"qwedge/v1/dev/{DEVICE}"


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.issue("edge-1", "IP:127.0.0.1")


@dataclass
class Site:
    """A device with its embedded broker on a network."""

    broker: EmbeddedBroker
    bridge: MqttBridge
    engine: FakeEngine
    folder: Path
    stack: ExitStack

    def add(self, name: str, password: str = "open sesame", **topics: Any) -> None:
        client = BrokerClient(name=name, password=hash_password(password, iterations=1000), **topics)
        add_client(clients_folder(self.folder), client)

    def connect(
        self, name: str | None, password: str | None, context: ssl.SSLContext | None, **options: Any
    ) -> Visitor:
        assert self.broker.network is not None
        port = self.broker.address.port if context is None else self.broker.network.port
        visitor = Visitor(name, password, context, port, **options)
        self.stack.callback(visitor.close)
        return visitor


@dataclass
class Visitor:
    """Somebody at the broker; not necessarily welcome."""

    name: str | None
    password: str | None
    context: ssl.SSLContext | None
    port: int
    client_id: str | None = None
    outcome: str = ""
    """``Success``, or why it was not let in."""
    heard: list[tuple[str, bytes]] = field(default_factory=list)
    lost: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        client_id = self.client_id or self.name or ""
        self._paho = paho.Client(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5)
        self._subscribed = threading.Event()
        self._paho.reconnect_delay_set(60, 60)
        if self.name is not None:
            self._paho.username_pw_set(self.name, self.password)
        if self.context is not None:
            self._paho.tls_set_context(self.context)
        self._paho.on_connect = self._answered
        self._paho.on_subscribe = lambda *_: self._subscribed.set()
        self._paho.on_disconnect = lambda *_: self.lost.set()
        self._paho.on_message = lambda _c, _d, message: self.heard.append((message.topic, bytes(message.payload)))
        self._paho.connect("127.0.0.1", self.port)
        self._paho.loop_start()
        wait_until(lambda: self.outcome or self.lost.is_set())

    def _answered(self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self.outcome = str(reason)
        if reason.is_failure:
            client.disconnect()

    def listen(self, *topics: str) -> None:
        self._paho.subscribe([(topic, 1) for topic in topics])
        assert self._subscribed.wait(60)

    def say(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> str:
        """Publish and wait for the broker's word on it, which is about the permission too with MQTT 5."""
        reasons: list[str] = []
        self._paho.on_publish = lambda _c, _d, _m, reason, _p: reasons.append(str(reason))
        self._paho.publish(topic, payload, 1, retain)
        wait_until(lambda: reasons)
        return reasons[0]

    def ask(self, request_id: str, name: str | None = None) -> str:
        body = chat("x").__repr__().replace("'", '"').encode()
        return self.say(f"{ROOT}/req/{name or self.name}/{request_id}", body)

    def done(self, request_id: str, name: str | None = None) -> bytes:
        topic = f"qwedge/v1/res/{name or self.name}/{request_id}/done"
        wait_until(lambda: topic in dict(self.heard))
        return dict(self.heard)[topic]

    def close(self) -> None:
        self._paho.disconnect()
        self._paho.loop_stop()


@pytest.fixture
def make_site(tmp_path: Path, server: Pair) -> Iterator[Any]:
    with ExitStack() as stack:

        def make(*names: str, **settings: Any) -> Site:
            engine = FakeEngine()
            service = make_service(engine)
            folder = tmp_path / "broker"
            given: dict[str, Any] = {"tls_cert": server.cert, "tls_key": server.key, "tls_port": 0} | settings
            chosen = MqttSettings(broker="embedded", port=0, device=DEVICE, keepalive_s=5, **given)
            for name in names:
                add_client(
                    clients_folder(folder),
                    BrokerClient(name=name, password=hash_password("open sesame", iterations=1000)),
                )
            broker = make_broker(chosen, folder)
            broker.start()
            stack.callback(broker.stop)
            bridge = MqttBridge(service, as_owner(chosen, broker), broker.address)
            service.start()
            bridge.start()
            stack.callback(lambda: (engine.gate.set(), service.stop(), bridge.stop()))
            wait_until(lambda: bridge.connected)
            return Site(broker, bridge, engine, folder, stack)

        yield make


def trust(authority: Authority, pair: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.cert)
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    return context


def test_a_client_with_its_password_is_answered_over_tls(make_site: Any, authority: Authority) -> None:
    site = make_site("gateway")
    gateway = site.connect("gateway", "open sesame", trust(authority))
    gateway.listen("qwedge/v1/res/gateway/#", f"{ROOT}/+")
    assert gateway.ask("1") == "Success"
    assert b'"status":200' in gateway.done("1")
    wait_until(
        lambda: {f"{ROOT}/{kind}" for kind in ("status", "info", "load")} <= {topic for topic, _ in gateway.heard}
    )


@pytest.mark.parametrize("encrypted", [True, False])
@pytest.mark.parametrize(
    ("name", "password"), [(None, None), ("gateway", "open sesam"), ("gateway", None), ("nobody", "x")]
)
def test_others_are_not_let_in(
    make_site: Any, authority: Authority, name: str | None, password: str | None, encrypted: bool
) -> None:
    site = make_site("gateway")
    visitor = site.connect(name, password, trust(authority) if encrypted else None)
    assert visitor.outcome in {"Not authorized", "Bad user name or password"}


def test_nobody_reads_anothers_answers_nor_asks_in_anothers_name(make_site: Any, authority: Authority) -> None:
    site = make_site("gateway", "thief")
    gateway = site.connect("gateway", "open sesame", trust(authority))
    thief = site.connect("thief", "open sesame", trust(authority))
    thief.listen("#", "qwedge/v1/res/gateway/#", f"{ROOT}/req/#", "$share/qwedge/qwedge/v1/pool/+/req/+/+", "$SYS/#")
    gateway.listen("qwedge/v1/res/gateway/#")
    gateway.ask("1")
    gateway.done("1")
    for topic in (
        f"{ROOT}/req/gateway/2",
        f"{ROOT}/cancel/gateway/1",
        f"{ROOT}/status",
        f"{ROOT}/cmd/reload/1",
        "qwedge/v1/pool/m/req/gateway/1",
        "qwedge/v1/res/gateway/1/done",
        "qwedge/v1/res/thief/1/done",
        "homeassistant/device/x/config",
    ):
        assert thief.say(topic, b"spoofed", retain=True) == "Not authorized", topic
    thief.listen("qwedge/v1/res/thief/#")
    thief.ask("1")
    thief.done("1")
    assert site.bridge.stats().num_requests == 2
    allowed = ("qwedge/v1/res/thief/", f"{ROOT}/status", f"{ROOT}/info", f"{ROOT}/load")
    assert [topic for topic, _ in thief.heard if not topic.startswith(allowed)] == []
    assert not any(payload == b"spoofed" for _, payload in gateway.heard)


def test_a_name_is_bound_to_its_client_id(make_site: Any, authority: Authority) -> None:
    site = make_site("gateway", "thief")
    gateway = site.connect("gateway", "open sesame", trust(authority))
    thief = site.connect("thief", "open sesame", trust(authority), client_id="gateway")
    assert thief.ask("1", "gateway") == "Not authorized"
    again = site.connect("thief", "open sesame", trust(authority), client_id=f"qwedge-{DEVICE}")
    assert again.outcome == "Success"
    assert thief.lost.wait(60), "whatever ids it names, it is one client"
    assert not gateway.lost.is_set()
    assert site.bridge.connected
    gateway.listen("qwedge/v1/res/gateway/#")
    gateway.ask("2")
    gateway.done("2")


def test_further_topics_are_given_to_one_client_and_to_the_devices_rules(make_site: Any, authority: Authority) -> None:
    rule = RuleSettings(name="advice", subscribe="plant/+/alarm", prompt="{{ payload }}", publish="plant/{1}/advice")
    site = make_site("other", rule=(rule,))
    site.add("plc", publish=("plant/7/alarm",), subscribe=("plant/+/advice",))
    wait_until(lambda: _let_in(site, "plc", authority))
    plc = site.connect("plc", "open sesame", trust(authority))
    other = site.connect("other", "open sesame", trust(authority))
    for visitor in (plc, other):
        visitor.listen("plant/#")
    assert plc.say("plant/8/alarm") == "Not authorized"
    assert other.say("plant/7/alarm") == "Not authorized"
    assert plc.say("plant/7/alarm", b"hot") == "Success"
    wait_until(lambda: plc.heard)
    assert plc.heard == [("plant/7/advice", b"You said: hot")]
    assert other.heard == []


def test_only_who_may_manage_gives_commands_and_sees_them(make_site: Any, authority: Authority) -> None:
    site = make_site("other")
    site.add("operator", manage=True)
    wait_until(lambda: _let_in(site, "operator", authority))
    operator = site.connect("operator", "open sesame", trust(authority))
    other = site.connect("other", "open sesame", trust(authority))
    topic, order = f"{ROOT}/cmd/restart/1", b'{"v":1,"status":"init"}'
    for visitor in (operator, other):
        visitor.listen(f"{ROOT}/cmd/#")
    assert other.say(topic, order) == "Not authorized"
    assert operator.say(topic, order, retain=True) == "Success"
    wait_until(lambda: operator.heard)
    assert operator.heard == [(topic, order)]  # its bridge takes no commands
    assert other.heard == []


def test_clients_come_and_go_while_the_broker_runs(make_site: Any, authority: Authority) -> None:
    site = make_site("first")
    first = site.connect("first", "open sesame", trust(authority))
    pid = site.broker.pid
    site.add("second")
    wait_until(lambda: _let_in(site, "second", authority))
    second = site.connect("second", "open sesame", trust(authority))
    remove_client(clients_folder(site.folder), "second")
    assert second.lost.wait(60)
    assert site.connect("second", "open sesame", trust(authority)).outcome == "Not authorized"
    assert not first.lost.is_set()
    assert site.bridge.connected
    assert site.broker.pid == pid


def test_the_first_client_ends_that_anybody_is_let_in(make_site: Any, caplog: pytest.LogCaptureFixture) -> None:
    site = make_site(tls_cert=None, tls_key=None)
    anybody = Visitor(None, None, None, site.broker.address.port)
    assert anybody.outcome == "Success"
    with caplog.at_level(logging.INFO):
        site.add("first")
        assert anybody.lost.wait(60)
    wait_until(lambda: accepts(site.broker.address.port))
    wait_until(lambda: site.bridge.connected)
    assert not [record for record in caplog.records if "mosquitto ended" in record.getMessage()]
    late = Visitor(None, None, None, site.broker.address.port)
    assert late.outcome == "Not authorized"
    remove_client(clients_folder(site.folder), "first")
    time.sleep(1.5)
    assert Visitor(None, None, None, site.broker.address.port).outcome == "Not authorized"


def test_certificates_tell_who_clients_are(make_site: Any, authority: Authority, stranger: Authority) -> None:
    site = make_site(tls_ca=authority.cert)
    press = site.connect(None, None, trust(authority, authority.issue("press-4")), client_id="anything")
    assert press.outcome == "Success"
    press.listen("qwedge/v1/res/press-4/#")
    press.ask("1", "press-4")
    assert b'"status":200' in press.done("1", "press-4")
    assert press.ask("1", "gateway") == "Not authorized"
    for context in (trust(authority), trust(authority, stranger.issue("press-4"))):
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):
            assert site.connect(None, None, context, client_id="x").outcome == "Success"


def test_a_network_is_not_listened_to_without_clients(tmp_path: Path, server: Pair) -> None:
    tls: dict[str, Any] = {"tls_cert": server.cert, "tls_key": server.key}
    settings = MqttSettings(broker="embedded", listen="0.0.0.0", device=DEVICE, **tls)
    with pytest.raises(ConfigError, match="has no clients") as caught:
        make_broker(settings, tmp_path)
    assert "qwedge mqtt add-client" in caught.value.hint


def test_a_damaged_file_of_clients_changes_nothing(make_site: Any, caplog: pytest.LogCaptureFixture) -> None:
    site = make_site("gateway")
    (clients_folder(site.folder) / "clients.json").write_text("{")
    wait_until(lambda: "goes on with the clients that it knows" in caplog.text)
    assert site.connect("gateway", "open sesame", None).outcome == "Success"
    time.sleep(1.2)
    assert caplog.text.count("goes on with the clients") == 1
    assert site.connect(None, None, None).outcome == "Not authorized"


def _let_in(site: Site, name: str, authority: Authority) -> bool:
    visitor = site.connect(name, "open sesame", trust(authority))
    visitor.close()
    time.sleep(0.2)
    return visitor.outcome == "Success"
