"""HTTPS with certificates of `qwedge tls`: who trusts them, who is asked for one, and how they are renewed."""

import contextlib
import ipaddress
import re
import socket
import ssl
import stat
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509

from edge.cli import run
from edge.commands.ready import Endpoints
from edge.config import load_settings
from edge.errors import ConfigError
from edge.http import accepting, authority
from edge.http.access import Access
from edge.http.keys import KeyRing
from edge.http.tls import Certificates
from edge.settings.server import ServerSettings
from tests.serving import Served, wait_for

Serve = Callable[..., Served]
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA, a device certificate and one for the client hmi-1."""
    folder = tmp_path_factory.mktemp("tls") / "made"
    assert run(["tls", "init", "--folder", str(folder), "--host", "edge-7.plant.example", "--host", "192.0.2.7"]) == 0
    assert run(["tls", "client", "--folder", str(folder), "hmi-1"]) == 0
    return folder


def https(folder: Path, **more: Path) -> dict[str, Path]:
    return {"tls_cert": folder / "device.pem", "tls_key": folder / "device.key", **more}


def trusting(folder: Path, client: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    if client is not None:
        context.load_cert_chain(folder / f"client-{client}.pem", folder / f"client-{client}.key")
    return context


def serial(server: Served, context: ssl.SSLContext) -> str:
    with server.connect() as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
        certificate = sock.getpeercert()
        assert certificate is not None
        return str(certificate["serialNumber"])


def test_a_client_that_trusts_the_ca_checks_name_and_address(serve: Serve, made: Path) -> None:
    server = serve(**https(made))
    assert server.url.startswith("https://")
    with httpx.Client(verify=trusting(made), timeout=60) as client:
        for host in ("127.0.0.1", "localhost"):
            response = client.post(f"https://{host}:{server.port}/v1/chat/completions", json=CHAT)
            assert response.json()["choices"][0]["message"]["content"] == "You said: Hi"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{server.url}/health", timeout=60)


def test_streams_pass_through_tls(serve: Serve, made: Path) -> None:
    server = serve(**https(made))
    lines = server.client.post("/v1/chat/completions", json=CHAT | {"stream": True}).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_versions(serve: Serve, made: Path, version: ssl.TLSVersion) -> None:
    server = serve(**https(made))
    context = trusting(made)
    context.minimum_version = context.maximum_version = version
    assert serial(server, context)


def test_nothing_older_than_1_2(made: Path) -> None:
    context = Certificates(ServerSettings(**https(made))).context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_hsts_comes_with_tls_only(serve: Serve, made: Path) -> None:
    plain = serve(hsts_s=600).client.get("/health").headers
    assert "strict-transport-security" not in plain
    assert serve(hsts_s=600, **https(made)).client.get("/health").headers["strict-transport-security"] == "max-age=600"
    assert "strict-transport-security" not in serve(hsts_s=0, **https(made)).client.get("/health").headers


def test_a_client_without_a_certificate_stays_outside(serve: Serve, made: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    assert run(["tls", "init", "--folder", str(strange)]) == 0
    assert run(["tls", "client", "--folder", str(strange), "hmi-1"]) == 0
    server = serve(**https(made, tls_client_ca=made / "ca.pem"))
    with pytest.raises(httpx.TransportError):
        server.client.get("/health")
    context = trusting(made)
    context.load_cert_chain(strange / "client-hmi-1.pem", strange / "client-hmi-1.key")
    with pytest.raises(httpx.TransportError), httpx.Client(verify=context, timeout=60) as client:
        client.get(f"{server.url}/health")


def test_a_certificate_says_who_asks_and_a_key_of_its_name_what_he_may(
    serve: Serve, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = tmp_path / "keys.json"
    monkeypatch.setenv("QWEDGE_SERVER_KEYS_FILE", str(keys))
    settings = https(made, tls_client_ca=made / "ca.pem")
    access = Access(KeyRing(keys), ServerSettings(**settings), local=False)
    server = serve(app={"access": access}, **settings)
    caplog.set_level("INFO", "edge.http.guard")
    with httpx.Client(verify=trusting(made, "hmi-1"), base_url=server.url, timeout=60) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        wait_for(lambda: "key=hmi-1" in caplog.text)  # the answer is out before it is logged
        assert client.get("/metrics").status_code == 200
        assert client.delete("/v1/models/x").status_code == 403
        assert run(["http", "add-key", "hmi-1", "--scope", "manage"]) == 0
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 403
        assert client.delete("/v1/models/x").status_code == 405


def test_a_renewed_certificate_is_shown_without_dropping_connections(serve: Serve, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    folder.mkdir(mode=0o700)
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / file.name).chmod(0o600)
    server = serve(**https(folder, tls_client_ca=folder / "ca.pem"))
    context = trusting(folder, "hmi-1")
    with server.connect() as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as kept:
        before = serial(server, context)
        assert run(["tls", "renew", "--folder", str(folder), "--host", "later.example"]) == 0
        after = serial(server, context)
        assert after != before
        assert serial(server, context) == after
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert kept.recv(100).startswith(b"HTTP/1.1 200")
    assert {"edge-7.plant.example", "later.example", "192.0.2.7"} <= set(authority.names_of(folder / "device.pem"))
    # Without a name in the handshake, too, and clients are still asked for a certificate.
    nameless = trusting(folder)
    nameless.check_hostname = False
    assert not _answers(server, nameless)
    nameless.load_cert_chain(folder / "client-hmi-1.pem", folder / "client-hmi-1.key")
    assert _answers(server, nameless)


def test_half_a_renewal_changes_nothing(serve: Serve, made: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes((made / "device.pem").read_bytes())
    key.write_bytes((made / "device.key").read_bytes())
    server = serve(tls_cert=cert, tls_key=key)
    before = serial(server, trusting(made))
    key.write_bytes((made / "client-hmi-1.key").read_bytes())
    assert serial(server, trusting(made)) == before
    cert.unlink()
    assert serial(server, trusting(made)) == before


def test_a_certificate_that_ends_soon_is_told_of(
    made: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Certificates(ServerSettings(**https(made)))
    assert not caplog.records
    monkeypatch.setattr("edge.http.tls.WARN_BEFORE", timedelta(days=826))
    Certificates(ServerSettings(**https(made)))
    assert "qwedge tls renew" in caplog.text


def test_whoever_never_finishes_a_handshake_is_cut_off(
    serve: Serve, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "HANDSHAKE_S", 0.5)
    monkeypatch.setattr(accepting, "MAX_CONNECTIONS", 6)
    server = serve(**https(made))
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(server.connect()) for _ in range(8)]
        for sock in silent:
            sock.settimeout(5)
        since = time.monotonic()
        assert {sock.recv(1) for sock in silent} == {b""}
        assert time.monotonic() - since < 4
    wait_for(lambda: server.client.get("/health").status_code == 200)


def test_plain_http_on_the_port_of_https_is_closed(serve: Serve, made: Path) -> None:
    server = serve(**https(made))
    with server.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP/1.1 200" not in sock.recv(1000)
    assert server.client.get("/health").status_code == 200


def test_what_is_made(made: Path) -> None:
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in made.iterdir()}
    assert modes == {
        "ca.pem": 0o644,
        "device.pem": 0o644,
        "client-hmi-1.pem": 0o644,
        "ca.key": 0o600,
        "device.key": 0o600,
        "client-hmi-1.key": 0o600,
    }
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    ca, device = (x509.load_pem_x509_certificate((made / name).read_bytes()) for name in ("ca.pem", "device.pem"))
    device.verify_directly_issued_by(ca)
    assert (device.not_valid_after_utc - device.not_valid_before_utc).days == 825
    names = device.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    host = socket.gethostname().lower()
    assert {host, "localhost", "edge-7.plant.example"} <= set(names.get_values_for_type(x509.DNSName))
    assert {ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("192.0.2.7")} <= set(
        names.get_values_for_type(x509.IPAddress)
    )
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_the_strictest_check_of_python_takes_them(serve: Serve, made: Path) -> None:
    context = trusting(made)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    assert serial(serve(**https(made)), context)


def test_a_second_ca_is_not_made_by_mistake(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (made / "ca.key").read_bytes()
    assert run(["tls", "init", "--folder", str(made)]) == 2
    assert "renew" in capsys.readouterr().err
    assert (made / "ca.key").read_bytes() == before


def test_what_is_printed_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tls", "init", "--folder", str(tmp_path / "tls")]) == 0
    printed = capsys.readouterr().out
    lines = re.findall(r"^  (\[server\]|tls_\w+ = .*)$", printed, re.MULTILINE)
    (tmp_path / "qwedge.toml").write_text("\n".join(lines))
    settings = load_settings(tmp_path / "qwedge.toml")
    assert Certificates(settings.server)
    endpoints = Endpoints.of(settings, ("127.0.0.1", 8443), None)
    assert endpoints.http == "https://127.0.0.1:8443"
    assert str(tmp_path / "tls" / "ca.pem") in endpoints.login


@pytest.mark.parametrize("args", [["renew"], ["client", "x"], ["init", "--host", "no name"], ["init", "--host", "-"]])
def test_mistakes_make_nothing(args: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    assert run(["tls", *args, "--folder", str(folder)]) == 2
    assert not folder.exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tls_cert": "device.pem", "tls_key": "client-hmi-1.key"}, "does not belong"),
        ({"tls_cert": "device.pem", "tls_key": "missing"}, "cannot be read"),
        ({"tls_cert": "device.key", "tls_key": "device.pem"}, "not a certificate and a key"),
        ({"tls_cert": "device.pem", "tls_key": "device.key", "tls_client_ca": "ca.key"}, "no certificate"),
    ],
)
def test_files_that_do_not_fit_end_the_start(made: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        Certificates(ServerSettings(**{name: made / value for name, value in settings.items()}))
    assert "server.tls_" in caught.value.hint or "BEGIN" in caught.value.hint


def _answers(server: Served, context: ssl.SSLContext) -> bool:
    """Whether a client that does not name the server gets an answer."""
    try:
        with server.connect() as plain, context.wrap_socket(plain) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return sock.recv(12) == b"HTTP/1.1 200"
    except OSError:
        return False
