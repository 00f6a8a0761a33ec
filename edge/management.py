"""What operators do to a running server: switch models, verify, go back, restart with new settings.

One operation runs at a time, on a thread of its own; its state is a value that every front end shows (HTTP as a
document, MQTT as a retained message). A model that does not work after a switch is left at once for the one before it.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from edge.bundle import Progress
from edge.engine.sampler import SamplingParams
from edge.errors import ConflictError, EngineError, QwedgeError, RequestError, StoreError, UnavailableError
from edge.service import Event, Failed, Finished, GenerationRequest, Loaded, Service
from edge.store import Installed, Store

log = logging.getLogger(__name__)

Kind = Literal["switch", "verify", "rollback", "reload", "restart"]
State = Literal["running", "done", "failed"]

PROBE_TOKENS: Final = 4
"""Tokens that a model must generate to count as one that works."""
PROBE_TIMEOUT_S: Final = 120.0
_PROBE: Final = "The capital of France is"


@dataclass(frozen=True)
class Operation:
    """A snapshot of what is being done, or was done last."""

    id: str
    kind: Kind
    name: str | None = None
    """The bundle that was asked for."""
    state: State = "running"
    step: str = ""
    """What of it is being done: ``verifying``, ``loading``, ``testing``, ``going back``."""
    progress: float = 0.0
    """Of the step, 0 to 1."""
    error: QwedgeError | None = None
    """Why it failed."""

    def describe(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        error = None if self.error is None else {"message": self.error.message, "hint": self.error.hint or None}
        return {**vars(self), "error": error}


OnChange = Callable[[Operation], None]
"""Told of every change, on the operation's thread; must not raise."""


