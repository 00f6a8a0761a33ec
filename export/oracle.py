"""Parity with an independent implementation: transformers, or optimum's own ONNX export.

The fp32 graph and the oracle see the same weights and the same tokens; their logits are compared over one prefill, over
decode steps and over a chunked prefill. Needs an environment with the extra ``optimum`` (torch, transformers, optimum);
nothing else of qwedge imports those.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edge.bundle import GRAPH
from edge.errors import ConfigError, ExportError
from export.architectures import architecture_for
from export.architectures.decoder import Decoder as Architecture
from export.build import build_graph
from export.checkpoint import Checkpoint
from export.graph import present_name
from export.progress import Progress, step
from export.quantize.recipes import recipe_named
from export.staging import disk_errors

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit."""
STATE_TOLERANCE = 5e-4
"""The same for linear attention, whose state carries every rounding on: transformers computes it in another order."""
_PREFILL, _DECODE, _CHUNK = 20, 20, 7
_SEED = 20

Logits = NDArray[np.float32]


class Oracle(StrEnum):
    """Who is asked."""

    TRANSFORMERS = "transformers"
    OPTIMUM = "optimum"


def verify_against(oracle: Oracle, checkpoint: Checkpoint, *, progress: Progress) -> dict[str, Any]:
    """Compare the fp32 graph of a checkpoint with an oracle.

    Needs room for three float32 copies of the model in the temporary folder (``TMPDIR``) and one in memory.

    Returns:
        oracle, version, largest_logit, max_difference (relative to that), and the same by phase.

    Raises:
        ConfigError: the oracle is not installed here.
        ExportError: the difference is larger than :data:`TOLERANCE`, or :data:`STATE_TOLERANCE`.
    """
    architecture = architecture_for(checkpoint.config)
    _require(oracle, architecture)
    ids = np.random.default_rng(_SEED).integers(0, checkpoint.vocab_ids(), _PREFILL + _DECODE)
    with tempfile.TemporaryDirectory(prefix="qwedge-oracle-") as scratch, disk_errors():
        folder = Path(scratch) / "checkpoint"
        write_folder(checkpoint, folder)
        with step(progress, f"asking {oracle.value}", None), _quiet(oracle):
            expected = _ORACLES[oracle](folder, Path(scratch), ids)
        graph_folder = Path(scratch) / "graph"
        graph_folder.mkdir()
        build_graph(checkpoint, graph_folder, recipe_named("fp32"), progress=progress)
        differences = _compare(graph_folder, ids, expected)
    worst = max(differences.values())
    if not worst <= (TOLERANCE if architecture.state_layout() is None else STATE_TOLERANCE):
        hint = "this is a defect of qwedge: please report it with the model's name"
        raise ExportError(f"the fp32 graph differs from {oracle.value} by {worst:.1e}: {differences}", hint=hint)
    package = {Oracle.TRANSFORMERS: "transformers", Oracle.OPTIMUM: "optimum-onnx"}[oracle]
    return {
        "oracle": oracle.value,
        "version": version(package),
        "largest_logit": float(np.abs(expected).max()),
        "max_difference": worst,
        "by_phase": differences,
    }


def write_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint as a Hugging Face folder in float32, so that any library can load it."""
    folder.mkdir(parents=True)
    # transformers 4 reads rope_theta here only, transformers 5 writes it into rope_parameters.
    architecture = architecture_for(checkpoint.config)
    config = {**checkpoint.config, "rope_theta": architecture.rope_theta, "dtype": "float32"}
    config.pop("torch_dtype", None)
    names = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_5": "Qwen3_5ForCausalLM"}
    config["architectures"] = [names[architecture.model_type]]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(checkpoint.tokenizer_json())
    tensors = {name: checkpoint.rows(name) for name in architecture.tensors()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _require(oracle: Oracle, architecture: Architecture) -> None:
    recurrent = architecture.state_layout() is not None
    hint = "run --verify transformers in an environment with transformers 5"
    if recurrent and oracle is Oracle.OPTIMUM:
        raise ConfigError(f"optimum knows no {architecture.model_type}", hint=hint, param="verify")
    for module in ("torch", "transformers", *(["optimum.onnxruntime"] if oracle is Oracle.OPTIMUM else [])):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            where = "run it in an environment with qwedge[optimum] (in the source tree: make oracle)"
            raise ConfigError(f"--verify {oracle.value} needs {module}, which is not installed", hint=where) from None
    if recurrent and (found := version("transformers")).startswith("4."):
        raise ConfigError(f"transformers {found} knows no {architecture.model_type}", hint=hint, param="verify")


@contextmanager
def _quiet(oracle: Oracle) -> Iterator[None]:
    """Keep the libraries' remarks about tracing and deprecations out of our output."""
    importlib.import_module("transformers").logging.set_verbosity_error()
    if oracle is Oracle.OPTIMUM:
        importlib.import_module("optimum.utils.logging").set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _ask_transformers(folder: Path, scratch: Path, ids: NDArray[np.int64]) -> Logits:
    del scratch
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    with torch.no_grad():
        logits: Logits = model(torch.from_numpy(ids[None])).logits[0].numpy()
    return logits


