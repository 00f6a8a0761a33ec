"""What `qwedge serve` prints when it is ready: where it answers, and examples that work as printed."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from edge.config import Settings
from edge.settings.folders import broker_folder, keys_file
from edge.settings.mqtt import BrokerAddress, MqttSettings
from edge.settings.secret_files import find_secret
from edge.settings.server import ServerSettings

if TYPE_CHECKING:  # this brings onnxruntime
    from edge.service import Service

EXAMPLE_PROMPT: Final = "Write a haiku about a small computer."


@dataclass(frozen=True)
class Endpoints:
    """Where clients on this machine reach the server."""

    http: str
    """``http://127.0.0.1:8080``."""
    login: str
    """Options of curl that let it in."""
    broker: BrokerAddress | None

    @classmethod
    def of(cls, settings: Settings, address: tuple[str, int], broker: BrokerAddress | None) -> Endpoints:
        """From what was bound; an address that stands for all becomes loopback's."""
        scheme = "http" if settings.server.tls_cert is None else "https"
        host, port = settings.server.host.strip("[]"), address[1]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        return cls(url, _http_login(settings.server), broker)


def ready_text(settings: Settings, endpoints: Endpoints, service: Service) -> str:
    """The ready line, and examples that work as printed."""
    manifest, broker = service.model.manifest, endpoints.broker
    urls = [endpoints.http]
    if broker is not None:
        urls.append(f"mqtt{'s' if broker.tls else ''}://{broker.host}:{broker.port}")
    parts = [f"ready: {manifest.name} at {' and '.join(urls)}", _http_example(endpoints)]
    if broker is not None:
        parts.append(_mqtt_examples(settings.mqtt, broker))
    return "\n\n".join(parts) + "\n"


def _http_example(endpoints: Endpoints) -> str:
    return (
        f"  curl{endpoints.login} {endpoints.http}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"""    -d '{{"messages": [{{"role": "user", "content": "{EXAMPLE_PROMPT}"}}], "max_tokens": 64}}'"""
    )


def _http_login(settings: ServerSettings) -> str:
    """The options of curl for our certificate, where `qwedge tls` made it, for the client's, and for a key."""
    login = ""
    if settings.tls_cert is not None and (ca := find_secret(settings.tls_cert).with_name("ca.pem")).exists():
        login += f" --cacert {shlex.quote(str(ca))}"
    if settings.tls_client_ca is not None:
        login += " --cert CLIENT.pem --key CLIENT.key"
    elif keys_file(settings, os.environ).exists() and settings.open == "off":
        login += " -H 'Authorization: Bearer KEY'"
    return login


def _mqtt_examples(settings: MqttSettings, broker: BrokerAddress) -> str:
    login, client = _mqtt_login(settings, broker)
    request = f"{settings.root}/v1/dev/{settings.device}/req/{client}"
    return (
        f"  mosquitto_sub {login} -v -t '{settings.root}/v1/res/{client}/+/done'    # in a second terminal\n"
        f'  mosquitto_pub {login} -q 1 -t "{request}/$(date +%s)" \\\n'
        f"""    -m '{{"v": 1, "body": {{"messages": [{{"role": "user", "content": "{EXAMPLE_PROMPT}"}}]}}}}'"""
    )


def _mqtt_login(settings: MqttSettings, broker: BrokerAddress) -> tuple[str, str]:
    """The options of mosquitto's clients for a broker, and the name of the client in topics."""
    login = f"-h {broker.host} -p {broker.port}"
    if settings.address is None:
        known = _broker_client(settings)
        return (f"{login} -u {known} -P PASSWORD", known) if known is not None else (login, "me")
    if broker.tls:
        files = {"--cafile": settings.tls_ca, "--cert": settings.tls_cert, "--key": settings.tls_key}
        given = [f"{option} {shlex.quote(str(path))}" for option, path in files.items() if path is not None]
        login = " ".join([login, *([] if settings.tls_ca else ["--tls-use-os-certs"]), *given])
    if settings.username is not None:
        login += f" -u {shlex.quote(settings.username)}"
    if settings.password_file is not None:
        login += f' -P "$(head -n 1 {shlex.quote(str(settings.password_file))})"'
    return login, "me"


def _broker_client(settings: MqttSettings) -> str | None:
    """A client of the embedded broker to show examples with; None where it lets in anybody on this device."""
    from edge.mqtt.broker_clients import load_clients
    from edge.mqtt.broker_setup import clients_folder

    clients = load_clients(clients_folder(broker_folder(settings, os.environ)))
    if clients is None and settings.tls_cert is None:
        return None
    return clients[0].name if clients else "NAME"
