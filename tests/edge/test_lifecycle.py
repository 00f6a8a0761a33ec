"""What is told to systemd, on a socket like systemd's."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.lifecycle import Notifier


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        yield sock


def heard(systemd: socket.socket) -> str:
    return systemd.recv(4096).decode()


def waiting(systemd: socket.socket) -> int:
    """Messages that lie there, which are taken."""
    systemd.setblocking(False)
    count = 0
    try:
        while systemd.recv(4096):
            count += 1
    except BlockingIOError:
        return count
    return count


def test_states_are_told_in_systemds_words(systemd: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": systemd.getsockname()})
    notifier.status("loading")
    notifier.ready("tiny at http://127.0.0.1:1")
    notifier.reloading()
    notifier.stopping()
    assert heard(systemd) == "STATUS=loading"
    assert heard(systemd) == "READY=1\nSTATUS=tiny at http://127.0.0.1:1"
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+\nSTATUS=beginning anew", heard(systemd))
    assert heard(systemd).startswith("STOPPING=1\n")


def test_an_abstract_socket_is_found() -> None:
    name = f"qwedge-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        sock.settimeout(10)
        Notifier({"NOTIFY_SOCKET": f"@{name}"}).status("here")
        assert heard(sock) == "STATUS=here"


def test_the_watchdog_is_fed_while_there_is_progress_only(
    systemd: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    alive = True
    env = {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "40000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier(env)
    notifier.watch(lambda: alive)
    assert [heard(systemd) for _ in range(3)] == ["WATCHDOG=1"] * 3
    alive = False
    while "makes no progress" not in caplog.text:
        time.sleep(0.01)
    fed = waiting(systemd)
    time.sleep(0.2)
    notifier.close()
    assert (fed, waiting(systemd)) == (fed, 0)
    assert caplog.text.count("makes no progress") == 1


@pytest.mark.parametrize("change", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}])
def test_a_watchdog_that_is_not_ours_is_not_fed(systemd: socket.socket, change: dict[str, str]) -> None:
    env = {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "20000", **change}
    notifier = Notifier(env)
    notifier.watch(lambda: True)
    systemd.settimeout(0.1)
    with pytest.raises(TimeoutError):
        heard(systemd)
    notifier.close()


def test_without_systemd_nothing_happens(tmp_path: Path) -> None:
    for env in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "20000"}):
        notifier = Notifier(env)
        notifier.watch(lambda: True)
        notifier.ready("x")
        notifier.close()