def _ask_optimum(folder: Path, scratch: Path, ids: NDArray[np.int64]) -> Logits:
    torch = importlib.import_module("torch")
    exporters, runtime = (
        importlib.import_module("optimum.exporters.onnx"),
        importlib.import_module("optimum.onnxruntime"),
    )
    # Its own validation asks for 1e-5 absolute, which no real model reaches: ours follows.
    exporters.main_export(
        str(folder), output=scratch / "optimum", task="text-generation-with-past", do_validation=False
    )
    model = runtime.ORTModelForCausalLM.from_pretrained(scratch / "optimum")
    # It derives the head dimension from the hidden size, which is wrong for Qwen3.
    model.embed_size_per_head = getattr(model.config, "head_dim", None) or model.embed_size_per_head
    logits, past, start = [], None, 0
    for size in [_PREFILL] + [1] * _DECODE:
        chunk = torch.from_numpy(ids[None, start : start + size])
        mask = torch.ones(1, start + size, dtype=torch.int64)
        answer = model(chunk, attention_mask=mask, past_key_values=past, use_cache=True)
        logits.append(answer.logits[0].numpy())
        past, start = answer.past_key_values, start + size
    return np.concatenate(logits)


class Decoder:
    """A graph as plain onnxruntime runs it: no shared buffers.

    Args:
        folder: of the graph.
        batch: sequences that it carries, all of one length.
    """

    def __init__(self, folder: Path, batch: int = 1) -> None:
        self._session = ort.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        pasts = [value for value in self._session.get_inputs() if value.name.startswith("past")]
        self._memory = {value.name: _empty(value, batch) for value in pasts}
        self._past = 0

    def append(self, ids: NDArray[np.int64]) -> Logits:
        """Append tokens [n] or [batch, n]; returns the logits [batch * n, padded_vocab] of all of them."""
        ids = np.atleast_2d(ids)
        total = self._past + ids.shape[1]
        inputs = {
            "input_ids": ids,
            "seqlens_k": np.full(len(ids), total - 1, np.int32),
            "total_sequence_length": np.array(total, np.int32),
            "logits_indices": np.arange(ids.size, dtype=np.int64),
        }
        results = dict(zip(self._outputs, self._session.run(None, {**inputs, **self._memory}), strict=True))
        logits: Logits = results.pop("logits")
        self._memory = {past: results[present_name(past)] for past in self._memory}
        self._past = total
        return logits


def _empty(value: ort.NodeArg, batch: int) -> NDArray[Any]:
    """A past without tokens."""
    dtype = {"tensor(float)": np.float32, "tensor(int8)": np.int8}[value.type]
    # A cache has a free length; a state has none.
    return np.zeros([batch, *(dim if isinstance(dim, int) else 0 for dim in value.shape[1:])], dtype)


_ORACLES: dict[Oracle, Callable[[Path, Path, NDArray[np.int64]], Logits]] = {
    Oracle.TRANSFORMERS: _ask_transformers,
    Oracle.OPTIMUM: _ask_optimum,
}


def _compare(folder: Path, ids: NDArray[np.int64], expected: Logits) -> dict[str, float]:
    schedules = {
        "prefill": [_PREFILL],
        "decode": [_PREFILL] + [1] * _DECODE,
        "chunked": [_CHUNK] * ((_PREFILL + _DECODE) // _CHUNK),
    }
    scale = float(np.abs(expected).max())
    differences = {}
    for phase, sizes in schedules.items():
        decoder, start, found = Decoder(folder), 0, []
        for size in sizes:
            found.append(decoder.append(ids[start : start + size]))
            start += size
        differences[phase] = float(np.abs(np.concatenate(found) - expected[:start]).max()) / scale
    return differences
