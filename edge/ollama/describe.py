"""Models as Ollama's clients list them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from edge.bundle import WEIGHTS
from edge.chat import ChatTemplate
from edge.model import Model
from edge.ollama.translate import OPTION_OF, tagged_name

_PROBE = "qwedge-probe"
_FOREVER = "9999-12-31T23:59:59Z"


def describe_entry(model: Model, name: str) -> dict[str, Any]:
    """An entry of ``/api/tags``.

    Args:
        model: what is served.
        name: of the model, or of the model with an adapter.
    """
    files = model.manifest.files
    return {
        "name": tagged_name(name),
        "model": tagged_name(name),
        "modified_at": datetime.fromtimestamp(model.loaded_at, UTC).isoformat(),
        "size": sum(file.size for file in files),
        "digest": next(file.sha256 for file in files if file.path == WEIGHTS),
        "details": _details(model),
    }


def describe_loaded(model: Model, name: str) -> dict[str, Any]:
    """An entry of ``/api/ps``: a model that is in memory."""
    return describe_entry(model, name) | {
        "expires_at": _FOREVER,
        "size_vram": 0,
        "context_length": model.context_length,
    }


def describe_model(model: Model) -> dict[str, Any]:
    """The answer of ``/api/show``."""
    manifest = model.manifest
    kind = manifest.model_type
    return {
        "license": manifest.licence or "",
        "modelfile": f"# {manifest.name} {manifest.version}, an ONNX bundle of qwedge",
        "parameters": "\n".join(
            f"{OPTION_OF.get(name, name):<30} {value}" for name, value in model.sampling_defaults.items()
        ),
        "template": "",
        "details": _details(model),
        "model_info": {
            "general.architecture": kind,
            "general.basename": manifest.name,
            "general.parameter_count": manifest.parameter_count,
            f"{kind}.context_length": model.context_length,
            f"{kind}.block_count": manifest.kv.layers + (manifest.state.layers if manifest.state else 0),
            **({f"{kind}.embedding_length": manifest.hidden_size} if manifest.hidden_size else {}),
            f"{kind}.attention.head_count_kv": manifest.kv.kv_heads,
        },
        "capabilities": list(_capabilities(model)),
        "modified_at": datetime.fromtimestamp(model.loaded_at, UTC).isoformat(),
    }


def _details(model: Model) -> dict[str, Any]:
    manifest = model.manifest
    return {
        "parent_model": "",
        "format": "onnx",
        "family": manifest.model_type,
        "families": [manifest.model_type],
        "parameter_size": _size(manifest.parameter_count),
        "quantization_level": str(manifest.recipe.get("name", "")),
    }


def _size(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 10**9 else f"{count / 1e6:.2f}M"


def _capabilities(model: Model) -> Iterator[str]:
    """What clients may ask for; the template is asked what it knows."""
    yield "completion"
    if model.tokenizer.id_of("<|fim_prefix|>") is not None:
        yield "insert"
    if model.template is not None:
        if _shows_tools(model.template):
            yield "tools"
        if model.template.thinks != "never":
            yield "thinking"


def _shows_tools(template: ChatTemplate) -> bool:
    tool = {"type": "function", "function": {"name": _PROBE, "parameters": {}}}
    return _PROBE in template.render([{"role": "user", "content": "?"}], tools=[tool])
