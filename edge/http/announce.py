"""Announces the server on the local network: DNS-SD over multicast DNS (RFC 6762, RFC 6763), as ``_qwedge._tcp``.

The network may be down when the server starts, and change while it serves: addresses are looked at now and then, and
the announcement is made anew where they differ. Whatever multicast DNS does, the server goes on.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil

if TYPE_CHECKING:  # it takes a while to import, and most servers announce nothing
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

log = logging.getLogger(__name__)

SERVICE_TYPE: Final = "_qwedge._tcp.local."
LOOK_S = 15.0
"""Seconds between two looks at the addresses."""
WITHDRAW_S: Final = 2.0
"""Seconds for saying goodbye when the server stops."""
PAUSE_S = 5.0
"""Seconds, at most and at random, until devices that have told one name look for free ones again."""
_SAME_NAME: Final = 9
"""Devices of one name that are told apart."""
_MAX_LABEL: Final = 56
"""Bytes of the name that a device is announced by; with ``qwedge-`` before it, it is a label of a host's name."""
_MAX_TXT: Final = 255
"""Bytes of one ``key=value``."""


@dataclass(frozen=True)
class Announcement:
    """What is told."""

    device: str
    """The instance's name: what people see in a list."""
    port: int
    properties: Mapping[str, str]
    """TXT records."""

    def info(self, number: int, addresses: tuple[str, ...]) -> AsyncServiceInfo:
        """As zeroconf takes it, of the first device of this name, or the second, third and so on."""
        from zeroconf.asyncio import AsyncServiceInfo  # noqa: PLC0415 - see above

        return AsyncServiceInfo(
            SERVICE_TYPE,
            f"{_label(self.device, number)}.{SERVICE_TYPE}",
            port=self.port,
            server=f"{host_name(self.device, number)}.",
            parsed_addresses=list(addresses),
            properties={key: value[: _MAX_TXT - len(key) - 1] for key, value in self.properties.items()},
        )


def host_name(device: str, number: int = 1) -> str:
    """The host name that goes with the announcement of the first device of a name, or the second, third and so on.

    It is not the machine's own: who answers for that one (Avahi, systemd-resolved) would see a conflict where the
    addresses differ, and give the machine another name.
    """
    return f"qwedge-{_label(device, number)}.local".lower()


def host_names(device: str) -> tuple[str, ...]:
    """All host names that a device may be announced by."""
    return tuple(host_name(device, number) for number in _numbers())


def _numbers() -> range:
    return range(1, _SAME_NAME + 1)


def _label(device: str, number: int) -> str:
    suffix = "" if number == 1 else f"-{number}"
    return device.replace(".", "-")[: _MAX_LABEL - len(suffix)] + suffix


class Announcer:
    """Keeps an announcement in step with the network.

    Args:
        describe: what is to be told now.
        addresses: the addresses under which the server is reached now, in numbers.
    """

    def __init__(self, describe: Callable[[], Announcement], addresses: Callable[[], tuple[str, ...]]) -> None:
        self._describe = describe
        self._addresses = addresses
        self._announced: tuple[Announcement, tuple[str, ...]] | None = None
        self._zeroconf: AsyncZeroconf | None = None
        self._info: AsyncServiceInfo | None = None
        self._failing = False

    async def run(self) -> None:
        """Announce until cancelled; says goodbye then."""
        try:
            while True:
                await self._look()
                await asyncio.sleep(LOOK_S)
        finally:
            await self._withdraw()

    async def _look(self) -> None:
        announcement, addresses = self._describe(), self._addresses()
        is_shared = self._is_shared()
        if (announcement, addresses) == self._announced and not is_shared:
            return
        await self._withdraw()
        if is_shared:
            log.warning("another device is called %s too; looking for a free name", announcement.device)
            await asyncio.sleep(random.uniform(0, PAUSE_S))  # noqa: S311 - no secret
        if not addresses:
            return
        try:
            await self._announce(announcement, addresses)
        except Exception as error:  # noqa: BLE001 - sockets, name conflicts and timeouts alike: serving goes on
            await self._withdraw()
            if not self._failing:
                log.warning("the server cannot be announced on the network: %s", error or type(error).__name__)
            self._failing = True
        else:
            self._announced, self._failing = (announcement, addresses), False
            log.info("announced as %s on %s", self._info.get_name() if self._info else "", ", ".join(addresses))

    async def _announce(self, announcement: Announcement, addresses: tuple[str, ...]) -> None:
        from zeroconf import IPVersion, NonUniqueNameException  # noqa: PLC0415 - see above
        from zeroconf.asyncio import AsyncZeroconf  # noqa: PLC0415

        for address in addresses:
            _check_present(address)
        has_v6 = any(":" in address for address in addresses)
        version = IPVersion.All if has_v6 else IPVersion.V4Only
        self._zeroconf = AsyncZeroconf(interfaces=list(addresses), ip_version=version)
        # Zeroconf itself would number the name alone; the host name would then stand for the addresses of all of them.
        for number in _numbers():
            info = announcement.info(number, addresses)
            with suppress(NonUniqueNameException):
                await (await self._zeroconf.async_register_service(info))
                self._info = info
                return
        raise OSError(f"{_SAME_NAME} devices are called {announcement.device}; name this one by mqtt.device")

    def _is_shared(self) -> bool:
        """Whether another device has told the same name, as those do that have looked for it at once.

        What was heard of a name that is this device's own is compared with what it told (RFC 6762, section 9).
        """
        if self._zeroconf is None or self._info is None:
            return False
        from zeroconf import current_time_millis  # noqa: PLC0415 - see above

        told = {self._info.dns_service(), *self._info.dns_addresses()}
        names, types = {record.name for record in told}, {record.type for record in told}
        cache, now = self._zeroconf.zeroconf.cache, current_time_millis()
        heard = (record for name in names for record in cache.entries_with_name(name) if not record.is_expired(now))
        return any(record.type in types and record not in told for record in heard)

    async def _withdraw(self) -> None:
        zeroconf, self._zeroconf = self._zeroconf, None
        self._announced = self._info = None
        if zeroconf is None:
            return
        try:
            async with asyncio.timeout(WITHDRAW_S):
                await zeroconf.async_unregister_all_services()
                await zeroconf.async_close()
        except Exception as error:  # noqa: BLE001 - the network is gone, as like as not
            log.debug("the announcement could not be withdrawn: %s", error)


def reachable_addresses(host: str) -> tuple[str, ...]:
    """The addresses, in numbers, under which a server that listens on ``host`` is reached from the network.

    Args:
        host: an address of this machine, one that stands for all, or a name.
    """
    own = {address.address for interface in psutil.net_if_addrs().values() for address in interface}
    usable = sorted(address for address in own if _is_announced(address))
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
        return tuple(address for address in usable if host == "::" or ":" not in address)
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return ()
    return tuple(address for address in usable if address in found)


def _check_present(address: str) -> None:
    """Zeroconf leaks a socket where an address has gone meanwhile.

    Raises:
        OSError: it has.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 0))


def _is_announced(text: str) -> bool:
    """A cable between two devices has link-local addresses alone; those of IPv6 need a zone, which no record holds."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # a hardware address, or one with a zone
        return False
    return not address.is_loopback and not (address.version == 6 and address.is_link_local)
