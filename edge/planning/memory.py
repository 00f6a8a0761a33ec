"""What a model takes in memory: the formulas of docs/planning.md.

Three states count. *Loading*: the weights are being packed while the vocabulary is read. *Loaded*: nobody asks.
*At work*: so many sequences of so many tokens. Pages of files (libraries, rows of the embedding) are listed apart, for
the system takes them back when memory is short: they are part of RSS, and of no limit.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from edge.bundle import KVLayout, Manifest, StateLayout
from edge.bundle.rotary import rotary_positions
from edge.planning.shape import Product, Shape
from edge.settings.engine import EngineSettings

DEFAULT_CONTEXT = 4096
"""Tokens of one conversation where neither settings nor bundle ask for less; it bounds what the cache can take."""
DEFAULT_PREFIX_BYTES = 64 << 20
DEFAULT_PREFIX_STATES = 4
"""What past prompts may take where the settings do not say it."""

STATES = "states"
"""The part of :class:`Memory` that is beside the keys and values, in one budget with them."""

# Measured on x86-64 with Python 3.11 and onnxruntime 1.31.1, see docs/planning.md.
_PYTHON_BYTES = 60_000_000
_LIBRARY_BYTES = 50_000_000
_SESSION_BYTES = 5_600_000
_BYTES_PER_ID = 290
"""Of the tokenizer, once its crumbs are gone."""
_READING_BYTES_PER_ID = 960
"""Of the tokenizer while it is read, with the crumbs."""
_GRAMMAR_BYTES_PER_ID = 105
_FLOAT = 4
_SCRATCH_WIDTHS = 3
"""How many activations as wide as gate and up together are alive at once."""
_SCRATCH_HIDDEN = 4
_CANDIDATE_COPIES = 3
"""Of a candidate's row of the table, as floats: its upper bits, its lower bits, and both together."""
_STATES_PER_SLOT = 2
"""A sequence whose guesses are being verified has two states."""


@dataclass(frozen=True)
class Serving:
    """How a model is served, as far as memory depends on it."""

    context: int
    """Most tokens of a sequence."""
    slots: int
    """Sequences at once."""
    prefix_bytes: int
    """For past prompts."""
    prefill_chunk: int = 256
    draft_tokens: int = 8
    kv_bytes: int | None = None
    """Most for keys, values and states; None = as much as all slots can hold."""

    @classmethod
    def of(cls, options: EngineSettings, shape: Manifest | Shape) -> Serving:
        """What the settings say, and the defaults where they say nothing."""
        return cls(
            context=options.context or min(DEFAULT_CONTEXT, shape.context_length),
            slots=options.slots,
            prefix_bytes=prefix_budget(options, shape.state),
            prefill_chunk=options.prefill_chunk,
            draft_tokens=options.draft_tokens,
            kv_bytes=None if options.kv_cache_mb is None else options.kv_cache_mb << 20,
        )


@dataclass(frozen=True)
class Part:
    """One line of the budget."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Memory:
    """A budget."""

    fixed: tuple[Part, ...]
    """There once the model is loaded."""
    work: tuple[Part, ...]
    """Comes with requests: at most this much."""
    reading: Part
    """While the model is loaded, beyond what stays."""
    files: tuple[Part, ...]
    """Pages of files: the system can take them back."""

    @property
    def loaded(self) -> int:
        """Bytes of the idle server."""
        return _total(self.fixed)

    @property
    def loading(self) -> int:
        """Most bytes while the model is loaded."""
        return self.loaded + self.reading.num_bytes

    @property
    def at_work(self) -> int:
        """Bytes with everything in use."""
        return self.loaded + _total(self.work)

    @property
    def peak(self) -> int:
        """Most bytes at any time."""
        return max(self.loading, self.at_work)

    @property
    def resident(self) -> int:
        """What the system shows as the process' memory with everything in use (PSS, or RSS where nothing is shared)."""
        return self.at_work + _total(self.files)


def prefix_budget(options: EngineSettings, state: StateLayout | None) -> int:
    """Bytes that past prompts may take."""
    if options.prefix_cache_mb is not None:
        return options.prefix_cache_mb << 20
    # A state is as large as the keys and values of hundreds of tokens, and each entry has one.
    return DEFAULT_PREFIX_BYTES + (0 if state is None else DEFAULT_PREFIX_STATES * state.bytes_per_slot)


def predict_memory(shape: Shape, serving: Serving, *, int8: bool = True, fills: Sequence[int] | None = None) -> Memory:
    """The memory of a model that is served.

    Args:
        shape: the model.
        serving: how.
        int8: whether the processor has onnxruntime's kernels for int8 activations, see :func:`packed_bytes`.
        fills: tokens of the sequences at work; None = every slot full, and the cache of past prompts too.
    """
    fixed = (
        Part("weights, packed", sum(packed_bytes(product, int8=int8) for product in shape.products)),
        Part("scales, converted", shape.converted_bytes),
        Part("rotary tables", _FLOAT * rotary_positions(serving.context) * shape.kv.head_dim),
        Part("onnxruntime", _SESSION_BYTES),
        Part("tokenizer", _BYTES_PER_ID * shape.vocab_size),
        Part("Python and libraries", _PYTHON_BYTES),
    )
    work = (
        Part("keys and values", _cache_bytes(shape, serving, fills)),
        Part(STATES, _state_bytes(shape, serving, fills)),
        Part("past prompts", _past_bytes(shape, serving, fills)),
        Part("a step's activations", _scratch_bytes(shape, serving, int8=int8)),
        Part("logits", _logits_bytes(shape, serving, fills)),
        Part("rows of candidates", _candidate_bytes(shape, serving, fills)),
        *([] if fills else [Part("grammars", _GRAMMAR_BYTES_PER_ID * shape.vocab_size)]),
    )
    reading = Part("reading the vocabulary", (_READING_BYTES_PER_ID - _BYTES_PER_ID) * shape.vocab_size)
    return Memory(_present(fixed), _present(work), reading, _files(shape, int8=int8))


