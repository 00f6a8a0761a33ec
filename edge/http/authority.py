"""A small certificate authority for one device or one plant: ``qwedge tls init``, ``renew`` and ``client``.

The CA's key stays in a folder of mode 0700, in a file of mode 0600, and signs nothing but what these commands make
(basic constraints: no further CA below it). Keys are P-256, which everything that speaks TLS 1.2 knows.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge.errors import ConfigError
from edge.http.announce import host_name
from edge.http.private_file import make_folder, read_private, write_file, writing

CA_DAYS: Final = 3650
DEVICE_DAYS: Final = 825
"""The longest that browsers and telephones take: https://support.apple.com/103769."""
_BACKDATED: Final = dt.timedelta(hours=1)
"""For clients whose clock is a little behind."""
_CLOCK_SET_AFTER: Final = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
_SERVER: Final = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
_CLIENT: Final = (ExtendedKeyUsageOID.CLIENT_AUTH,)


@dataclass(frozen=True)
class Files:
    """Where everything lies."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The CA's certificate, which clients trust."""
        return self.folder / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """The CA's key, which stays here."""
        return self.folder / "ca.key"

    def certificate(self, name: str) -> Path:
        """A certificate: ``device``, or ``client-NAME``."""
        return self.folder / f"{name}.pem"

    def key(self, name: str) -> Path:
        """Its key."""
        return self.folder / f"{name}.key"


def init(folder: Path, names: Sequence[str]) -> Files:
    """Make a CA and the device's certificate.

    Args:
        folder: made where it is missing.
        names: further host names and IP addresses that clients use for this device.

    Raises:
        ConfigError: they are there already, a name is none, or the folder cannot be written.
    """
    files = Files(folder)
    if files.ca_key.exists():
        raise ConfigError(f"there is a CA in {folder} already", hint="qwedge tls renew makes a new device certificate")
    alternatives = _alternatives([*own_names(), *names])
    _check_clock()
    with writing(folder):
        make_folder(folder)
        key = ec.generate_private_key(ec.SECP256R1())
        _write(files.ca, files.ca_key, _ca_certificate(key), key)
        _issue(files, "device", socket.gethostname(), _SERVER, alternatives)
    return files


def renew(folder: Path, names: Sequence[str]) -> Files:
    """Make a new certificate and key for the device; it keeps the names of the last one.

    Raises:
        ConfigError: there is no CA, or as :func:`init`.
    """
    files = Files(folder)
    _check_clock()
    with writing(folder):
        kept = names_of(files.certificate("device")) if files.certificate("device").exists() else []
        _issue(files, "device", socket.gethostname(), _SERVER, _alternatives([*own_names(), *kept, *names]))
    return files


def add_client(folder: Path, name: str) -> Files:
    """Make a certificate that says who a client is.

    Raises:
        ConfigError: there is no CA, or as :func:`init`.
    """
    files = Files(folder)
    _check_clock()
    with writing(folder):
        _issue(files, f"client-{name}", name, _CLIENT, [])
    return files


def own_names() -> list[str]:
    """What this device is called: its name, the same with ``.local``, the announced one, and its addresses now."""
    name = socket.gethostname()
    found = [address.address for interface in psutil.net_if_addrs().values() for address in interface]
    addresses = [text for text in found if _is_usable(text)]
    local = [] if "." in name else [f"{name}.local"]
    return [name, *local, host_name(name), "localhost", "127.0.0.1", "::1", *addresses]


def names_of(certificate: Path) -> list[str]:
    """The names and addresses in a certificate.

    Raises:
        ConfigError: it is none.
        OSError: it cannot be read.
    """
    try:
        loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
        extension = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, x509.ExtensionNotFound):
        hint = f"remove it and run qwedge tls renew; the CA in {certificate.parent} stays"
        raise ConfigError(f"{certificate} is no certificate of a device", hint=hint) from None
    return [str(name.value) for name in extension.value]


def _is_usable(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # a hardware address, or one with a zone
        return False
    return not address.is_link_local


def _alternatives(names: Iterable[str]) -> list[x509.GeneralName]:
    return [_general_name(name) for name in dict.fromkeys(name.lower() for name in names)]


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    labels = text.split(".")
    plain = all(label and label.isascii() and label.replace("-", "").replace("_", "").isalnum() for label in labels)
    if not plain or len(text) > 253:
        raise ConfigError(f"{text!r} is no host name and no IP address", hint="write it as edge-7.local or 192.0.2.7")
    return x509.DNSName(text)


def _ca_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = _name(f"qwedge CA of {socket.gethostname()}"[:64])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = _builder(name, name, key.public_key(), key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())


def _issue(
    files: Files,
    file_name: str,
    subject: str,
    usages: Sequence[x509.ObjectIdentifier],
    alternatives: Sequence[x509.GeneralName],
) -> None:
    """Make a key and have the CA sign its certificate; the certificate comes last, as it is what a server looks at."""
    ca, ca_key = _load_ca(files)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(subject[:64]), ca.subject, key.public_key(), ca_key.public_key(), DEVICE_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    certificate = builder.sign(ca_key, hashes.SHA256())
    _write(files.certificate(file_name), files.key(file_name), certificate, key)


def _load_ca(files: Files) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    if not files.ca_key.exists():
        raise ConfigError(f"there is no CA in {files.folder}", hint="qwedge tls init makes one")
    try:
        certificate = x509.load_pem_x509_certificate(files.ca.read_bytes())
        key = load_pem_private_key(read_private(files.ca_key), password=None)
    except (ValueError, TypeError):
        hint = "put it back from a backup, or remove the folder and begin anew"
        raise ConfigError(f"the CA in {files.folder} is damaged", hint=hint) from None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return certificate, key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now - _BACKDATED + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _write(path: Path, key_path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    write_file(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    write_file(path, certificate.public_bytes(Encoding.PEM), mode=0o644)


def _check_clock() -> None:
    if dt.datetime.now(dt.UTC) < _CLOCK_SET_AFTER:
        hint = "set it first: a certificate names the days from which and to which it is good"
        raise ConfigError("this device's clock is not set", hint=hint)
