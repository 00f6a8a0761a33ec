"""A service inside this process: for the commands that need answers without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from edge.commands.loading import load
from edge.config import Settings

if TYPE_CHECKING:  # these bring onnxruntime, which is imported while the bundle is verified
    from edge.service import Event, Service

Show = Callable[[str, bool], None]
"""Called with each piece of an answer's text and whether it is reasoning."""


@contextmanager
def local_service(settings: Settings) -> Iterator[Service]:
    """Verify and load the configured bundle, run its service, and stop it in the end.

    Raises:
        BundleError: the bundle is damaged.
        ConfigError: no bundle is configured, or it does not fit the settings.
    """
    service = load(settings)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def ask(service: Service, body: Mapping[str, Any], show: Show) -> dict[str, Any]:
    """Answer one request, as it would come over HTTP; Ctrl-C ends the generation and is passed on.

    Args:
        service: a started service.
        body: the fields of a chat request, or of a completion if there is a ``prompt``; None counts as not given.
        show: receives the answer piece by piece.

    Returns:
        The complete answer in OpenAI's shape.

    Raises:
        QwedgeError: the request is refused or failed.
    """
    from edge.openai import Answer, parse_chat, parse_completion, prepare

    given = {name: value for name, value in body.items() if value is not None}
    request = parse_completion(given) if "prompt" in given else parse_chat(given)
    generations = prepare(service.model, request)
    answer = Answer(service.model, request, generations)
    events: SimpleQueue[tuple[int, Event]] = SimpleQueue()
    ticket = service.submit_all(generations, lambda index, event: events.put((index, event)))
    try:
        while not answer.ended:
            for chunk in answer.chunks(*events.get()):
                _show_chunk(chunk, show)
    finally:
        ticket.cancel()
    return answer.body()


def _show_chunk(chunk: Mapping[str, Any], show: Show) -> None:
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta", choice)
        if text := delta.get("reasoning_content"):
            show(text, True)
        if text := delta.get("content") or delta.get("text"):
            show(text, False)
