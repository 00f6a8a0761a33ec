"""What llama.cpp changes when it converts Qwen3.5, undone [1].

- Norms are stored as the factor itself, 1 + weight; but the norm of linear attention is that already.
- ``ssm_a`` is ``-exp(A_log)``.
- The convolution has no axis of length one.
- Multi-token prediction is one more layer behind the others.
- Value heads of linear attention are tiled: first the first one of every key head, then the second of every key head.
  The checkpoint has them grouped by key head.

[1] https://github.com/ggml-org/llama.cpp/pull/19468
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import StoredTensor

Floats = NDArray[np.float32]
_LAYER = re.compile(r"(?:model\.layers|blk)\.(\d+)\.(.+)")
_PREDICTION = {
    "nextn.eh_proj.weight": "fc.weight",
    "nextn.enorm.weight": "pre_fc_norm_embedding.weight",
    "nextn.hnorm.weight": "pre_fc_norm_hidden.weight",
    "nextn.shared_head_norm.weight": "norm.weight",
}
"""What the layer of multi-token prediction has beside a usual one."""
_NORM = re.compile(r"(?<!linear_attn\.)norm(_embedding|_hidden)?\.weight$")
_TILED_ROWS = ("in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias")


def name_prediction(num_layers: int, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Name multi-token prediction as the folder does.

    Args:
        num_layers: of the text; those behind are multi-token prediction.
        stored: what the file holds; usual tensors of layers are under Hugging Face names.
    """
    return {_prediction(name, num_layers): tensor for name, tensor in stored.items()}


def restore(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors as Hugging Face stores them.

    Args:
        config: the translated config.
        stored: what the file holds, under Hugging Face names. Tensors of unexpected shapes stay as they are: the
            architecture reports them.
    """
    heads = _ValueHeads(config)
    return {name: heads.grouped(name, _values(name, tensor)) for name, tensor in stored.items()}


def _prediction(name: str, num_layers: int) -> str:
    match = _LAYER.match(name)
    if match is None or int(match[1]) < num_layers:
        return name
    index, part = int(match[1]) - num_layers, match[2]
    return f"mtp.{_PREDICTION[part]}" if part in _PREDICTION and not index else f"mtp.layers.{index}.{part}"


def _values(name: str, tensor: StoredTensor) -> StoredTensor:
    """Undo what was done to each number, and to the shape."""
    if _NORM.search(name):
        return _changed(tensor, _minus_one)
    if name.endswith("A_log"):
        return _changed(tensor, _log_of_minus)
    if name.endswith("conv1d.weight") and len(tensor.info.shape) == 2:
        channels, width = tensor.info.shape
        return replace(tensor, info=replace(tensor.info, shape=(channels, 1, width)))
    return tensor


class _ValueHeads:
    """Puts value heads that share a key head together again."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._key_heads: int = config["linear_num_key_heads"]
        self._value_heads: int = config["linear_num_value_heads"]
        self._value_dim: int = config["linear_value_head_dim"]
        self._keys_size: int = 2 * self._key_heads * config["linear_key_head_dim"]

    def grouped(self, name: str, tensor: StoredTensor) -> StoredTensor:
        """The tensor with its rows, or columns, in the order of the checkpoint."""
        if ".linear_attn." not in name or self._value_heads % self._key_heads:
            return tensor
        part = name.partition(".linear_attn.")[2]
        values, shape = self._value_heads * self._value_dim, tensor.info.shape
        if part == "out_proj.weight" and shape[1:] == (values,):
            return _changed(tensor, self._columns)
        if part in ("in_proj_qkv.weight", "conv1d.weight") and shape[0] == self._keys_size + values:
            kept = np.arange(self._keys_size)
            return replace(tensor, order=np.concatenate([kept, self._keys_size + self._places(self._value_dim)]))
        if part in _TILED_ROWS and shape[0] in (values, self._value_heads):
            return replace(tensor, order=self._places(shape[0] // self._value_heads))
        return tensor

    def _places(self, width: int) -> NDArray[np.int64]:
        """Where each of the rows of the value heads, ``width`` a head, stands in the file."""
        tiled = np.arange(self._value_heads * width).reshape(-1, self._key_heads, width)
        return np.ascontiguousarray(tiled.swapaxes(0, 1)).reshape(-1)

    def _columns(self, values: Floats) -> Floats:
        return values.reshape(-1, self._value_heads * self._value_dim)[:, self._places(self._value_dim)]


def _changed(tensor: StoredTensor, change: Callable[[Floats], Floats]) -> StoredTensor:
    decode = tensor.decode
    return replace(tensor, decode=lambda raw: change(decode(raw)))


def _minus_one(factor: Floats) -> Floats:
    return factor - np.float32(1.0)


def _log_of_minus(decay: Floats) -> Floats:
    # What a damaged file holds need not be negative; the export's own checks find the NaN.
    with np.errstate(all="ignore"):
        return np.log(-decay.astype(np.float64)).astype(np.float32)
