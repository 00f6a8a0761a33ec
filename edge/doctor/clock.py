"""The clock, and the certificates that are good from one day to another."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from edge.config import Settings
from edge.doctor.check import UNSEEN_HINT, Check, unseen
from edge.settings.secret_files import find_secret

MADE_AFTER: Final = datetime(2026, 1, 1, tzinfo=UTC)
"""Before this version was made: a clock that says so was not set."""
WARN_BEFORE: Final = timedelta(days=30)
_TIMEX_BYTES: Final = 208
_STATUS_AT: Final = 40
_STA_UNSYNC: Final = 0x40
_RENEW: Final = "renew it: qwedge tls renew, or where it comes from"
_SET_IT: Final = "start a time service (systemd-timesyncd, chrony), or set it: timedatectl set-time"


def examine_clock(settings: Settings, now: datetime | None = None) -> list[Check]:
    """What there is to say about the clock and what depends on it."""
    now = now or datetime.now(UTC)
    return [_clock(now), *(_certificate(certificate, now) for certificate in _certificates(settings))]


def _clock(now: datetime) -> Check:
    detail = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now < MADE_AFTER:
        hint = f"{_SET_IT}; until then no TLS certificate is valid (requests and their deadlines do not depend on it)"
        return Check("clock", "warn", f"{detail}, which is before this version was made", hint)
    synchronised = is_synchronised()
    if synchronised is False:
        return Check("clock", "warn", f"{detail}, not synchronised", _SET_IT)
    return Check("clock", "ok", detail if synchronised is None else f"{detail}, synchronised")


def is_synchronised() -> bool | None:
    """Whether the kernel was told by a time service that the clock is right; None where it does not say [1].

    [1] https://man7.org/linux/man-pages/man2/adjtimex.2.html
    """
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    if ctypes.sizeof(ctypes.c_long) != 8 or ctypes.CDLL(None).adjtimex(timex) < 0:
        return None
    status = ctypes.c_int.from_buffer(timex, _STATUS_AT).value
    return not status & _STA_UNSYNC


@dataclass(frozen=True)
class _Named:
    setting: str
    path: Path


def _certificates(settings: Settings) -> Iterator[_Named]:
    server, mqtt = settings.server, settings.mqtt
    named = {
        "server.tls_cert": server.tls_cert,
        "server.tls_client_ca": server.tls_client_ca,
        "mqtt.tls_ca": mqtt.tls_ca,
        "mqtt.tls_cert": mqtt.tls_cert,
    }
    named |= {f"server.upstream {upstream.name} tls_ca": upstream.tls_ca for upstream in server.upstream}
    for setting, path in named.items():
        if path is not None:
            yield _Named(setting, path)


def _certificate(named: _Named, now: datetime) -> Check:
    """Whether all certificates of a file are good today; the server does not start with one that it cannot read."""
    if unseen(named.path):
        return Check("certificate", "warn", f"{named.setting}: {named.path} is the service's alone", UNSEEN_HINT)
    try:
        found = x509.load_pem_x509_certificates(find_secret(named.path).read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds no certificate in PEM"
        hint = f"{named.setting} names a file of certificates, for the user that qwedge runs as to read"
        return Check("certificate", "fail", f"{named.setting}: {named.path} cannot be used: {reason}", hint)
    begins = max(certificate.not_valid_before_utc for certificate in found)
    ends = min(certificate.not_valid_after_utc for certificate in found)
    detail = f"{named.setting}: {begins.date()} to {ends.date()}"
    if now < begins:
        return Check("certificate", "warn", f"{detail}, not valid yet", f"is the clock right? {_SET_IT}")
    if now > ends:
        return Check("certificate", "warn", f"{detail}, expired", _RENEW)
    if now > ends - WARN_BEFORE:
        return Check("certificate", "warn", f"{detail}, soon over", _RENEW)
    return Check("certificate", "ok", detail)
