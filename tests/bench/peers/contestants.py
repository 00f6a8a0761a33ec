"""Who takes part, and how each is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.bench.peers.models import Models
from tests.bench.peers.processes import free_port, json_of, process
from tests.bench.peers.prompts import Reader
from tests.bench.peers.running import GenaiWorker, HttpServer, LlamaServer, Running
from tests.bench.peers.tools import LlamaCpp

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Serving:
    """How a contestant is started."""

    slots: int
    """Requests that it can work on at once."""
    context: int
    """Tokens that all of them together need at most."""
    threads: int
    state: Path
    """Folder for what outlives the process."""
    log: Path
    """File for what it says."""


class Contestant(Protocol):
    """One side of the comparison."""

    @property
    def name(self) -> str:
        """As the table has it."""
        ...

    def start(self, serving: Serving) -> AbstractContextManager[Running]:
        """A fresh process, ended with the block; it may still be loading."""
        ...

    def files(self) -> Path:
        """The model's file or folder."""
        ...

    def raw(self, serving: Serving, prompt_tokens: int, output_tokens: int) -> tuple[float, float] | None:
        """Prefill and decode in tokens/s by its own benchmark, without a server; None = it has none."""
        ...


@dataclass(frozen=True)
class Qwedge:
    """``qwedge serve``, with the product's settings."""

    models: Models
    name: str = "qwedge"

    @contextmanager
    def start(self, serving: Serving) -> Iterator[HttpServer]:
        """With a store of prefixes, so that they outlive a restart."""
        port = free_port()
        command = [*self._qwedge("serve", serving), "--slots", str(serving.slots), "--context", str(serving.context)]
        kept = {"QWEDGE_ENGINE_PREFIX_STORE": str(serving.state / "prefixes")}
        with process([*command, "--port", str(port)], serving.log, kept) as child:
            yield HttpServer(child, port, serving.log).await_ready()

    def files(self) -> Path:
        """The bundle."""
        return self.models.bundle

    def raw(self, serving: Serving, prompt_tokens: int, output_tokens: int) -> tuple[float, float]:
        """``qwedge bench``, one request after one that warms up."""
        lengths = ["--prompt-tokens", str(prompt_tokens), "--output-tokens", str(output_tokens)]
        figures = json_of([*self._qwedge("bench", serving), *lengths, "--repeats", "1", "--json"], serving.log)
        return figures["prefill_tokens_per_second"], figures["decode_tokens_per_second"]

    def _qwedge(self, command: str, serving: Serving) -> list[str]:
        shared = ["--bundle", str(self.models.bundle), "--threads", str(serving.threads)]
        return [sys.executable, "-m", "edge.cli", command, *shared]


@dataclass(frozen=True)
class Llama:
    """``llama-server`` with one of its files."""

    build: LlamaCpp
    model: Path
    name: str

    @contextmanager
    def start(self, serving: Serving) -> Iterator[LlamaServer]:
        """One cache for all slots (``--kv-unified``), which needs the least memory; it batches continuously anyway."""
        port = free_port()
        command = [self.build.program("llama-server"), "-m", self.model, "-c", serving.context, "-np", serving.slots]
        command += ["-t", serving.threads, "-tb", serving.threads, "--kv-unified", "--port", port, "--slots"]
        command += ["--slot-save-path", serving.state, "--offline"]
        with process(list(map(str, command)), serving.log) as child:
            yield LlamaServer(child, port, serving.log).await_ready()

    def files(self) -> Path:
        """The GGUF file."""
        return self.model

    def raw(self, serving: Serving, prompt_tokens: int, output_tokens: int) -> tuple[float, float]:
        """``llama-bench``, one repetition after its warm-up."""
        command = [self.build.program("llama-bench"), "-m", self.model, "-t", serving.threads, "-r", 1, "-o", "json"]
        tests = json_of([*map(str, command), "-p", str(prompt_tokens), "-n", str(output_tokens)], serving.log)
        prefill, decode = (test["avg_ts"] for test in sorted(tests, key=lambda test: test["n_gen"]))
        return prefill, decode


@dataclass(frozen=True)
class Genai:
    """onnxruntime-genai in its worker."""

    python: Path
    model: Path
    reader: Reader
    name: str = "onnxruntime-genai"

    @contextmanager
    def start(self, serving: Serving) -> Iterator[GenaiWorker]:
        """Slots and context are made for each request."""
        options = {"model": str(self.model), "threads": serving.threads, "ends": self.reader.ends}
        command = [str(self.python), str(HERE / "genai_worker.py"), json.dumps(options)]
        with process(command, serving.log, pipes=True) as child:
            worker = GenaiWorker(child, self.reader, serving.log)
            worker.await_ready()
            yield worker

    def files(self) -> Path:
        """The folder that its builder wrote."""
        return self.model

    def raw(self, serving: Serving, prompt_tokens: int, output_tokens: int) -> None:
        """Its benchmark is no part of the package."""
        del serving, prompt_tokens, output_tokens


def field(models: Models, build: LlamaCpp, genai_python: Path, reader: Reader) -> list[Contestant]:
    """Everybody, qwedge first."""
    return [
        Qwedge(models),
        Llama(build, models.q4_0, "llama.cpp Q4_0"),
        Llama(build, models.q4_k_m, "llama.cpp Q4_K_M"),
        Genai(genai_python, models.genai, reader),
    ]
