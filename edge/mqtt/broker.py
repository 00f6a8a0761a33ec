"""A mosquitto of our own: a supervised child for devices where no broker is configured.

On loopback it lets anyone in until it has clients with passwords; elsewhere it listens with TLS only, and only to those
that it knows. Its configuration is generated, its files are private and removed, and it ends with us, however we end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final, Self

from edge.errors import ConfigError, UnavailableError
from edge.mqtt.broker_clients import FILE as CLIENTS_FILE
from edge.mqtt.broker_clients import BrokerClient, load_clients
from edge.mqtt.broker_config import HOST, Files, Network, Owner, make_acl, make_config, make_passwords
from edge.mqtt.broker_program import find_mosquitto, mosquitto_version
from edge.settings.mqtt import BrokerAddress

log = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0
_BACKOFF_S: Final = (0.1, 1.0)
"""First and longest pause before a restart."""
_STABLE_S: Final = 10.0
"""A child that lived this long starts the backoff anew."""
_LOOK_S: Final = 0.5
"""How often to look whether clients were added or removed."""

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


@dataclass(frozen=True)
class Guard:
    """Who is let in once there are clients."""

    owner: Owner
    clients: Path
    """Folder of the clients; a change takes effect while the broker runs."""


class EmbeddedBroker:
    """Runs mosquitto between :meth:`start` and :meth:`stop`; also a context manager.

    Args:
        port: TCP port on loopback; 0 picks a free one at :meth:`start`.
        state_dir: where retained messages and offline clients' queues survive a restart of the machine; created with
            mode 0700. None = in memory only.
        guard: the clients, whose first one ends that anybody is let in. None = everybody on this device, always.
        network: a listener with TLS, which needs a guard. Its port may be 0.
        sync: write each change to the ``state_dir`` at once, so that the sudden end of mosquitto loses next to nothing.
    """

    def __init__(
        self,
        port: int,
        *,
        state_dir: Path | None = None,
        guard: Guard | None = None,
        network: Network | None = None,
        sync: bool = True,
    ) -> None:
        self.address = BrokerAddress(HOST, port)
        """Where it listens on loopback, once it is started."""
        self.network = network
        """Where it listens with TLS, once it is started."""
        self.restarts = 0
        """Times that the child ended by itself and was started again."""
        self._state_dir = state_dir
        self._guard = guard
        self._sync = sync
        self._version: tuple[int, ...] = ()
        self._seen: object = None
        self._renewing = False
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._failure: UnavailableError | None = None
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._watcher: threading.Thread | None = None
        self._config: TemporaryDirectory[str] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None when it does not run."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start mosquitto and return when it accepts connections.

        Raises:
            ConfigError: the clients cannot be read.
            UnavailableError: there is no usable mosquitto, the port is taken, or it did not start.
        """
        program = find_mosquitto()
        self._version = mosquitto_version(program)
        self.address = BrokerAddress(HOST, _free_port(HOST, self.address.port))
        if self.network is not None:
            self.network = replace(self.network, port=_free_port(self.network.host, self.network.port))
        self._state_dir = self._state_dir and _make_folder(self._state_dir)
        self._config = TemporaryDirectory(prefix="qwedge-broker-")  # mode 0700
        files = Files(Path(self._config.name))
        try:
            self._write_files(files)
        except BaseException:
            self.stop()
            raise
        self._thread = threading.Thread(
            target=self._supervise, args=(program, files.config), name="broker", daemon=True
        )
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S) or self._failure is not None:
            failure = self._failure or UnavailableError(f"mosquitto did not listen within {START_TIMEOUT_S:.0f} s")
            self.stop()
            raise failure
        if self._guard is not None:
            self._watcher = threading.Thread(target=self._watch, args=(files,), name="broker-clients", daemon=True)
            self._watcher.start()
        places = [f"{HOST}:{self.address.port}"]
        if self.network is not None:
            places.append(f"{self.network.host}:{self.network.port} (TLS)")
        log.info("mosquitto %s listens on %s", ".".join(map(str, self._version)), " and ".join(places))

    @property
    def own_password_file(self) -> Path | None:
        """Where the device's own password lies while the broker runs; None without a guard."""
        return Files(Path(self._config.name)).own_password if self._guard is not None and self._config else None

    def stop(self) -> None:
        """End mosquitto, remove its files; harmless when it does not run."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
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

    def _write_files(self, files: Files) -> bool:
        """Generate everything; returns whether mosquitto must be started anew to take it.

        Raises:
            ConfigError: the clients cannot be read.
            UnavailableError: another process keeps them busy.
        """
        clients: tuple[BrokerClient, ...] | None = None
        if self._guard is not None:
            self._seen = _stamp(self._guard.clients)
            clients = load_clients(self._guard.clients)
            _put(files.own_password, self._guard.owner.password)
            _put(files.passwords, make_passwords(self._guard.owner, clients or ()))
            _put(files.acl, make_acl(self._guard.owner, clients or ()))
        guarded = files if clients is not None or self.network is not None else None
        text = make_config(
            self.address.port,
            self._state_dir,
            sync=self._sync,
            version=self._version,
            guarded=guarded,
            network=self.network,
        )
        if files.config.exists() and files.config.read_text(encoding="utf-8") == text:
            return False
        _put(files.config, text)
        return True

    def _watch(self, files: Files) -> None:
        """Tell mosquitto when clients were added or removed; those who may stay keep their connections."""
        assert self._guard is not None
        while not self._stopping.wait(_LOOK_S):
            if _stamp(self._guard.clients) == self._seen:
                continue
            try:
                anew = self._write_files(files)
            except (ConfigError, UnavailableError, OSError) as error:
                log.error("the broker goes on with the clients that it knows: %s", error)  # noqa: TRY400 - the reason is in the line
                continue
            log.info("the broker's clients were changed")
            process = self._process
            if process is not None and process.poll() is None:
                self._renewing = anew
                process.send_signal(signal.SIGTERM if anew else signal.SIGHUP)

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
            if self._renewing:
                self._renewing = False
                continue
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
                log.log(_level(line), "mosquitto: %s", last_line)
        self._process.wait()
        watcher.join()
        return last_line

    def _announce(self, process: subprocess.Popen[str]) -> None:
        """Set ``_ready`` once the child accepts a connection."""
        while process.poll() is None and not self._ready.is_set():
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.address.port), timeout=1):
                self._ready.set()
            time.sleep(0.02)


def _level(line: str) -> int:
    if "Error" in line:
        return logging.ERROR
    return logging.INFO if "not authorised" in line else logging.DEBUG


def _stamp(folder: Path) -> object:
    """Changes whenever the clients do."""
    try:
        info = (folder / CLIENTS_FILE).stat(follow_symlinks=False)
    except OSError:
        return None
    return info.st_ino, info.st_mtime_ns, info.st_size


def _make_folder(path: Path) -> Path | None:
    """A folder for messages; None where there cannot be one: a full or read-only disk must not end the service."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        log.warning("the broker keeps messages in memory only: %s: %s", path, error.strerror)
        return None
    return path


def _put(path: Path, text: str) -> None:
    """Replace a file as a whole: mosquitto may be reading it."""
    temporary = path.with_suffix(".tmp")
    temporary.touch(mode=0o600)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _free_port(host: str, port: int) -> int:
    """``port`` itself, or a free one for 0.

    Raises:
        UnavailableError: something listens there already, or the address is none of this machine.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            hint = f"a broker runs there already? use it by --broker mqtt://{HOST}:{port}, or set QWEDGE_MQTT_PORT"
            if host != HOST:
                hint = "mqtt.listen is an address of this machine, mqtt.tls_port a free port"
            raise UnavailableError(f"port {port} cannot be used: {error.strerror}", hint=hint) from None
        return int(probe.getsockname()[1])
