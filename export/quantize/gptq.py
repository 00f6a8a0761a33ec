"""GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323): rounding that makes up for its own errors.

For inputs X the error of a product with rounded weights Q instead of W is ``tr((W - Q) H (W - Q)^T)``, H = X^T X. With
``H = L L^T`` it is the squared norm of ``E L``, E = W - Q, and column j of ``E L`` is
``E_j L_jj + sum over k > j of E_k L_kj``. So columns are rounded from the last to the first, each after
``sum(E_k L_kj) / L_jj`` was added to it: what GPTQ does without the inverse of H (Chee et al. 2023 prove them equal).
A block's scale is chosen when its turn comes, for the weights as they are then, and spans their whole range: cutting
off large weights lowers the mean error, but a few of them carry the enormous inputs of a text's first token. Rows are
independent of each other.

One matrix of [columns, columns] float32 is all the memory it needs besides a chunk of weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.errors import ExportError
from export.quantize.blockwise import QuantizedRows, block_grid, pack_rows
from export.quantize.recipes import Blockwise

_MOST = 50.0
"""Squared norm of an input, by the median's, from which on it counts no more: the first token of a text has inputs so
large that all others would drown in the damping."""
_PANEL = 512
"""Columns of H that are worked on at once."""
_NARROW = 8
"""Columns that are rounded one by one."""

Array = NDArray[np.float32]


class Hessian:
    """``X^T X`` of the inputs X of a product, gathered from part to part; only the lower triangle is kept."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        # Where no block divides the columns, blocks of 32 are padded: with inputs that are never seen.
        padded = -(-columns // 32) * 32
        self._sum = np.zeros((padded, padded), np.float32)
        self._count = 0

    def add(self, x: Array) -> None:
        """Take in further inputs [n, columns]."""
        norms = np.einsum("ij,ij->i", x, x)
        x = x * np.sqrt(np.minimum(1, _MOST * np.median(norms) / np.maximum(norms, np.finfo(np.float32).tiny)))[:, None]
        self._count += len(x)
        for start in range(0, self._columns, _PANEL):
            stop = min(start + _PANEL, self._columns)
            self._sum[start:stop, :stop] += x[:, start:stop].T @ x[:, :stop]

    def factor(self, what: str) -> Array:
        """L with ``L L^T = H + damping`` in the lower triangle; the upper one is not zero. H is lost.

        The damping, relative to the mean of the diagonal, is columns over inputs: the fewer inputs there are for each
        column, the less of what they say holds for other texts.

        Args:
            what: name of the product, for the error.

        Raises:
            ExportError: the inputs were all zero or not finite.
        """
        diagonal = np.einsum("ii->i", self._sum)
        damping = float(diagonal.sum(dtype=np.float64)) / max(1, self._count)
        if not 0 < damping < np.inf:
            hint = "calibrate with a text that is like what the model will read"
            raise ExportError(f"calibration found no finite inputs of {what}", hint=hint)
        diagonal += np.float32(damping)
        _cholesky(self._sum)
        return self._sum


def _cholesky(matrix: Array) -> None:
    """Turn the lower triangle into its Cholesky factor, in place, panel by panel from the left."""
    for start in range(0, len(matrix), _PANEL):
        stop = min(start + _PANEL, len(matrix))
        matrix[start:, start:stop] -= matrix[start:, :start] @ matrix[start:stop, :start].T
        # Small enough for float64, which never finds a damped matrix indefinite.
        lower = np.tril(matrix[start:stop, start:stop]).astype(np.float64)
        top = np.linalg.cholesky(lower + np.tril(lower, -1).T)
        matrix[start:stop, start:stop] = top
        matrix[stop:, start:stop] = matrix[stop:, start:stop] @ np.linalg.inv(top).T.astype(np.float32)


def gptq_rows(weights: Array, factor: Array, form: Blockwise) -> QuantizedRows:
    """Quantize ``weights`` [rows, columns] for inputs with the factor that :meth:`Hessian.factor` made."""
    weights = np.pad(weights, ((0, 0), (0, len(factor) - weights.shape[1])))
    rounding = _Rounding(weights, factor, form)
    rounding.solve(0, weights.shape[1])
    return pack_rows(rounding.codes.T, rounding.scales.T, rounding.zero_points.T, form)


class _Rounding:
    """One chunk of rows on its way. All arrays are transposed, so that a column of the weights is contiguous."""

    def __init__(self, weights: Array, factor: Array, form: Blockwise) -> None:
        self._weights = np.ascontiguousarray(weights.T)
        self._factor = factor
        self._diagonal = np.einsum("ii->i", factor)
        self._form = form
        columns, rows = self._weights.shape
        self._errors = np.zeros_like(self._weights)
        self._carried = np.zeros_like(self._weights)
        """``sum(E_k L_kj)`` of the columns k that are done."""
        self.codes = np.zeros((columns, rows), np.uint8)
        self.scales = np.zeros((columns // form.block, rows), np.float32)
        self.zero_points = np.zeros_like(self.scales, dtype=np.uint8)

    def solve(self, start: int, stop: int) -> None:
        """Round columns [start, stop): the right half, then the left half with the right half's errors carried over."""
        width, block = stop - start, self._form.block
        if width == block:
            self._choose_scale(start, stop)
        if width <= _NARROW:
            for column in range(stop - 1, start - 1, -1):
                self._round(column, start)
            return
        middle = start + (width // 2 if width <= block else -(-width // (2 * block)) * block)
        self.solve(middle, stop)
        self._carried[start:middle] += self._factor[middle:stop, start:middle].T @ self._errors[middle:stop]
        self.solve(start, middle)

    def _choose_scale(self, start: int, stop: int) -> None:
        current = self._weights[start:stop] + self._carried[start:stop] / self._diagonal[start:stop, None]
        place = start // self._form.block
        self.scales[place], self.zero_points[place] = block_grid(current.T, self._form)

    def _round(self, column: int, start: int) -> None:
        """Round one column and carry its error to those from ``start`` on."""
        place = column // self._form.block
        scale, zero_point = self.scales[place], self.zero_points[place].astype(np.float32)
        wanted = self._weights[column] + self._carried[column] / self._diagonal[column]
        codes = np.rint(np.divide(wanted, scale, out=np.zeros_like(wanted), where=scale > 0)) + zero_point
        np.clip(codes, 0, 2**self._form.bits - 1, out=codes)
        self.codes[column] = codes
        error = self._weights[column] - (codes - zero_point) * scale
        self._errors[column] = error
        self._carried[start:column] += self._factor[column, start:column, None] * error
