"""``qwedge serve --warm FILE``: prompts that are read before the first request comes.

The file is either one system prompt as plain text, or JSON Lines: on each line an object with ``messages`` (and
``tools``, if any) or a ``prompt``, as the HTTP API takes them, and an ``identity`` where a prompt is for one client
alone. Without it a prompt is for everyone (:data:`edge.engine.prefix.EVERYONE`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from edge.engine.prefix import EVERYONE
from edge.errors import ConfigError, ContextOverflowError, RequestError
from edge.model import Model
from edge.openai import ChatRequest, CompletionRequest, parse_body, parse_chat, parse_completion, prepare
from edge.service import Event, Failed, Finished, GenerationRequest, Service

MAX_PROMPTS = 64
MAX_FILE_BYTES = 8 << 20
KEYS = frozenset({"messages", "tools", "prompt", "identity"})
_LIMITS = {"max_tokens": 1, "temperature": 0}
_QUESTION = {"role": "user", "content": "?"}
_SYSTEM_ROLES = {"system", "developer"}

Note = Callable[[str], None]
"""Called with one line of progress."""


@dataclass(frozen=True)
class WarmPrompt:
    """A prompt as the file has it."""

    place: str
    """File and line, as messages name it."""
    request: ChatRequest | CompletionRequest
    identity: str


def read_prompts(path: Path) -> list[WarmPrompt]:
    """Read and check a file of prompts.

    Raises:
        ConfigError: the file cannot be read, is too large, or a line is no prompt.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode("utf-8-sig").strip()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="check the path of --warm") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text", hint="save the file as UTF-8") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", hint="is this a file of prompts?")
    if not text:
        raise ConfigError(f"{path} is empty", hint="write a system prompt, or JSON Lines, into it")
    if not text.startswith("{"):
        return [_prompt(str(path), {"messages": [{"role": "system", "content": text}]})]
    prompts = [_prompt(place, _parse_line(place, line)) for place, line in _lines(path, data)]
    if len(prompts) > MAX_PROMPTS:
        raise ConfigError(f"{path} has {len(prompts)} prompts", hint=f"use at most {MAX_PROMPTS}")
    return prompts


def prepare_prompts(model: Model, prompts: list[WarmPrompt]) -> list[GenerationRequest]:
    """Turn prompts into requests of one token each.

    Raises:
        ConfigError: a prompt does not suit the model: its template refuses it, or it is longer than the context.
    """
    return [request for prompt in prompts for request in _prepare(model, prompt)]


def warm_up(service: Service, requests: list[GenerationRequest], note: Note) -> None:
    """Run the requests, one after the other, on a started service.

    Raises:
        QwedgeError: one failed.
    """
    for number, request in enumerate(requests, start=1):
        begin = time.monotonic()
        timings = _run(service, request).timings
        cached = f", {timings.num_cached_tokens} of them known" if timings.num_cached_tokens else ""
        seconds = time.monotonic() - begin
        note(f"warm: prompt {number} of {len(requests)}, {timings.num_prompt_tokens} tokens{cached}, {seconds:.1f} s")


def _lines(path: Path, data: bytes) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line


def _parse_line(place: str, line: bytes) -> dict[str, Any]:
    hint = 'write one object a line, as {"messages": [...]}'
    try:
        fields = parse_body(line)
    except RequestError as error:
        raise ConfigError(f"{place}: {error.message.replace('the body', 'the line')}", hint=hint) from None
    if unknown := sorted(fields.keys() - KEYS):
        raise ConfigError(f"{place}: there is no key {unknown[0]!r}", hint=f"known are {', '.join(sorted(KEYS))}")
    if ("messages" in fields) == ("prompt" in fields):
        raise ConfigError(f"{place}: needs either messages or a prompt", hint=hint)
    return fields


def _prompt(place: str, fields: dict[str, Any]) -> WarmPrompt:
    identity = fields.pop("identity", EVERYONE)
    if not isinstance(identity, str):
        raise ConfigError(f"{place}: identity is no string", hint='"" is HTTP\'s, "mqtt:NAME" that of an MQTT client')
    try:
        request = parse_completion(fields | _LIMITS) if "prompt" in fields else parse_chat(fields | _LIMITS)
    except RequestError as error:
        raise _in_place(place, error) from None
    return WarmPrompt(place, _with_question(request), identity)


def _with_question(request: ChatRequest | CompletionRequest) -> ChatRequest | CompletionRequest:
    """A system prompt alone gets a question: some templates refuse a conversation without the user."""
    if isinstance(request, ChatRequest) and request.messages[-1].get("role") in _SYSTEM_ROLES:
        return request.model_copy(update={"messages": [*request.messages, _QUESTION]})
    return request


def _prepare(model: Model, prompt: WarmPrompt) -> list[GenerationRequest]:
    try:
        requests = [replace(request, identity=prompt.identity) for request in prepare(model, prompt.request)]
    except RequestError as error:
        raise _in_place(prompt.place, error) from None
    longest = max(len(request.prompt_ids) for request in requests)
    if longest >= model.context_length:
        raise _in_place(prompt.place, ContextOverflowError(longest, model.context_length))
    return requests


def _in_place(place: str, error: RequestError) -> ConfigError:
    return ConfigError(f"{place}: {error.message}", hint=error.hint)


def _run(service: Service, request: GenerationRequest) -> Finished:
    events: SimpleQueue[Event] = SimpleQueue()
    service.submit(request, events.put)
    while True:
        event = events.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return event
