"""What a model is made of, as far as memory and speed depend on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge.bundle import EXACT_BLOCKS, KVLayout, StateLayout

FLOAT_BITS = 32
PACKED_BLOCK_BYTES = 8
"""Of onnxruntime's own copy of a block: a scale and a sum in float32."""


@dataclass(frozen=True)
class Format:
    """How a matrix' numbers are kept."""

    bits: float
    """Of a weight; 32 is plain float32. A fraction where scales are counted in, as in the K-quants of GGUF."""
    block: int = 1
    """Weights that share a scale."""
    block_bytes: int = PACKED_BLOCK_BYTES
    """What a block takes beside its codes."""

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.bits == FLOAT_BITS

    def fit(self, columns: int) -> Format:
        """This format with the largest block that divides ``columns``, but none below 32 (as the export chooses)."""
        block = self.block
        while block > 32 and columns % block:
            block //= 2
        return replace(self, block=block)

    def num_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix, with whole blocks."""
        if self.is_float:
            return rows * columns * 4
        blocks = rows * -(-columns // self.block)
        return int(blocks * self.block * self.bits / 8) + blocks * self.block_bytes


@dataclass(frozen=True)
class Product:
    """Matrices of one size and format that tokens are multiplied by."""

    rows: int
    columns: int
    form: Format
    count: int = 1

    @property
    def num_weights(self) -> int:
        """Of all of them."""
        return self.count * self.rows * self.columns

    @property
    def num_blocks(self) -> int:
        """Of all of them; floats have none."""
        return 0 if self.form.is_float else self.count * self.rows * -(-self.columns // self.form.block)

    @property
    def num_bytes(self) -> int:
        """Of all of them, as a step reads them."""
        return self.count * self.form.num_bytes(self.rows, self.columns)


@dataclass(frozen=True)
class Shape:
    """A model in a recipe."""

    name: str
    recipe: str
    layers: tuple[Product, ...]
    """What every token is multiplied by."""
    head: Product
    """What only positions that get logits are multiplied by."""
    correction: Product | None
    """And a few of their channels, where the head is in two stages."""
    table: Product
    """The embedding: single rows are read, straight from the file."""
    candidates: int
    """Rows of the table that each position reads for exact logits; 0 where the head is in one stage."""
    num_layers: int
    num_heads: int
    """Query heads of full attention."""
    hidden_size: int
    vocab_size: int
    """Ids of the tokenizer."""
    context_length: int
    """The longest one that it was made for."""
    kv: KVLayout
    state: StateLayout | None
    converted_bytes: int
    """Scales that are stored in float16, as onnxruntime keeps them in float32 beside the packed weights."""
    disk_bytes: int
    """Of the bundle."""

    @property
    def products(self) -> tuple[Product, ...]:
        """What a decode step computes."""
        return (*self.layers, *self.heads)

    @property
    def heads(self) -> tuple[Product, ...]:
        """What is computed of a position that gets logits."""
        return (self.head,) if self.correction is None else (self.head, self.correction)

    @property
    def padded_vocab_size(self) -> int:
        """Width of the logits."""
        return self.head.rows

    @property
    def widest(self) -> int:
        """Columns of the widest activations: gate and up together."""
        return max(product.rows for product in self.layers)

    @property
    def row_multiple(self) -> int:
        """Rows that a decode step has a multiple of, as the manifest of a bundle says it."""
        quantized = [product.form for product in self.layers if not product.form.is_float]
        exact = all(form.block <= EXACT_BLOCKS.get(int(form.bits), 0) for form in quantized)
        return 1 if quantized and exact else 2

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a decode step reads."""
        row = self.table.num_bytes // self.table.rows
        return sum(product.num_bytes for product in self.products) + self.candidates * row

    @property
    def attention_flops(self) -> int:
        """Floating-point operations of one token's attention for each token before it, all layers."""
        return 4 * self.kv.layers * self.num_heads * self.kv.head_dim
