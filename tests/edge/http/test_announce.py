"""The announcement over real multicast DNS, on loopback: found, changed with the network, and withdrawn."""

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from zeroconf import IPVersion
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from edge.http import announce
from edge.http.announce import SERVICE_TYPE, Announcement, Announcer, host_name, host_names, reachable_addresses

FOREIGN = "192.0.2.250"  # not of this machine: no socket can be bound to it
PROPERTIES = {"model": "fake-0.1b", "version": "0.1.0", "path": "/v1", "tls": "0", "long": "x" * 400}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announce, "LOOK_S", 0.2)
    monkeypatch.setattr(announce, "PAUSE_S", 2.0)


async def find(device: str) -> AsyncServiceInfo | None:
    """Ask the network for a device, as a client does that remembers nothing."""
    async with AsyncZeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only) as zeroconf:
        return await zeroconf.async_get_service_info(SERVICE_TYPE, f"{device}.{SERVICE_TYPE}", timeout=1500)


async def until_found(device: str) -> AsyncServiceInfo:
    async with asyncio.timeout(20):
        while (info := await find(device)) is None:
            pass
    return info


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_it_is_found_and_withdrawn() -> None:
    async def scenario() -> None:
        told = Announcement("test-one", 8080, PROPERTIES)
        announcer = Announcer(lambda: told, lambda: ("127.0.0.1",))
        task = asyncio.create_task(announcer.run())
        info = await until_found("test-one")
        assert (info.port, info.parsed_addresses()) == (8080, ["127.0.0.1"])
        assert info.server == "qwedge-test-one.local."
        seen = {key.decode(): (value or b"").decode() for key, value in info.properties.items()}
        assert {key: seen[key] for key in ("model", "version", "path", "tls")} == {
            key: PROPERTIES[key] for key in ("model", "version", "path", "tls")
        }
        assert len(seen["long"]) == 255 - len("long=")
        told = Announcement("test-one", 8080, {"model": "another"})  # the server has switched
        async with asyncio.timeout(20):
            while (info := await find("test-one")) is None or info.properties != {b"model": b"another"}:
                pass
        await stop(task)
        assert await find("test-one") is None

    run(scenario())


def test_it_follows_the_network(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        addresses: tuple[str, ...] = ()  # the network is down
        announcer = Announcer(lambda: Announcement("test-two", 8080, PROPERTIES), lambda: addresses)
        task = asyncio.create_task(announcer.run())
        await asyncio.sleep(0.5)
        assert await find("test-two") is None
        addresses = (FOREIGN,)  # it is there, and gone before it could be used
        await asyncio.sleep(0.7)
        assert not task.done()
        addresses = ("127.0.0.1",)
        await until_found("test-two")
        addresses = ()
        async with asyncio.timeout(20):
            while await find("test-two") is not None:
                pass
        await stop(task)

    run(scenario())
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


async def both_are_told_apart(device: str, pause: float) -> None:
    """Two devices of one name, the second later by some seconds."""
    first, second = (
        Announcer(partial(Announcement, device, port, {}), lambda: ("127.0.0.1",)) for port in (8080, 8081)
    )
    tasks = [asyncio.create_task(first.run())]
    await asyncio.sleep(pause)
    tasks.append(asyncio.create_task(second.run()))
    async with asyncio.timeout(30):
        while {info.port for info in (await until_found(device), await until_found(f"{device}-2"))} != {8080, 8081}:
            pass
    for name in (device, f"{device}-2"):
        assert (await until_found(name)).server == f"qwedge-{name}.local."
    await asyncio.gather(*map(stop, tasks))


def test_a_name_that_is_taken_gets_a_number() -> None:
    run(both_are_told_apart("test-three", pause=2))


def test_devices_that_start_at_once_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both ask for the name before either has told it, and both tell it."""
    monkeypatch.setattr("zeroconf._core._PROBE_RANDOM_DELAY_INTERVAL", (200, 200))
    caplog.set_level("INFO", "edge.http.announce")
    run(both_are_told_apart("test-four", pause=0))
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("announced")]
    assert told[:2] == ["announced as test-four on 127.0.0.1"] * 2  # else the test shows nothing


def test_a_name_that_too_many_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(announce, "_SAME_NAME", 1)

    async def scenario() -> None:
        tasks = []
        for port in (8080, 8081):
            announcer = Announcer(partial(Announcement, "test-five", port, {}), lambda: ("127.0.0.1",))
            tasks.append(asyncio.create_task(announcer.run()))
            await until_found("test-five")
        async with asyncio.timeout(20):
            while "name this one by mqtt.device" not in caplog.text:
                await find("test-five-2")  # takes a while
        assert (await until_found("test-five")).port == 8080
        await asyncio.gather(*map(stop, tasks))

    run(scenario())


def test_on_loopback_there_is_nothing_to_announce() -> None:
    assert reachable_addresses("127.0.0.1") == ()
    assert reachable_addresses("localhost") == ()
    assert reachable_addresses("name.invalid") == ()
    assert not [address for address in reachable_addresses("::") if address.startswith(("127.", "::1", "fe80"))]
    assert not [address for address in reachable_addresses("0.0.0.0") if ":" in address]


def test_the_host_name_is_a_label_of_its_own() -> None:
    assert host_name("Edge-7") == "qwedge-edge-7.local"
    assert host_name("a.b") == "qwedge-a-b.local"
    assert len(host_name("x" * 64).partition(".")[0]) <= 63
    assert host_name("Edge-7", 2) == "qwedge-edge-7-2.local"
    assert len({name[:63] for name in host_names("x" * 64)}) == 9
