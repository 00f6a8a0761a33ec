"""A mosquitto of our own: a supervised child for devices where no broker is configured.

It listens on loopback only, because it lets anyone in. Its configuration is generated, its files are private and
removed, and it ends with us, however we end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final, Self

from edge.config import BrokerAddress
from edge.errors import UnavailableError

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
MAX_PACKET_BYTES: Final = 4 << 20
"""Larger packets never reach the device. Requests end at 1 MiB; those between get a 413 that says so."""
START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0
_BACKOFF_S: Final = (0.1, 1.0)
"""First and longest pause before a restart."""
_STABLE_S: Final = 10.0
"""A child that lived this long starts the backoff anew."""
_SEARCH_PATH: Final = "/usr/sbin:/usr/local/sbin"
_MIN_VERSION: Final = (2, 0)

# The child asks the kernel to be ended with its parent and then becomes mosquitto. It does so after exec, in a Python
# of its own: between fork and exec a threaded parent may not run Python. The signal follows the *thread* that started
# the child, which is why only the supervisor's thread does.
_DIE_WITH_PARENT: Final = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedBroker:
    """Runs mosquitto between :meth:`start` and :meth:`stop`; also a context manager.

    Args:
        port: TCP port on loopback; 0 picks a free one at :meth:`start`.
        state_dir: where retained messages and offline clients' queues survive a restart of the machine; created with
            mode 0700. None = in memory only.
    """

    def __init__(self, port: int, *, state_dir: Path | None = None) -> None:
        self.address = BrokerAddress(HOST, port)
        """Where it listens, once it is started."""
        self.restarts = 0
        """Times that the child ended by itself and was started again."""
        self._state_dir = state_dir
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._failure: UnavailableError | None = None
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._config: TemporaryDirectory[str] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None when it does not run."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start mosquitto and return when it accepts connections.

        Raises:
            UnavailableError: there is no usable mosquitto, the port is taken, or it did not start.
        """
        program = find_mosquitto()
        version = mosquitto_version(program)
        self.address = BrokerAddress(HOST, _free_port(self.address.port))
        if self._state_dir is not None:
            self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._config = TemporaryDirectory(prefix="qwedge-broker-")  # mode 0700
        config = Path(self._config.name) / "mosquitto.conf"
        config.write_text(make_config(self.address.port, self._state_dir), encoding="utf-8")
        self._thread = threading.Thread(target=self._supervise, args=(program, config), name="broker", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S) or self._failure is not None:
            failure = self._failure or UnavailableError(f"mosquitto did not listen within {START_TIMEOUT_S:.0f} s")
            self.stop()
            raise failure
        log.info("mosquitto %s listens on %s:%d", ".".join(map(str, version)), HOST, self.address.port)

    def stop(self) -> None:
        """End mosquitto, remove its files; harmless when it does not run."""
        self._stopping.set()
        if self._process is not None:
            self._process.terminate()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)
            if self._thread.is_alive() and self._process is not None:
                self._process.kill()
                self._thread.join()
            self._thread = None
        if self._config is not None:
            self._config.cleanup()
            self._config = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _supervise(self, program: str, config: Path) -> None:
        """Run mosquitto until :meth:`stop`; start it again when it ends, later and later."""
        pause = _BACKOFF_S[0]
        while not self._stopping.is_set():
            began = time.monotonic()
            last_line = self._run_once(program, config)
            if self._stopping.is_set():
                return
            if not self._ready.is_set():
                self._failure = UnavailableError(f"mosquitto ended at once: {last_line or 'no message'}")
                self._ready.set()
                return
            self.restarts += 1
            pause = _BACKOFF_S[0] if time.monotonic() - began > _STABLE_S else min(2 * pause, _BACKOFF_S[1])
            log.warning("mosquitto ended (%s); starting it again", last_line or "no message")
            self._stopping.wait(pause)

    def _run_once(self, program: str, config: Path) -> str:
        """Start the child, pass its log on until it ends; returns its last line."""
        command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), program, "-c", str(config)]
        # A process group of its own: Ctrl-C must reach us, not the broker through which we still have to say goodbye.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace", process_group=0,
        )  # fmt: skip
        if self._stopping.is_set():  # stop() may have looked before there was a process
            self._process.terminate()
        watcher = threading.Thread(target=self._announce, args=(self._process,), name="broker-ready", daemon=True)
        watcher.start()
        last_line = ""
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                last_line = line.strip()
                log.log(logging.ERROR if "Error" in line else logging.DEBUG, "mosquitto: %s", last_line)
        self._process.wait()
        watcher.join()
        return last_line

    def _announce(self, process: subprocess.Popen[str]) -> None:
        """Set ``_ready`` once the child accepts a connection."""
        while process.poll() is None and not self._ready.is_set():
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.address.port), timeout=1):
                self._ready.set()
            time.sleep(0.02)


def find_mosquitto() -> str:
    """Path of the mosquitto program, also where it is not on an ordinary user's PATH.

    Raises:
        UnavailableError: it is not installed.
    """
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path=_SEARCH_PATH)
    if program is None:
        hint = "apt-get install mosquitto, name a broker by --broker mqtt://HOST:PORT, or serve with --broker none"
        raise UnavailableError("mosquitto is not installed", hint=hint)
    return program


def mosquitto_version(program: str) -> tuple[int, ...]:
    """The version that ``mosquitto -h`` prints, for example (2, 0, 11).

    Raises:
        UnavailableError: it does not run, or is too old for the generated configuration.
    """
    try:
        output = subprocess.run([program, "-h"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{program} does not run: {error}", hint="reinstall mosquitto") from None
    match = re.search(r"mosquitto version (\d+)\.(\d+)\.(\d+)", output)
    version = tuple(int(part) for part in match.groups()) if match else ()
    if version < _MIN_VERSION:
        found = ".".join(map(str, version)) or "of unknown version"
        raise UnavailableError(f"mosquitto {found} is too old", hint="install mosquitto 2.0 or newer")
    return version


def make_config(port: int, state_dir: Path | None) -> str:
    """The text of mosquitto.conf: understood by 2.0 and 2.1."""
    lines = [
        f"listener {port} {HOST}",
        "allow_anonymous true",  # loopback only: whoever reaches the port is on this device
        "set_tcp_nodelay true",  # without it a QoS 1 round trip takes 40 ms and more
        f"max_packet_size {MAX_PACKET_BYTES}",
        "max_queued_messages 1000",
        "persistent_client_expiration 1d",
        # Started by root it would change its user, lose access to its files and forget to die with its parent.
        *(["user root"] if os.geteuid() == 0 else []),
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "connection_messages false",
    ]
    if state_dir is not None:
        lines += ["persistence true", f"persistence_location {state_dir.resolve()}/", "autosave_interval 300"]
    else:
        lines += ["persistence false"]
    return "\n".join(lines) + "\n"


def _free_port(port: int) -> int:
    """``port`` itself, or a free one for 0.

    Raises:
        UnavailableError: something listens there already.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            hint = f"a broker runs there already? use it by --broker mqtt://{HOST}:{port}, or set QWEDGE_MQTT_PORT"
            raise UnavailableError(f"port {port} cannot be used: {error.strerror}", hint=hint) from None
        return int(probe.getsockname()[1])
