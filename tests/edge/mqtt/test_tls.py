"""The device as a client of somebody else's broker behind TLS."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from edge.errors import ConfigError
from edge.mqtt import MqttBridge
from edge.mqtt.broker import _free_port
from edge.mqtt.broker_program import find_mosquitto
from edge.mqtt.password import read_password
from edge.mqtt.tls import client_context, explain_alert
from edge.settings.mqtt import BrokerAddress, MqttSettings
from tests.edge.mqtt.certificates import Authority, Pair
from tests.edge.mqtt.conftest import accepts, wait_until
from tests.fakes import make_service

pytestmark = pytest.mark.broker
NAME = "localhost"

Foreign = Callable[..., BrokerAddress]


@pytest.fixture(scope="module")
def server(authority: Authority) -> Pair:
    return authority.issue("broker", f"DNS:{NAME}")


@pytest.fixture
def start_broker(tmp_path: Path, authority: Authority, server: Pair) -> Iterator[Foreign]:
    """A mosquitto with TLS, which may ask for certificates."""
    with ExitStack() as stack:

        def start(*options: str) -> BrokerAddress:
            port = _free_port("127.0.0.1", 0)
            tls = f"cafile {authority.cert}\ncertfile {server.cert}\nkeyfile {server.key}\n"
            user = "user root\n" if os.geteuid() == 0 else ""
            config = tmp_path / "mosquitto.conf"
            config.write_text(
                f"{user}allow_anonymous true\nlistener {port} 127.0.0.1\n{tls}" + "\n".join(options) + "\n"
            )
            child = stack.enter_context(
                subprocess.Popen([find_mosquitto(), "-c", str(config)], stderr=subprocess.DEVNULL)
            )
            stack.callback(child.terminate)
            wait_until(lambda: accepts(port))
            return BrokerAddress(NAME, port, tls=True)

        yield start


@pytest.fixture
def make_bridge() -> Iterator[Callable[..., MqttBridge]]:
    with ExitStack() as stack:

        def make(address: BrokerAddress, **settings: Any) -> MqttBridge:
            service = make_service()
            bridge = MqttBridge(service, MqttSettings(device="secure", keepalive_s=5, **settings), address)
            service.start()
            bridge.start()
            stack.callback(lambda: (service.stop(), bridge.stop()))
            return bridge

        yield make


def test_a_broker_is_trusted_by_its_ca(start_broker: Foreign, make_bridge: Any, authority: Authority) -> None:
    bridge = make_bridge(start_broker(), tls_ca=authority.cert)
    wait_until(lambda: bridge.connected)
    link = bridge._connection._client.socket()
    assert link.version() in {"TLSv1.2", "TLSv1.3"}


def test_a_broker_that_asks_for_a_certificate_gets_the_devices(
    start_broker: Foreign, make_bridge: Any, authority: Authority
) -> None:
    own = authority.issue("edge-7")
    address = start_broker("require_certificate true", "use_identity_as_username true")
    bridge = make_bridge(address, tls_ca=authority.cert, tls_cert=own.cert, tls_key=own.key, pool="on")
    wait_until(lambda: bridge.connected and bridge.pool_member)


SELF_SIGNED = "is not trusted: self-signed certificate in certificate chain (set mqtt.tls_ca"
REFUSALS = {
    "system's CAs": SELF_SIGNED,
    "strange CA": SELF_SIGNED,
    "wrong name": "is for another name: IP address mismatch",
    "no certificate": "the broker asks for a certificate (set mqtt.tls_cert",
    "strange certificate": "the broker does not trust our certificate (set mqtt.tls_cert",
}


@pytest.fixture(params=REFUSALS)
def refused(
    request: pytest.FixtureRequest, start_broker: Foreign, make_bridge: Any, authority: Authority, stranger: Authority
) -> Callable[[], tuple[MqttBridge, str]]:
    """What starts a device that the handshake fails for, and the reason that it has to tell."""
    case: str = request.param
    settings: dict[str, Any] = {} if case == "system's CAs" else {"tls_ca": authority.cert}
    address = start_broker(*(["require_certificate true"] if case.endswith("certificate") else []))
    match case:
        case "strange CA":
            settings["tls_ca"] = stranger.cert
        case "wrong name":
            address = BrokerAddress("127.0.0.1", address.port, tls=True)
        case "strange certificate":
            strange = stranger.issue("edge-7")
            settings |= {"tls_cert": strange.cert, "tls_key": strange.key}
    return lambda: (make_bridge(address, **settings), REFUSALS[case])


def test_a_refused_handshake_is_told_once_with_what_to_do(
    refused: Callable[[], tuple[MqttBridge, str]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "edge.mqtt.connection"):
        bridge, reason = refused()
        wait_until(lambda: "trying again" in caplog.text)
        link = bridge._connection
        for _ in range(2):
            link._last_reason = ""
            wait_until(lambda: link._last_reason)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1, "once for all attempts"
    assert reason in lines[0]
    assert not bridge.connected


def test_why_a_broker_has_closed_is_read_before_a_failed_write_is_told(authority: Authority, server: Pair) -> None:
    """Without this a refusal of TLS 1.3, which follows the handshake, is lost where our first packet comes too late."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=os.fspath(authority.cert))
    context.load_cert_chain(server.cert, server.key)
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            accepted, _ = listener.accept()
            with accepted, suppress(ssl.SSLError):
                context.wrap_socket(accepted, server_side=True)

        broker = threading.Thread(target=refuse)
        broker.start()
        plain = socket.create_connection(listener.getsockname(), timeout=10)
        ours = client_context(MqttSettings(device="x", tls_ca=authority.cert))
        with ours.wrap_socket(plain, server_hostname=NAME) as link:
            broker.join()
            with pytest.raises(ssl.SSLError) as caught:
                _send_until_it_fails(link)
    assert "asks for a certificate" in explain_alert(str(caught.value))


