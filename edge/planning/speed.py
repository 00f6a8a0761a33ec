"""How fast a model is on a machine: the formulas of docs/planning.md.

A decode step reads every weight once, so memory is its limit; a prompt's tokens share that, so arithmetic is theirs
(the roofline model, Williams et al. 2009, https://doi.org/10.1145/1498765.1498785). What neither explains is counted
per layer and per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge.planning.machine import Machine
from edge.planning.memory import packed_bytes
from edge.planning.shape import PACKED_BLOCK_BYTES, Format, Product, Shape

# Measured on the machine of docs/planning.md, see there; times of `speed` 1.
_LAYER_S = 60e-6
"""Of a layer's operators that are neither products nor attention."""
_STEP_S = 0.5e-3
"""Of Python for a step."""
_GATHERED_S = 2e-9
"""Of a number in the rows of candidates, which one thread makes floats."""
_START_S, _IMPORT_S, _VOCABULARY_S = 0.35, 0.5, 2.8e-6
"""Of Python, the imports, and an id of the vocabulary."""
_HASH_BYTES_PER_S, _PACK_BYTES_PER_S = 1.2e9, 0.9e9
_PROMPT_ATTENTION = 6.0
"""How much faster attention over a chunk is than over a single token, whose keys nobody else reads."""
_PROMPT_STATE = 2.25
"""The same of linear attention."""
_STATE_FLOPS = 6
"""For each number of a state and token: it decays, is read, and changed."""
_ACTIVATION_WIDTHS, _ACTIVATION_HIDDEN = 7.0, 20
"""Activations that a prompt's token reads and writes in a layer, by the widths of gate and up and of the model."""
_FORMAT_SPEED = {(4, 16): 0.5, (4, 32): 0.72, (4, 64): 0.78, (4, 128): 1.0, (8, 32): 0.65, (8, 64): 0.73, (8, 128): 0.8}
"""Products of many rows by bits and block, relative to 4 bits in blocks of 128."""
_OTHER_SPEED, _FLOAT_SPEED = 0.6, 0.3


@dataclass(frozen=True)
class DecodeStep:
    """Seconds of a decode step of one sequence, by what takes them."""

    weights: float
    attention: float
    state: float
    layers: float
    step: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.weights + self.attention + self.state + self.layers + self.step


@dataclass(frozen=True)
class Prefill:
    """Seconds that a prompt takes, by what takes them."""

    weights: float
    attention: float
    state: float
    rest: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.weights + self.attention + self.state + self.rest


@dataclass(frozen=True)
class Speed:
    """What a model reaches on a machine."""

    prompt_tokens: int
    prefill: Prefill
    decode: DecodeStep
    load_s: float
    """From the start of the server to its ready line."""
    joules_per_token: float | None
    """Of an answer; None where the machine's power is not known."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of the prompt."""
        return self.prompt_tokens / self.prefill.seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Just after the prompt."""
        return 1 / self.decode.seconds

    @property
    def first_token_s(self) -> float:
        """From the prompt to the first token of the answer, which the prompt's last step gives."""
        return self.prefill.seconds


