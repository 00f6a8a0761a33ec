"""The sandbox of code that models write: real programs that try real things."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.evaluation.sandbox import Limits, run

LIMITS = Limits(cpu_s=1.0, memory_mb=256)


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "import math, re, collections, itertools, typing, functools, heapq, string, datetime, decimal, fractions, json",
        "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()",
        "print('some output')",
        "if __name__ == '__main__':\n    pass",
    ],
)
def test_honest_programs_pass(program: str) -> None:
    assert run(program, LIMITS).reason == "runs"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'one is not two'", "AssertionError: one is not two"),
        ("def broken(:", "SyntaxError"),
        ("while True: pass", "more time"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "status 0"),
        ("import ctypes; ctypes.string_at(0)", "status -11"),
        ("input()", "EOFError"),
        ("import os\nwhile True: os.write(1, b'x' * 4096)", "wrote more"),
        ("import os; os.close(1)\nwhile True: pass", "more time"),
        ("print('\\ud800')", "UnicodeEncodeError"),
        ("x = '\0'", "ValueError|SyntaxError"),
    ],
)
def test_others_do_not(program: str, reason: str) -> None:
    outcome = run(program, LIMITS)
    assert not outcome.passed
    assert any(part in outcome.reason for part in reason.split("|")), outcome


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.socket()",
        "import socket; socket.socketpair()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.kill(os.getpid(), 0)",
        "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
        "open('new.txt', 'w')",
        "open('/dev/null', 'w')",
        "import os; os.open('.', os.O_RDWR | os.O_TMPFILE)",
        "import os; os.mkdir('folder')",
        "import os; os.memfd_create('x')",
        "import os; os.chroot('/')",
        "import os; os.symlink('a', 'b')",
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import ctypes\nassert ctypes.CDLL(None).prctl(15, b'name', 0, 0, 0) == 0",
        "import ctypes\nassert ctypes.CDLL(None).syscall(425, 1, 0) >= 0",
    ],
)
def test_nothing_but_computing_is_allowed(program: str) -> None:
    outcome = run(program, LIMITS)
    assert not outcome.passed
    assert "not permitted" in outcome.reason or outcome.reason == "AssertionError", outcome


def test_files_of_the_user_stay_as_they_are(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("kept")
    for attempt in (
        "open({path!r}, 'a')",
        "open({path!r}, 'r+')",
        "import os; os.unlink({path!r})",
        "import os; os.rename({path!r}, 'x')",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.chmod({path!r}, 0)",
        "import os; os.utime({path!r})",
        "import os; os.link({path!r}, {path!r} + '2')",
    ):
        assert not run(attempt.format(path=str(precious)), LIMITS).passed, attempt
    assert precious.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_no_secret_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEDGE_SECRET", "s3cret")
    program = "import os\nassert 's3cret' not in str(dict(os.environ))\nassert not os.listdir('.')"
    assert run(program, LIMITS).reason == "runs"