def packed_bytes(product: Product, *, int8: bool) -> int:
    """Bytes of onnxruntime's own copy of some weights.

    With int8 kernels: codes, and of each block a scale and a sum in float32. Without them 4-bit weights are copied
    without scales, which stay in the file, and 8-bit ones not at all: each use dequantizes the file's.
    """
    if int8 or product.form.is_float:
        return product.num_bytes
    if product.form.bits == 8:
        return 0
    return replace(product, form=replace(product.form, block_bytes=0)).num_bytes


def kv_bytes(layout: KVLayout, num_tokens: int, context: int) -> int:
    """Bytes of one sequence's keys and values: the pages that they touch.

    Args:
        layout: of the cache.
        num_tokens: of the sequence.
        context: most tokens of one: heads lie as far apart in an array, which begins with a page.
    """
    token = layout.bytes_per_token // (2 * layout.layers * layout.kv_heads)
    per_page = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, token * layout.kv_heads)
    stride = -(-(context + 1) // per_page) * per_page * token
    pages = last = 0
    for begin in range(0, stride * layout.kv_heads, stride):
        first = max(last, begin // mmap.PAGESIZE)  # two heads may share a page
        last = -(-(begin + num_tokens * token) // mmap.PAGESIZE)
        pages += last - first
    return 2 * layout.layers * pages * mmap.PAGESIZE


def one_conversation(serving: Serving) -> Serving:
    """The least that a server must be able to do: a single sequence up to its context, nothing kept of past ones."""
    return replace(serving, slots=1, prefix_bytes=0)


def _cache_bytes(shape: Shape, serving: Serving, fills: Sequence[int] | None) -> int:
    lengths = [serving.context] * serving.slots if fills is None else fills
    full = sum(kv_bytes(shape.kv, length, serving.context) for length in lengths)
    if serving.kv_bytes is None:
        return full
    return min(full, max(0, serving.kv_bytes - _state_bytes(shape, serving, fills)))


def _state_bytes(shape: Shape, serving: Serving, fills: Sequence[int] | None) -> int:
    if shape.state is None:
        return 0
    return _STATES_PER_SLOT * (serving.slots if fills is None else len(fills)) * shape.state.bytes_per_slot


def _past_bytes(shape: Shape, serving: Serving, fills: Sequence[int] | None) -> int:
    """The cache's budget; or as many of the sequences as it keeps, and the newest while it pushes out the oldest."""
    if fills is None:
        return serving.prefix_bytes
    state = shape.state.bytes_per_slot if shape.state else 0
    sizes = [shape.kv.bytes_per_token * length + state for length in fills]
    kept = 0
    for size in (size for size in sizes if size <= serving.prefix_bytes):
        if kept + size > serving.prefix_bytes:
            return kept + size
        kept += size
    return kept


def _scratch_bytes(shape: Shape, serving: Serving, *, int8: bool) -> int:
    width = _SCRATCH_WIDTHS * shape.widest + _SCRATCH_HIDDEN * shape.hidden_size
    dequantized = [product for product in shape.products if not int8 and product.form.bits == 8]
    largest = max((product.rows * product.columns for product in dequantized), default=0)
    return _FLOAT * (serving.prefill_chunk * width + largest)


def _logits_bytes(shape: Shape, serving: Serving, fills: Sequence[int] | None) -> int:
    """The engine's rows, and two more of each in onnxruntime: coarse ones, and those with the candidates in place."""
    return 3 * _FLOAT * _decode_rows(serving, fills) * shape.padded_vocab_size


def _candidate_bytes(shape: Shape, serving: Serving, fills: Sequence[int] | None) -> int:
    """Those of the tokens whose logits are computed anew, for every row of a step."""
    return _CANDIDATE_COPIES * _FLOAT * _decode_rows(serving, fills) * shape.candidates * shape.hidden_size


def _decode_rows(serving: Serving, fills: Sequence[int] | None) -> int:
    """Most rows of a decode step: one of each sequence, and all guesses."""
    return (serving.slots if fills is None else len(fills)) + serving.draft_tokens


def _files(shape: Shape, *, int8: bool) -> tuple[Part, ...]:
    table = Part("rows of the embedding", shape.table.num_bytes) if shape.candidates else None
    slow = sum(product.num_bytes for product in shape.products if not int8 and product.form.bits == 8)
    parts = (Part("libraries", _LIBRARY_BYTES), table, Part("weights that are read from the file", slow))
    return _present(part for part in parts if part is not None)


def _present(parts: Iterable[Part]) -> tuple[Part, ...]:
    return tuple(part for part in parts if part.num_bytes)


def _total(parts: Sequence[Part]) -> int:
    return sum(part.num_bytes for part in parts)
