"""A decoder as an ONNX graph: the contract with the runtime, and the vocabulary that architectures are written in.

The contract (docs/bundle-format.md):

=================================  ==================================  ================================================
input                              shape                               meaning
=================================  ==================================  ================================================
``input_ids``                      [batch, sequence] int64             tokens to append
``seqlens_k``                      [batch] int32                       tokens per row after this step, minus one; with
                                                                       linear attention one for each row of the cache,
                                                                       of which a sequence may have as many as tokens
``total_sequence_length``          [] int32                            the largest of those, plus one
``logits_indices``                 [positions] int64                   rows of the flattened [batch * sequence] hidden
                                                                       states that get logits
``past_key_values.{i}.key/value``  [batch, kv_heads, max_length,       the cache of layer i of those with full attention
                                   head_dim] float32, or int8 once
                                                                       ``export.kv_scales`` has changed it
``past_conv.{i}``                  [batch, channels, kernel - 1]       the state of layer i of those with linear
                                   float32                             attention: the last inputs of its convolution
``past_recurrent.{i}``             [batch, value_heads, key_dim,       and the matrices of its recurrence
                                   value_dim] float32
=================================  ==================================  ================================================

``export.lora`` adds further inputs where adapters are wanted.

Outputs: ``logits`` [positions, padded_vocab]; ``present.{i}.key/value``, which share their buffers with the past;
``present_conv.{i}`` and ``present_recurrent.{i}``, which may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge.bundle.rotary import POSITIONS
from export.quantize.recipes import Blockwise, Format
from export.weights import Change, Matrix, Rounding, Split, Weights, to_nearest

OPSET = 23
"""The first with RMSNormalization."""
HIDDEN = "hidden"
"""``hidden.{i}`` goes into layer i: where the graph can be cut."""
MIDDLE = "middle"
"""``middle.{i}`` lies between attention and MLP of layer i."""
HIDDEN_STATES = "hidden_states"
"""Output: what the layers have made of every position [batch, sequence, hidden], normalized; for embeddings."""
FINAL_HIDDEN = "final_hidden"
"""What goes into the head [positions, hidden]."""
COARSE_LOGITS = "coarse_logits"
"""What a head in two stages chooses its candidates by [positions, padded_vocab]."""
ROTARY_FREQUENCIES = "rotary.frequencies"
"""Constant: radians from one position to the next, in float64 [rotary_dim / 2]."""
_CONTRIB = "com.microsoft"
_IR_VERSION = 10

Tensor = ir.Value | None
"""A value of the graph; None stands for an optional input left out."""
Adapt = Callable[["GraphBuilder", ir.Value, ir.Value, Sequence[str]], ir.Value]
"""From graph, input, product and the names of the weights to what takes the product's place."""
Observe = Callable[["GraphBuilder", ir.Value, str, Format], Rounding]
"""From graph, input, name and format of a linear to how its weights are rounded."""


def present_name(past: str) -> str:
    """The output that takes the place of an input: ``present.0.key`` of ``past_key_values.0.key``."""
    return past.replace("past", "present").replace("_key_values", "")


