"""The same real weights for every contestant, each in the form its own tools make of them.

The checkpoint is the catalog's Q4_K_M file. llama.cpp takes it as it is, and once more as Q4_0; qwedge exports it by
its default recipe; onnxruntime-genai's builder gets it as a folder in float32.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.sources import default_cache, resolve
from tests.bench.peers import tools

ROOT = Path(__file__).parents[3]
CATALOG = {"0.5b": "qwen2.5-coder-0.5b-instruct", "1.5b": "qwen2.5-coder-1.5b-instruct"}
BUILDER_OPTIONS = ("-p", "int4", "-e", "cpu")
"""The default int4 recipe of onnxruntime-genai's builder: nothing else is chosen for it."""


@dataclass(frozen=True)
class Models:
    """One checkpoint in all its forms."""

    bundle: Path
    q4_k_m: Path
    q4_0: Path
    genai: Path


def home() -> Path:
    """The folder of everything that the benchmark keeps."""
    folder = default_cache() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prepare(name: str, llama_cpp: tools.LlamaCpp, genai_python: Path, bundle: Path | None = None) -> Models:
    """Download and convert whatever is not there yet; a given bundle is taken as it is.

    Raises:
        QwedgeError: the checkpoint cannot be had, or a conversion failed.
    """
    checkpoint = resolve(name, cache=default_cache()).path
    return Models(
        bundle=bundle or _bundle(name),
        q4_k_m=checkpoint,
        q4_0=_q4_0(checkpoint, llama_cpp),
        genai=_genai(name, genai_python),
    )


def describe_genai(python: Path, model: Path) -> dict[str, Any]:
    """How the builder quantized: operator, bits, block size, accuracy level and zero points, with their numbers."""
    script = """
import collections, json, onnx, sys
graph = onnx.load(sys.argv[1], load_external_data=False).graph
def describe(node):
    found = {a.name: a.i for a in node.attribute if a.name in ("bits", "block_size", "accuracy_level")}
    zero_points = len(node.input) > 3 and bool(node.input[3])
    return " ".join([node.op_type, *(f"{k}={v}" for k, v in sorted(found.items())), f"zero_points={zero_points}"])
quantized = [node for node in graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
print(json.dumps({"nodes": len(graph.node), "quantized": collections.Counter(map(describe, quantized))}))
"""
    command: list[str | Path] = [python, "-c", script, model / "model.onnx"]
    described: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {"builder_options": BUILDER_OPTIONS, **described}


def _bundle(name: str) -> Path:
    """The default recipe's bundle, made anew when the exporter's code has changed."""
    folder = home() / "bundles" / f"{name}-{_exporter()}"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        for outdated in folder.parent.glob(f"{name}-*"):
            shutil.rmtree(outdated)
        tools.tell(f"exporting {name} with qwedge")
        export: list[tools.Argument] = [sys.executable, "-m", "edge.cli", "export", name, "-o", folder]
        tools.run(export, f"exporting {name}", "try the same with `qwedge export`")
    return folder


def _exporter() -> str:
    """Changes with anything that could change a bundle."""
    digest = hashlib.sha256()
    for path in (*sorted((ROOT / "edge/bundle").rglob("*")), *sorted((ROOT / "export").rglob("*"))):
        if path.suffix in {".py", ".toml", ".txt"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _q4_0(checkpoint: Path, llama_cpp: tools.LlamaCpp) -> Path:
    path = home() / "gguf" / checkpoint.name.replace("q4_k_m", "q4_0")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        tools.tell(f"making {path.name} with llama-quantize")
        with _appearing(path) as partial:
            quantize: list[tools.Argument] = [
                llama_cpp.program("llama-quantize"),
                "--allow-requantize",
                checkpoint,
                partial,
                "Q4_0",
            ]
            tools.run(quantize, f"making {path.name}", "see its log", log=path.with_suffix(".log"))
    return path


def _genai(name: str, python: Path) -> Path:
    model = home() / "genai-models" / name
    if not model.exists():
        # It brings the exporter's libraries, which take seconds to load.
        from export.oracle import write_folder

        tools.tell(f"exporting {name} with the builder of onnxruntime-genai")
        scratch = model.with_name(f"{name}.scratch")
        shutil.rmtree(scratch, ignore_errors=True)
        with resolve(name, cache=default_cache()).open() as checkpoint:
            write_folder(checkpoint, scratch / "checkpoint")
        with _appearing(model) as partial:
            builder: list[tools.Argument] = [python, "-m", "onnxruntime_genai.models.builder", *BUILDER_OPTIONS]
            builder += ["-i", scratch / "checkpoint", "-o", partial, "-c", scratch / "cache"]
            tools.run(builder, f"exporting {name}", "see its log", log=model.with_name(f"{name}.log"))
        shutil.rmtree(scratch)
    return model


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A name to write to; what is there takes its place once it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    yield partial
    partial.rename(path)