class Management:
    """Runs operations on a service and its store.

    Args:
        service: what is served.
        store: the installed bundles; None where a folder is served directly.
        load: loads an installed bundle.
        check_settings: raises a ConfigError where the settings, read anew, cannot be used.
        restart: has the process drain, end and begin anew.
        drain_s: what running requests get to finish before a switch.
    """

    def __init__(
        self,
        service: Service,
        store: Store | None,
        load: Callable[[Installed], Loaded],
        *,
        check_settings: Callable[[], object],
        restart: Callable[[], None],
        drain_s: float,
    ) -> None:
        self._service = service
        self._store = store
        self._load = load
        self._check_settings = check_settings
        self._restart = restart
        self._drain_s = drain_s
        self._listeners: list[OnChange] = []
        self._lock = threading.Lock()
        self._operation: Operation | None = None  # guarded by _lock
        self._thread: threading.Thread | None = None  # guarded by _lock
        self._served = ExitStack()
        """Keeps the bundle that is served from being removed."""
        self._served_bundle: Installed | None = None

    @property
    def operation(self) -> Operation | None:
        """What is being done, or was done last; None where nothing was."""
        return self._operation

    @property
    def has_store(self) -> bool:
        """Whether there are bundles to choose from."""
        return self._store is not None

    def serves(self, name: str | None) -> bool:
        """Whether this bundle is what is served."""
        return name is not None and name == self.served

    @property
    def served(self) -> str | None:
        """The name in the store of what is served; None where that does not come from it."""
        return None if self._served_bundle is None else self._served_bundle.name

    def bundles(self) -> Sequence[Installed]:
        """The installed bundles.

        Raises:
            StoreError: there is no store, or it cannot be read.
        """
        return self._need_store().list()

    def unload(self) -> None:
        """Let the weights leave the memory as soon as nothing runs; the next request brings them back."""
        self._service.unload()

    def load(self) -> None:
        """Bring weights that have left the memory back, and see that the model answers.

        Raises:
            QwedgeError: it does not.
        """
        if self._service.stats().asleep:
            probe(self._service)

    def listen(self, on_change: OnChange) -> None:
        """Have ``on_change`` told of every change from now on."""
        self._listeners.append(on_change)

    def serving(self, installed: Installed) -> None:
        """Note what is served, so that no command removes it."""
        self._served.close()
        self._served_bundle = installed
        self._served.enter_context(self._need_store().serving(installed))

    def begin(self, kind: Kind, name: str | None = None, *, operation_id: str | None = None) -> Operation:
        """Begin an operation; it goes on in the background.

        Args:
            kind: what to do.
            name: the bundle, for ``switch`` and ``verify``: its name in the store or, where it is the only one of it,
                its model's.
            operation_id: what to call it; None makes up a name.

        Raises:
            ConflictError: another one is running.
            RequestError: a switch or a verify of nothing.
            StoreError: there is no store, or no such bundle.
            ConfigError: a reload, and the settings cannot be used.
        """
        if kind in {"switch", "verify"}:
            name = self._named(name)
        elif kind == "rollback":
            self._need_store()
        elif kind == "reload":
            self._check_settings()
        with self._lock:
            if self._operation is not None and self._operation.state == "running":
                running = self._operation
                hint = "wait until it has ended"
                raise ConflictError(f"a {running.kind} is running", hint=hint)
            operation = Operation(operation_id or secrets.token_hex(8), kind, name)
            self._operation = operation
            self._thread = threading.Thread(target=self._run, args=(operation,), name="management", daemon=True)
            self._thread.start()
        return operation

    def close(self) -> None:
        """Wait for the end of what is running; the caller has stopped the service."""
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._served.close()

    def _run(self, operation: Operation) -> None:
        self._tell()
        log.info("%s %s begins", operation.kind, operation.name or "")
        try:
            self._do(operation)
        except QwedgeError as error:
            log.warning("%s failed: %s", operation.kind, error)
            self._update(state="failed", error=error)
        except Exception:  # an operation's fault must not end the server
            log.exception("%s failed", operation.kind)
            hint = "see the server's log"
            self._update(state="failed", error=EngineError("the operation failed", hint=hint))
        else:
            if operation.kind not in {"reload", "restart"}:  # these are done when the process is back
                log.info("%s is done", operation.kind)
                self._update(state="done", step="", progress=1.0)

    def _do(self, operation: Operation) -> None:
        match operation.kind:
            case "verify":
                self._need_store().verify(operation.name or "", watch=self._watch)
            case "switch":
                self._serve(self._need_store().activate(operation.name or "", test=False, watch=self._watch))
            case "rollback":
                self._serve(self._need_store().rollback(watch=self._watch))
            case "reload" | "restart":
                self._restart()

    def _serve(self, installed: Installed) -> None:
        """Serve a bundle that the store has made active, or the one before it where that does not work."""
        if installed.name == self.served:
            return
        served = self._served_bundle
        try:
            self._try(installed)
        except UnavailableError:
            raise  # the server stops: the next start tries the bundle
        except QwedgeError as error:
            self._go_back(installed, served, error)
            raise

    def _try(self, installed: Installed) -> None:
        self._update(step="loading", progress=0.0)
        self._service.switch(lambda: self._load(installed), self._drain_s)
        self.serving(installed)
        self._update(step="testing")
        probe(self._service)
        self._need_store().healthy(installed.name)

    def _go_back(self, installed: Installed, served: Installed | None, error: QwedgeError) -> None:
        """Serve what the store goes back to; where it knows nothing, what was served until now."""
        before = self._need_store().failed(installed.name) or served
        if before is None:
            log.error("%s does not work, and there is none to go back to: %s", installed.name, error)
            return
        self._update(step="going back", progress=0.0)
        self._need_store().verify(before.name)
        self._service.switch(lambda: self._load(before))
        self.serving(before)

    def _named(self, name: str | None) -> str:
        """The whole name of a bundle."""
        if not name:
            raise RequestError("no bundle is named", hint="`name` is that of an installed bundle", param="name")
        return self._need_store().find(name).name

    def _need_store(self) -> Store:
        if self._store is None:
            hint = "install bundles with `qwedge install` and start `qwedge serve` without --bundle"
            raise StoreError("this server has no model store", hint=hint)
        return self._store

    @contextmanager
    def _watch(self, label: str, total: int) -> Iterator[Progress | None]:
        """Shows a long step of the store as steps of a hundredth."""
        done = 0
        self._update(step=label, progress=0.0)

        def progress(num_bytes: int) -> None:
            nonlocal done
            before, done = done, done + num_bytes
            if 100 * before // max(1, total) != 100 * done // max(1, total):
                self._update(progress=min(1.0, done / max(1, total)))

        yield progress

    def _update(self, **changes: Any) -> None:
        with self._lock:
            assert self._operation is not None
            self._operation = replace(self._operation, **changes)
        self._tell()

    def _tell(self) -> None:
        operation = self._operation
        assert operation is not None
        for listener in self._listeners:
            listener(operation)


def probe(service: Service) -> None:
    """Have the model that is served generate a few tokens.

    Raises:
        QwedgeError: it does not.
    """
    ends: queue.SimpleQueue[Finished | Failed] = queue.SimpleQueue()

    def on_event(event: Event) -> None:
        if isinstance(event, Finished | Failed):
            ends.put(event)

    ids = tuple(service.model.tokenizer.encode(_PROBE, special=True))
    request = GenerationRequest(ids, SamplingParams(temperature=0.0), max_tokens=PROBE_TOKENS, ignore_eos=True)
    ticket = service.submit(request, on_event)
    with suppress(queue.Empty):
        end = ends.get(timeout=PROBE_TIMEOUT_S)
        if isinstance(end, Failed):
            raise end.error
        return
    ticket.cancel()
    raise EngineError(f"the model did not answer within {PROBE_TIMEOUT_S:g} s", hint="is the machine overloaded?")