class GraphBuilder:
    """Collects nodes, initializers, inputs and outputs of one decoder graph.

    Args:
        weights: source of all parameters.
        adapt: what is done to the products of all linears, as :meth:`export.lora.LoraPlaces.adapt` does.
        observe: chooses how a linear is rounded by its inputs, as :meth:`export.calibration.Calibration.observe` does;
            None rounds to nearest.
    """

    def __init__(self, weights: Weights, adapt: Adapt | None = None, observe: Observe | None = None) -> None:
        self.weights = weights
        self._adapt = adapt
        self._observe = observe
        self.matrix_bytes = 0
        """Bytes of the matrices added by :meth:`linear`."""
        self._file = weights.file
        self._graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, _CONTRIB: 1})
        self._cast: dict[str, ir.Value] = {}
        """Scales that are stored in float16, by name, as the kernels want them."""
        self.cuts: list[ir.Value] = []
        """Values made by :meth:`cut` so far."""
        self.input_ids = self.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        self.seqlens_k = self.input("seqlens_k", ir.DataType.INT32, ["batch"])
        self.total_sequence_length = self.input("total_sequence_length", ir.DataType.INT32, [])
        self.logits_indices = self.input("logits_indices", ir.DataType.INT64, ["positions"])

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add a graph input."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make ``value`` a graph output called ``name``."""
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self._graph.outputs.append(value)

    def op(self, op_type: str, inputs: Sequence[Tensor], *, contrib: bool = False, **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self.ops(op_type, inputs, 1, contrib=contrib, **attributes)[0]

    def ops(
        self, op_type: str, inputs: Sequence[Tensor], count: int, *, contrib: bool = False, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a node with ``count`` outputs."""
        domain = _CONTRIB if contrib else ""
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=count)
        node.name = f"{op_type}_{len(self._graph)}"
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}.{i}"
        self._graph.append(node)
        return node.outputs

    def cut(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> ir.Value:
        """Name and type a float32 ``value`` so that the graph can be taken apart there."""
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        self.cuts.append(value)
        return value

    def constant(self, name: str, values: Sequence[int]) -> ir.Value:
        """A small int64 constant, kept in the graph itself."""
        return self._constant(name, np.asarray(values, dtype=np.int64))

    def scalar(self, name: str, number: int) -> ir.Value:
        """A constant without dimensions."""
        return self._constant(name, np.asarray(number, dtype=np.int64))

    def rotary_tables(self, rotary_dim: int, theta: float, length: int) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines [length, rotary_dim / 2] of the rotary embedding (Su et al. 2021), computed in float64.

        onnxruntime does that once, when it loads the graph. The number of positions is no constant of the graph but in
        the data file, so that a runtime can put a smaller one in its place.
        """
        frequencies = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
        positions = self._register(self._file.add(POSITIONS, np.array(length, np.int64)))
        # With float64 as positions there, shape inference would look for their number, and does not read data files.
        limit = self.op("Cast", [positions], to=ir.DataType.DOUBLE)
        ends = [self._constant(f"rotary.{name}", np.array(at, np.float64)) for name, at in (("first", 0), ("step", 1))]
        column = self.op(
            "Reshape", [self.op("Range", [ends[0], limit, ends[1]]), self.constant("rotary.column", [-1, 1])]
        )
        angles = self.op("Mul", [column, self._constant(ROTARY_FREQUENCIES, frequencies)])
        cos, sin = (self.op("Cast", [self.op(kind, [angles])], to=ir.DataType.FLOAT) for kind in ("Cos", "Sin"))
        return cos, sin

    def vector(self, name: str, sources: Sequence[str], change: Change | None = None) -> ir.Value:
        """A float32 parameter that is no matrix: the tensors ``sources`` end to end, after ``change``."""
        return self._register(self.weights.vector(name, sources, change))

    def floats(self, name: str, values: NDArray[np.float32]) -> ir.Value:
        """A small float32 constant, kept in the graph itself."""
        return self._constant(name, values)

    def rms_norm(self, x: ir.Value, weight: str, epsilon: float, change: Change | None = None) -> ir.Value:
        """RMS normalization over the last axis (Zhang & Sennrich 2019)."""
        return self.op("RMSNormalization", [x, self.vector(weight, [weight], change)], axis=-1, epsilon=epsilon)

    def silu(self, x: ir.Value) -> ir.Value:
        """Multiply ``x`` by its sigmoid, in one pass: QuickGelu with alpha 1 is that."""
        return self.op("QuickGelu", [x], contrib=True, alpha=1.0)

    def linear(
        self, x: ir.Value, name: str, form: Format, sources: Sequence[str], bias: Sequence[str] = ()
    ) -> ir.Value:
        """``x @ W.T + b`` with W the rows of ``sources`` stacked: projections of one input share one kernel call.

        Where the checkpoint has integers already, they are kept, whatever ``form`` says.
        """
        matrix = self.weights.stored_matrix(name, sources) if isinstance(form, Blockwise) else None
        if matrix is None:
            rounding = self._observe(self, x, name, form) if self._observe else to_nearest
            matrix = self.weights.matrix(name, sources, form, rounding)
        self.matrix_bytes += matrix.num_bytes
        product = self.matmul(x, matrix, self.vector(f"{name}.bias", bias) if bias else None)
        return product if self._adapt is None else self._adapt(self, x, product, sources)

    def matmul(self, x: ir.Value, matrix: Matrix, bias: Tensor = None) -> ir.Value:
        """``x @ matrix.T + bias`` for x [..., columns], of which the matrix may have some only, or in another order."""
        if matrix.order is not None:
            order = self._constant(f"{matrix.parts[0].name}.order", matrix.order)
            x = self.op("Gather", [x, order], axis=-1)
        if not isinstance(matrix.form, Blockwise):
            product = self.op("FusedMatMul", [x, self._register(matrix.parts[0])], contrib=True, transB=1)
            return product if bias is None else self.op("Add", [product, bias])
        return self.op(
            "MatMulNBits",
            [x, self._register(matrix.parts[0]), *self._grid(matrix), None, bias],
            contrib=True,
            K=matrix.columns,
            N=matrix.rows,
            bits=matrix.form.bits,
            block_size=matrix.form.block,
            accuracy_level=self.weights.recipe.accuracy_level,
        )

    def rows(self, ids: ir.Value, matrix: Matrix | Split) -> ir.Value:
        """Rows of a matrix by their numbers: ``ids`` [a, b] -> [a, b, columns]."""
        if isinstance(matrix, Split):
            # Divided by a power of two a float is exact, and so is the sum.
            part = self.floats("lower_part", np.array(1 / matrix.lower_codes, np.float32))
            rest = self.op("Mul", [self.rows(ids, matrix.lower), part])
            return self.op("Add", [self.rows(ids, matrix.upper), rest])
        if not isinstance(matrix.form, Blockwise):
            return self.op("Gather", [self._register(matrix.parts[0]), ids], axis=0)
        codes = matrix.parts[0]
        # GatherBlockQuantized wants [rows, bytes]: the same bytes under a second name and shape, one copy on disk.
        flat = self._alias(codes, f"{codes.name}.rows", [matrix.rows, matrix.columns * matrix.form.bits // 8])
        inputs = [self._register(flat), ids, *self._grid(matrix)]
        attributes = {"bits": matrix.form.bits, "block_size": matrix.form.block}
        return self.op("GatherBlockQuantized", inputs, contrib=True, gather_axis=0, quantize_axis=1, **attributes)

    def _grid(self, matrix: Matrix) -> tuple[ir.Value, Tensor]:
        """Scales and zero points of a matrix as the kernels want them; onnxruntime converts scales when it loads."""
        scales, *zero_points = (self._register(part) for part in matrix.parts[1:])
        name = str(scales.name)
        if scales.dtype == ir.DataType.FLOAT16 and name not in self._cast:
            self._cast[name] = self.op("Cast", [scales], to=ir.DataType.FLOAT)
        return self._cast.get(name, scales), zero_points[0] if zero_points else None

    def fit(self, matrix: Matrix | Split, x: ir.Value, name: str, source: str) -> None:
        """Round a table that is in the data file already for its use as the head of ``x``, where that is observed."""
        if self._observe is None or isinstance(matrix, Split):
            return
        rounding = self._observe(self, x, name, matrix.form)
        if rounding is not to_nearest:
            self.weights.round_again(matrix, source, rounding)

    def coarse(self, x: ir.Value, matrix: Split) -> ir.Value:
        """About ``x @ matrix.T`` for x [positions, columns]; the nearer, the more of x is in the corrected columns."""
        assert matrix.correction is not None
        return self.op("Add", [self.matmul(x, matrix.upper), self.matmul(x, matrix.correction)])

    def rescored(self, coarse: ir.Value, x: ir.Value, matrix: Matrix | Split, candidates: int) -> ir.Value:
        """Logits whose largest few are exact.

        Only the candidates' rows of the matrix are read, straight from the data file: of the matrix itself there is no
        packed copy in memory. The products of one position do not depend on how many there are.

        Args:
            coarse: logits of a coarse copy of the matrix [positions, rows].
            x: what they were computed from [positions, columns].
            matrix: the table.
            candidates: logits per position that are computed anew.
        """
        count = self.constant("candidates", [min(candidates, matrix.rows)])
        _, ids = self.ops("TopK", [coarse, count], 2, axis=-1, sorted=0)
        last = self.constant("last_axis", [-1])
        exact = self.op("MatMul", [self.rows(ids, matrix), self.op("Unsqueeze", [x, last])])
        return self.op("ScatterElements", [coarse, ids, self.op("Squeeze", [exact, last])], axis=-1)

    def kv_cache(self, layer: int, kv_heads: int, head_dim: int) -> tuple[ir.Value, ir.Value]:
        """The past keys and values of a layer, as graph inputs [batch, kv_heads, max_length, head_dim]."""
        shape: list[int | str] = ["batch", kv_heads, "max_length", head_dim]
        key = self.input(f"past_key_values.{layer}.key", ir.DataType.FLOAT, shape)
        value = self.input(f"past_key_values.{layer}.value", ir.DataType.FLOAT, shape)
        return key, value

    def attention(
        self,
        layer: int,
        qkv: tuple[ir.Value, Tensor, Tensor],
        rotary: tuple[ir.Value, ir.Value],
        *,
        num_heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> ir.Value:
        """Grouped-query attention with rotary embedding over the layer's cache; adds the cache's inputs and outputs.

        Args:
            layer: its index.
            qkv: query, key and value [batch, sequence, heads * head_dim]; or all three packed in the first.
            rotary: cosine and sine tables.
            num_heads: query heads.
            kv_heads: key and value heads.
            head_dim: width of a head.

        Returns:
            [batch, sequence, num_heads * head_dim].
        """
        key, value = self.kv_cache(layer, kv_heads, head_dim)
        inputs = [*qkv, key, value, self.seqlens_k, self.total_sequence_length, *rotary]
        x, present_key, present_value = self.ops(
            "GroupQueryAttention", inputs, 3, contrib=True, num_heads=num_heads, kv_num_heads=kv_heads, do_rotary=1
        )
        shape: list[int | str] = ["batch", kv_heads, "max_length", head_dim]
        self.output(present_key, f"present.{layer}.key", ir.DataType.FLOAT, shape)
        self.output(present_value, f"present.{layer}.value", ir.DataType.FLOAT, shape)
        return x

    def past_state(self, kind: str, index: int, sizes: Sequence[int]) -> ir.Value:
        """What a layer of linear attention remembers, as a graph input [batch, *sizes]."""
        return self.input(f"past_{kind}.{index}", ir.DataType.FLOAT, ["batch", *sizes])

    def present_state(self, value: ir.Value, kind: str, index: int, sizes: Sequence[int]) -> None:
        """Make ``value`` the output that takes the place of :meth:`past_state` after this step."""
        self.output(value, f"present_{kind}.{index}", ir.DataType.FLOAT, ["batch", *sizes])

    def model(self, name: str) -> ir.Model:
        """The model as far as it is built."""
        self._graph.name = name
        return ir.Model(self._graph, ir_version=_IR_VERSION, producer_name="qwedge")

    def _alias(self, value: ir.Value, name: str, shape: Sequence[int]) -> ir.Value:
        """The same bytes under another name and shape, in whichever data file they are."""
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        same = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(shape), name=name,
            base_dir=tensor.base_dir,
        )  # fmt: skip
        return ir.Value(name=name, shape=same.shape, type=ir.TensorType(same.dtype), const_value=same)

    def _constant(self, name: str, array: NDArray[np.int64] | NDArray[np.float32] | NDArray[np.float64]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        dtype = ir.TensorType(tensor.dtype)
        return self._register(ir.Value(name=name, shape=ir.Shape(array.shape), type=dtype, const_value=tensor))

    def _register(self, value: ir.Value) -> ir.Value:
        """This graph's initializer of the name of ``value``, which may be another graph's: both read the same bytes."""
        assert value.name is not None
        known = self._graph.initializers.get(value.name)
        if known is None:
            known = value
            if value.graph is not None:
                known = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
            self._graph.register_initializer(known)
        return known
