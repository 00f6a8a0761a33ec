"""A contestant that runs, and how it is asked.

qwedge and llama.cpp are asked as their users ask them: over HTTP, streaming. onnxruntime-genai has no server; a small
worker (:mod:`tests.bench.peers.genai_worker`) answers token ids instead, and its own clock counts, so that it pays for
no transport.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, Self

import httpx

from edge.errors import UnavailableError
from tests.bench.peers.prompts import Message, Reader

_PATIENCE_S = 900.0
_START_S = 120.0
_POLL_S = 0.005


@dataclass(frozen=True)
class Ask:
    """One request, answered greedily."""

    messages: Sequence[Message]
    max_tokens: int
    schema: dict[str, Any] | None = None
    """Of the JSON that the answer must be."""
    fixed: bool = False
    """The answer goes on past an end of text, to ``max_tokens``."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    first_s: float
    """From asking to the first token."""
    total_s: float

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the tokens after the first one."""
        return (self.output_tokens - 1) / (self.total_s - self.first_s)


class Running(Protocol):
    """A started contestant."""

    @property
    def pid(self) -> int:
        """Of the process that does the work."""
        ...

    def ask(self, ask: Ask) -> Answer:
        """One request, alone."""
        ...

    def ask_all(self, asks: Sequence[Ask]) -> tuple[list[Answer], float]:
        """All at once; the answers, and the seconds until the last one ended."""
        ...

    def keep(self) -> None:
        """Put the keys and values of the last prompt on disk, where that has to be asked for."""
        ...

    def recall(self) -> None:
        """Take them back after a restart."""
        ...


class HttpServer:
    """An OpenAI-compatible server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self._process = process
        self._log = log
        # A new connection each time: a server may close one that it has answered often enough.
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            timeout=_PATIENCE_S,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._process.pid

    def await_ready(self) -> Self:
        """Until it says that it is healthy.

        Raises:
            UnavailableError: it ended, or takes too long.
        """
        deadline = time.monotonic() + _START_S
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                if self.client.get("/health").status_code == httpx.codes.OK:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(_POLL_S)
        raise UnavailableError("a server does not start", hint=f"see the end of {self._log}")

    def ask(self, ask: Ask) -> Answer:
        """One streamed chat completion."""
        began = time.perf_counter()
        text, first_s, total_s = "", 0.0, 0.0
        usage: dict[str, Any] = {}
        with self.client.stream("POST", "/v1/chat/completions", json=_body(ask)) as response:
            if response.status_code != httpx.codes.OK:
                raise UnavailableError(
                    f"the server answers {response.read().decode()}", hint=f"see the end of {self._log}"
                )
            for chunk in _events(response.iter_lines()):
                if "error" in chunk:
                    raise UnavailableError(f"the server ends with {chunk['error']}", hint=f"see the end of {self._log}")
                usage = chunk.get("usage") or usage
                if piece := "".join(choice["delta"].get("content") or "" for choice in chunk["choices"]):
                    first_s = first_s or time.perf_counter() - began
                    total_s = time.perf_counter() - began
                    text += piece
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return Answer(text, usage["prompt_tokens"], cached, usage["completion_tokens"], first_s, total_s)

    def ask_all(self, asks: Sequence[Ask]) -> tuple[list[Answer], float]:
        """One client for each request."""
        began = time.perf_counter()
        with ThreadPoolExecutor(len(asks)) as clients:
            answers = list(clients.map(self.ask, asks))
        return answers, time.perf_counter() - began

    def keep(self) -> None:
        """Nothing to do: the server does it by itself, or cannot."""

    def recall(self) -> None:
        """Nothing to do: the server does it by itself, or cannot."""


class LlamaServer(HttpServer):
    """Saves and restores a slot on demand."""

    def keep(self) -> None:
        """Save the slot that holds the most, which is the last long prompt's."""
        slots = [slot["id"] for slot in self.client.get("/slots").raise_for_status().json()]
        self._act(max(slots, key=lambda slot: self._act(slot, "save")["n_saved"]), "save")

    def recall(self) -> None:
        """Restore it into the first slot."""
        self._act(0, "restore")

    def _act(self, slot: int, action: str) -> dict[str, Any]:
        response = self.client.post(f"/slots/{slot}?action={action}", json={"filename": "prefix"})
        result: dict[str, Any] = response.raise_for_status().json()
        return result


class GenaiWorker:
    """The parent's end of the worker."""

    def __init__(self, process: subprocess.Popen[bytes], reader: Reader, log: Path) -> None:
        assert process.stdin
        assert process.stdout
        self._process = process
        self._in: IO[bytes] = process.stdin
        self._out: IO[bytes] = process.stdout
        self._reader = reader
        self._log = log

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._process.pid

    def await_ready(self) -> None:
        """Until the model is loaded."""
        self._read()

    def ask(self, ask: Ask) -> Answer:
        """One prompt."""
        return self.ask_all([ask])[0][0]

    def ask_all(self, asks: Sequence[Ask]) -> tuple[list[Answer], float]:
        """One padded batch: it can do no better on a CPU."""
        prompts = [self._reader.encode(ask.messages) for ask in asks]
        job = {"prompts": prompts, "max_tokens": asks[0].max_tokens, "schema": asks[0].schema, "fixed": asks[0].fixed}
        # A worker that ended shows in what it does not answer.
        with contextlib.suppress(BrokenPipeError):
            self._in.write(json.dumps(job).encode() + b"\n")
            self._in.flush()
        result = self._read()
        return [
            Answer(
                text=self._reader.decode(answer["tokens"]),
                prompt_tokens=len(prompt),
                cached_tokens=answer["cached"],
                output_tokens=len(answer["tokens"]),
                first_s=answer["first_s"],
                total_s=answer["total_s"],
            )
            for prompt, answer in zip(prompts, result["answers"], strict=True)
        ], result["wall_s"]

    def keep(self) -> None:
        """It cannot."""

    def recall(self) -> None:
        """It cannot."""

    def _read(self) -> dict[str, Any]:
        line = self._out.readline()
        if not line:
            raise UnavailableError("the worker of onnxruntime-genai ended", hint=f"see the end of {self._log}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _body(ask: Ask) -> dict[str, Any]:
    body: dict[str, Any] = {
        "messages": ask.messages,
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "repetition_penalty": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        # Known to llama-server; qwedge leaves out what it does not know, and its prompts ask for long answers.
        "ignore_eos": ask.fixed,
    }
    if ask.schema is not None:
        form = {"name": "answer", "strict": True, "schema": ask.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    return body


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of server-sent events, without the closing mark."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