def _send_until_it_fails(link: ssl.SSLSocket) -> None:
    for _ in range(500):  # the first may still go out
        link.send(b"CONNECT")
        time.sleep(0.01)


@pytest.fixture(scope="module")
def own(authority: Authority) -> Pair:
    return authority.issue("own")


def test_files_that_cannot_be_used_are_told(tmp_path: Path, server: Pair, own: Pair) -> None:
    missing, text, locked = tmp_path / "missing.pem", tmp_path / "text.pem", tmp_path / "locked.key"
    text.write_text("no PEM\n")
    encrypt = ["openssl", "pkey", "-in", own.key, "-aes256", "-passout", "pass:x", "-out", locked]
    subprocess.run(encrypt, check=True, capture_output=True, timeout=60)
    for given, message in (
        ({"tls_ca": missing}, "missing.pem cannot be read: No such file"),
        ({"tls_ca": text}, "text.pem holds no certificate in PEM"),
        ({"tls_cert": missing, "tls_key": own.key}, "missing.pem cannot be read: No such file"),
        ({"tls_cert": text, "tls_key": own.key}, "are not a certificate and a key in PEM"),
        ({"tls_cert": own.cert, "tls_key": text}, "are not a certificate and a key in PEM"),
        ({"tls_cert": own.cert, "tls_key": server.key}, "does not belong to the certificate"),
        ({"tls_cert": own.cert, "tls_key": locked}, "is encrypted"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            client_context(MqttSettings(device="x", **given))
        assert caught.value.hint, message


def test_relative_names_are_systemds_credentials(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, authority: Authority, own: Pair
) -> None:
    for name, path in (("ca", authority.cert), ("cert", own.cert), ("key", own.key)):
        (tmp_path / name).write_bytes(path.read_bytes())
    (tmp_path / "password").write_text("open sesame\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    settings = MqttSettings(device="x", tls_ca=Path("ca"), tls_cert=Path("cert"), tls_key=Path("key"))
    context = client_context(settings)
    assert [dict(part[0] for part in ca["subject"]) for ca in context.get_ca_certs()] == [{"commonName": "plant"}]
    assert read_password(Path("password")) == "open sesame"
    with pytest.raises(ConfigError, match=r"other cannot be read"):
        client_context(settings.model_copy(update={"tls_ca": Path("other")}))


def test_nothing_turns_the_checks_off() -> None:
    context = client_context(MqttSettings(device="x"))
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert not [name for name in MqttSettings.model_fields if "insecure" in name or "verify" in name]
