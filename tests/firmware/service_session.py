"""The service as its unit starts it, in a network without interfaces and forbidden to make memory executable.

Prints JSON. Run as ``python service_session.py COMMAND ...`` in a namespace of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PR_SET_MDWE = 65
REFUSE_EXEC_GAIN = 1
TIMEOUT_S = 120.0
BODY = json.dumps({"prompt": "Hi", "max_tokens": 4, "ignore_eos": True}).encode()


def ask() -> int:
    request = urllib.request.Request("http://127.0.0.1:8080/v1/completions", BODY)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return int(json.load(answer)["usage"]["completion_tokens"])


def health() -> object:
    with urllib.request.urlopen("http://127.0.0.1:8080/health", timeout=TIMEOUT_S) as answer:
        return json.load(answer)


def hear(systemd: socket.socket, word: str) -> list[str]:
    """What the service tells until it tells this."""
    told: list[str] = []
    deadline = time.monotonic() + TIMEOUT_S
    while not any(word in line for line in told):
        assert time.monotonic() < deadline, told
        told += systemd.recv(4096).decode().splitlines()
    return told


def main(*command: str) -> None:
    no_executable_memory = ctypes.CDLL(None).prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0) == 0  # since Linux 6.3
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"{folder}/notify")
        systemd.settimeout(TIMEOUT_S)
        environment = os.environ | {"NOTIFY_SOCKET": f"{folder}/notify", "WATCHDOG_USEC": "1000000"}
        log = Path(folder, "log")
        with (
            log.open("w") as errors,
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as service,
        ):
            try:
                told = hear(systemd, "READY=1")
                subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
                tokens, healthy = ask(), health()
                hear(systemd, "WATCHDOG=1")
            except (AssertionError, OSError):
                sys.exit(log.read_text())
            finally:
                service.send_signal(signal.SIGTERM)
                status = service.wait(TIMEOUT_S)
            told += hear(systemd, "STOPPING=1")
        outcome = {"told": told, "tokens": tokens, "health": healthy, "status": status, "log": log.read_text()}
        print(json.dumps(outcome | {"no_executable_memory": no_executable_memory}))


if __name__ == "__main__":
    main(*sys.argv[1:])
