"""Sets up the peer: onnxruntime-genai in an environment of its own, and its int4 export of the same checkpoint.

Both live outside the repository, under the cache folder; the second run finds them there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.oracle import write_folder
from export.sources import default_cache, resolve

REQUIREMENTS = (
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.31.1",
    # What its model builder needs.
    "numpy==2.4.6",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
    "torch==2.13.0",
    "transformers==5.23.0",
)
BUILDER_OPTIONS = ("-p", "int4", "-e", "cpu")
"""Its default int4 recipe: nothing else is chosen for it."""


@dataclass(frozen=True)
class Peer:
    """What is needed to run it."""

    python: Path
    model: Path
    """Folder that the builder wrote."""


def set_up_peer(source: str) -> Peer:
    """Install onnxruntime-genai and export ``source`` with it, unless that was done before.

    Raises:
        QwedgeError: ``source`` cannot be found or read.
        subprocess.CalledProcessError: pip or the model builder failed.
    """
    home = default_cache() / "bench"
    python = _environment(home / "genai-venv")
    model = home / "genai-models" / Path(source).name
    if not model.exists():
        _build(source, python, model)
    return Peer(python, model)


def describe_recipe(peer: Peer) -> dict[str, Any]:
    """How the builder quantized: operator, bits, block size, accuracy level and zero points, with their numbers."""
    script = """
import collections, json, onnx, sys
graph = onnx.load(sys.argv[1], load_external_data=False).graph
def describe(node):
    found = {a.name: a.i for a in node.attribute if a.name in ("bits", "block_size", "accuracy_level")}
    zero_points = len(node.input) > 3 and bool(node.input[3])
    return " ".join([node.op_type, *(f"{k}={v}" for k, v in sorted(found.items())), f"zero_points={zero_points}"])
quantized = [node for node in graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
head = [describe(node) for node in quantized if "lm_head" in node.name and node.op_type == "MatMulNBits"]
print(json.dumps({"nodes": len(graph.node), "quantized": collections.Counter(map(describe, quantized)), "head": head}))
"""
    command: list[str | Path] = [peer.python, "-c", script, peer.model / "model.onnx"]
    described: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return described


def _environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    stamp = folder / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS) + "\n"
    if not stamp.is_file() or stamp.read_text("utf-8") != wanted:
        print(f"installing {REQUIREMENTS[0]} and its builder's libraries into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True, stdout=sys.stderr)
        stamp.write_text(wanted, "utf-8")
    return python


def _build(source: str, python: Path, model: Path) -> None:
    """Write the checkpoint as a folder in float32, and let the builder have it."""
    scratch = model.with_name(f"{model.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    print(f"exporting {source} with the builder of onnxruntime-genai", file=sys.stderr)
    with resolve(source, cache=default_cache()).open() as checkpoint:
        write_folder(checkpoint, scratch / "checkpoint")
    command: list[str | Path] = [python, "-m", "onnxruntime_genai.models.builder", *BUILDER_OPTIONS]
    command += ["-i", scratch / "checkpoint", "-o", scratch / "model", "-c", scratch / "cache"]
    with (scratch / "log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    (scratch / "model").rename(model)
    shutil.rmtree(scratch)
