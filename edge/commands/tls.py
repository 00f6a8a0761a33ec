"""``qwedge tls``: a certificate authority of the device's own, and what it signs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge.commands import options
from edge.errors import ConfigError
from edge.settings.folders import tls_folder

if TYPE_CHECKING:  # this brings cryptography, which `qwedge --help` does without
    from edge.http.authority import Files

Host = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="NAME", help="A further name or IP address of this device; may be repeated."),
]
Folder = Annotated[
    Path | None,
    typer.Option("--folder", metavar="DIR", help="Where CA, certificates and keys lie [default: the state folder]."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(name="tls", no_args_is_help=True)
    group.callback()(_group)
    group.command("init")(init)
    group.command("renew")(renew)
    group.command("client")(client)
    app.add_typer(group)


def _group() -> None:
    """Make certificates for HTTPS, and for MQTT with TLS, without a CA of the plant's."""


def init(*, host: Host = None, folder: Folder = None) -> None:
    """Make a certificate authority for this device, and a certificate for the server.

    The certificate names this host, the same with .local, its present IP addresses and what --host adds, and is good
    for 825 days. The CA's key does not leave the folder. Prints the settings, and how clients come to trust the CA.
    """
    from edge.http import authority

    files = authority.init(_folder(folder), host or [])
    _show_names(files)
    print(_settings(files))
    print(_trust(files))


def renew(*, host: Host = None, folder: Folder = None) -> None:
    """Make a new certificate for the server, for the names of the last one; the CA stays, and so does clients' trust.

    A running server shows the new one to whoever connects next.
    """
    from edge.http import authority

    _show_names(authority.renew(_folder(folder), host or []))


def client(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The client's name, which the certificate stands for.")],
    *,
    folder: Folder = None,
) -> None:
    """Make a certificate that a client shows, for servers with server.tls_client_ca or mqtt.tls_ca."""
    from edge.http import authority

    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ConfigError(f"{name!r} is no name of a client", hint="use 1 to 64 letters, digits, '.', '_' and '-'")
    files = authority.add_client(_folder(folder), name)
    own = f"client-{name}"
    options.note(f"made a certificate for {name}; give the client these two files, and {files.ca}")
    print(files.certificate(own))
    print(files.key(own))


def _folder(given: Path | None) -> Path:
    return (given.expanduser() if given is not None else tls_folder(os.environ)).absolute()


def _show_names(files: Files) -> None:
    from edge.http.authority import DEVICE_DAYS, names_of

    certificate = files.certificate("device")
    options.note(f"{certificate} is good for {DEVICE_DAYS} days and for {', '.join(names_of(certificate))}")


def _settings(files: Files) -> str:
    return f"""\
In the settings file (the MQTT broker takes the same two, as mqtt.tls_cert and mqtt.tls_key):

  [server]
  tls_cert = "{files.certificate("device")}"
  tls_key = "{files.key("device")}"
"""


def _trust(files: Files) -> str:
    return f"""\
Clients need {files.ca}, and nothing else of the folder:

  curl             curl --cacert ca.pem https://NAME:8080/health
  Python           SSL_CERT_FILE=ca.pem; httpx and OpenAI's client take verify="ca.pem" too
  Node.js          NODE_EXTRA_CA_CERTS=ca.pem
  Debian, Ubuntu   sudo cp ca.pem /usr/local/share/ca-certificates/qwedge.crt && sudo update-ca-certificates
  Firefox          Settings, Certificates, View Certificates, Authorities, Import
  Chrome, Edge     the system's certificates; on Windows: certutil -addstore Root ca.pem
  Android          Settings, Security, Encryption and credentials, Install a certificate, CA certificate
  iPadOS, iOS      send the file to the device, install the profile, then Settings, General, About,
                   Certificate Trust Settings: switch it on
"""
