"""What is evaluated: a bundle in this process, a service that runs already, or a server of OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from edge import __version__
from edge.bundle import WEIGHTS, Manifest
from edge.errors import EngineError, OverloadedError
from edge.evaluation.answer import Answer

if TYPE_CHECKING:  # these bring onnxruntime or paho, which the other kind of target does without
    from edge.client import Client
    from edge.service import Event, Service

_PATIENCE = 60
"""Times that a full queue is waited for."""


class Target(Protocol):
    """Whoever answers; safe to use from several threads."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is evaluated: the same facts mean the same answers."""

    @property
    def parallel(self) -> int:
        """Questions that it can work on at once."""

    def answer(self, body: Mapping[str, Any]) -> Answer:
        """Answer a chat request.

        Raises:
            UnavailableError: nobody is there who could.
            QwedgeError: there is no answer to this one.
        """


class ServiceTarget:
    """A service in this process, which somebody else has started and stops.

    Args:
        service: answers.
        parallel: questions at once.
        model: the name that requests ask for: the model's own, or with an adapter; None = the model's own.
    """

    def __init__(self, service: Service, parallel: int, model: str | None = None) -> None:
        self._service = service
        self.parallel = parallel
        manifest = service.model.manifest
        self._model = model or manifest.name
        self.name = f"{self._model} ({manifest.recipe.get('name', '?')})"
        self.facts = _facts(manifest, self._model)

    def answer(self, body: Mapping[str, Any]) -> Answer:
        """See :class:`Target`."""
        began = time.monotonic()
        for _ in range(_PATIENCE):
            try:
                found = self._ask({**body, "model": self._model})
            except OverloadedError as error:
                time.sleep(min(error.retry_after_s or 1.0, 5.0))
            else:
                return Answer.of(found, 1000 * (time.monotonic() - began))
        raise OverloadedError("the queue stays full", hint="evaluate when there is less to do")

    def _ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        from edge import openai  # noqa: PLC0415 - see TYPE_CHECKING

        request = openai.parse_chat(body)
        generations = openai.prepare(self._service.model, request)
        answer = openai.Answer(self._service.model, request, generations)
        events: SimpleQueue[tuple[int, Event]] = SimpleQueue()  # bounded: an event for each token of the answer
        ticket = self._service.submit_all(generations, lambda index, event: events.put((index, event)))
        try:
            while not answer.ended:
                answer.chunks(*events.get())
        finally:
            ticket.cancel()
        return answer.body()


class UrlTarget:
    """A server, perhaps on another machine.

    Args:
        client: the way there.
        url: its address, for the report.
        model: the name that requests ask for; None = whatever the server serves.
        parallel: questions at once.
    """

    def __init__(self, client: Client, url: str, model: str | None, parallel: int) -> None:
        self._client = client
        self._model = model
        self.parallel = parallel
        self.name = f"{model} at {url}" if model else url
        self.facts = {"kind": "url", "url": url, "model": model}

    def answer(self, body: Mapping[str, Any]) -> Answer:
        """See :class:`Target`."""
        began = time.monotonic()
        found = self._client.chat({**body, "model": self._model} if self._model else body)
        try:
            return Answer.of(found, 1000 * (time.monotonic() - began))
        except (LookupError, TypeError):
            raise EngineError("the server's answer is none of OpenAI's", hint="is this the right address?") from None


@contextmanager
def service_target(service: Service, parallel: int, model: str | None = None) -> Iterator[ServiceTarget]:
    """Start a loaded service, and stop it in the end; arguments are :class:`ServiceTarget`'s.

    Raises:
        ModelNotFoundError: it has no such model.
    """
    service.model.find_adapter(model)
    service.start()
    try:
        yield ServiceTarget(service, parallel, model)
    finally:
        service.stop()


@contextmanager
def url_target(
    url: str, *, model: str | None, parallel: int, timeout_s: float, key: str | None = None
) -> Iterator[UrlTarget]:
    """Connect to a server, and disconnect in the end.

    Args:
        url: its address.
        model: as for :class:`UrlTarget`.
        parallel: questions at once.
        timeout_s: how long an answer may take.
        key: the API key, where the server wants one.

    Raises:
        ConfigError: the address is none.
        UnavailableError: nobody is there.
    """
    from edge.client import Client  # noqa: PLC0415 - see TYPE_CHECKING

    with Client(url, timeout_s=timeout_s, key=key) as client:
        yield UrlTarget(client, url, model, parallel)


def _facts(manifest: Manifest, model: str) -> dict[str, Any]:
    return {
        "kind": "bundle",
        "model": model,
        "version": manifest.version,
        "recipe": manifest.recipe.get("name"),
        "calibrated": manifest.recipe.get("calibration") is not None,
        "weights_sha256": next(entry.sha256 for entry in manifest.files if entry.path == WEIGHTS),
        "bytes": sum(entry.size for entry in manifest.files),
        "qwedge": __version__,
    }