def predict_speed(shape: Shape, machine: Machine, *, prompt_tokens: int, output_tokens: int = 0) -> Speed:
    """What one sequence at a time reaches.

    Args:
        shape: the model.
        machine: where it runs.
        prompt_tokens: length of the prompt.
        output_tokens: length of the answer, in whose middle decoding is looked at.
    """
    decode = _decode(shape, machine, prompt_tokens + output_tokens // 2)
    return Speed(
        prompt_tokens=prompt_tokens,
        prefill=_prefill(shape, machine, prompt_tokens),
        decode=decode,
        load_s=_load_s(shape, machine),
        joules_per_token=None if machine.power_w is None else machine.power_w * decode.seconds,
    )


def _decode(shape: Shape, machine: Machine, past: int) -> DecodeStep:
    products = sum(_read_s(product, machine) for product in shape.products)
    gathered_s = _GATHERED_S * shape.candidates * shape.hidden_size / machine.speed
    return DecodeStep(
        weights=products + gathered_s,
        attention=shape.attention_flops * past / (machine.attention_gflops * 1e9),
        state=_state_s(shape, machine),
        layers=shape.num_layers * _LAYER_S / machine.speed,
        step=_STEP_S / machine.speed,
    )


def _prefill(shape: Shape, machine: Machine, num_tokens: int) -> Prefill:
    products = sum(_multiply_s(product, machine, num_tokens) for product in shape.layers)
    # Each token attends to all before it: half of the prompt on average.
    attended = shape.attention_flops * num_tokens * num_tokens / 2
    width = _ACTIVATION_WIDTHS * shape.widest + _ACTIVATION_HIDDEN * shape.hidden_size
    activations = 4 * width * shape.num_layers * num_tokens / (machine.read_gbs * 1e9)
    chunks = math.ceil(num_tokens / 256)
    return Prefill(
        weights=products + sum(_read_s(product, machine) for product in shape.heads),
        attention=attended / (_PROMPT_ATTENTION * machine.attention_gflops * 1e9),
        state=num_tokens * _state_s(shape, machine) / _PROMPT_STATE,
        rest=activations + chunks * (shape.num_layers * _LAYER_S + _STEP_S) / machine.speed,
    )


def _read_s(product: Product, machine: Machine) -> float:
    """Seconds of a product with a single row."""
    read_s = product.num_bytes / (machine.read_gbs * 1e9)
    if machine.int8 or product.form.is_float:
        return read_s
    if product.form.bits == 8:
        return product.num_weights * machine.dequantize_ns * 1e-9
    return max(read_s, 2 * product.num_weights / (machine.gops * 1e9))


def _multiply_s(product: Product, machine: Machine, num_tokens: int) -> float:
    """Seconds of a product with many rows: arithmetic, or reading the weights where the rows are few."""
    dequantize_s = 0.0
    if not machine.int8 and product.form.bits == 8:
        dequantize_s = math.ceil(num_tokens / 256) * product.num_weights * machine.dequantize_ns * 1e-9
    compute_s = operations(product, int8=machine.int8) * num_tokens / (machine.gops * 1e9)
    return dequantize_s + max(compute_s, product.num_bytes / (machine.read_gbs * 1e9))


def operations(product: Product, *, int8: bool) -> float:
    """Of a row, as many as of 4 bits in blocks of 128 would take the same time (``Machine.gops``)."""
    return 2 * product.num_weights / (_format_speed(product.form) if int8 else 1.0)


def _format_speed(form: Format) -> float:
    if form.is_float:
        return _FLOAT_SPEED
    if form.block_bytes != PACKED_BLOCK_BYTES:
        return 1.0  # another runtime's, whose machine is described by what it reaches in just this format
    return _FORMAT_SPEED.get((int(form.bits), form.block), _OTHER_SPEED)


def _state_s(shape: Shape, machine: Machine) -> float:
    if shape.state is None:
        return 0.0
    return _STATE_FLOPS * shape.state.bytes_per_slot / 4 / (machine.attention_gflops * 1e9)


def _load_s(shape: Shape, machine: Machine) -> float:
    """Hashing beside the imports, then packing beside the vocabulary (``edge.commands.loading``)."""
    verify_s = shape.disk_bytes / min(machine.storage_mbs * 1e6, _HASH_BYTES_PER_S * machine.speed)
    packed = sum(packed_bytes(product, int8=machine.int8) for product in shape.products)
    pack_s = packed / (_PACK_BYTES_PER_S * machine.speed)
    vocabulary_s = _VOCABULARY_S * shape.vocab_size / machine.speed
    return _START_S / machine.speed + max(verify_s, _IMPORT_S / machine.speed) + max(pack_s, vocabulary_s)
