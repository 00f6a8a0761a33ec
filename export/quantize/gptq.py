"""GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323): rounding that makes up for its own errors.

For inputs X the error of a product with rounded weights Q instead of W is ``tr(E H E^T)``, E = W - Q, H = X^T X. With
``H = L L^T`` it is the squared norm of ``E L``, and column j of ``E L`` is ``E_j L_jj + sum over k > j of E_k L_kj``.
So columns are rounded from the last to the first, each after ``sum(E_k L_kj) / L_jj`` was added to it: what GPTQ does
without the inverse of H (Chee et al. 2023 prove them equal). A block's scale is chosen when its turn comes, for the
weights as they are then, and spans their whole range.

Coordinate descent comes next (QuantEase, Behdin et al. 2023, https://arxiv.org/abs/2309.01885): with all other columns
as they are, the best value of column j is ``W_j + sum over k != j of E_k H_kj / H_jj``. That is the same walk over the
columns, with H for L, if what the columns before j contribute is there from the start. On the way every block gets the
scale that is best for its codes, as in COMQ (Zhang et al. 2024, https://arxiv.org/abs/2403.07134). No step makes the
error larger. Rows are independent of each other.

All of this leaves alone what went wrong before the product: its inputs are those of a quantized network, and not what
the weights were made for. Where products lack ``D = T - X W^T`` of their targets T, ridge regression finds the weights
``W + D^T X (H + damping)^-1``. Weights on the way there are rounded in place of W (QEP, Arai & Ichikawa 2025,
https://arxiv.org/abs/2504.09629; GPTAQ, Li et al. 2025, https://arxiv.org/abs/2504.02692).

One matrix of columns by columns in float32, L in its lower triangle and H in its upper one, is all the memory that
this needs besides ``D^T X`` and a chunk of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
_ROWS = 64
"""Inputs are summed up in multiples of so many: in other numbers OpenBLAS cuts the sum by how many threads it has."""
_NARROW = 8
"""Columns that are rounded one by one."""
_SWEEPS = 4
"""Of coordinate descent; four more gain a hundredth of what these do."""
_UNLIKE = 0.4
"""Damping relative to the mean of the diagonal, however long the text is: others are unlike it."""
_LARGEST = float(np.finfo(np.float16).max)

Array = NDArray[np.float32]


class Hessian:
    """``X^T X`` of the inputs X of a product, gathered from part to part; only the lower triangle is kept.

    Args:
        columns: of X.
        lacking: columns of D, see :meth:`add`.
    """

    def __init__(self, columns: int, lacking: int = 0) -> None:
        self._columns = columns
        # Where no block divides the columns, blocks of 32 are padded: with inputs that are never seen.
        padded = -(-columns // 32) * 32
        # A column more, so that both triangles have a diagonal.
        self._sum = np.zeros((padded, padded + 1), np.float32)
        self._count = 0
        self.cross = np.zeros((lacking, columns), np.float32)
        """``D^T X``."""

    def add(self, x: Array, lacking: Array | None = None) -> None:
        """Take in further inputs [n, columns], and what is to be made up for at each of them: rows of D."""
        norms = np.einsum("ij,ij->i", x, x)
        roots = np.sqrt(np.minimum(1, _MOST * np.median(norms) / np.maximum(norms, np.finfo(np.float32).tiny)))[:, None]
        self._count += len(x)
        x = _filled(x, roots)
        lacking = np.zeros((len(x), 0), np.float32) if lacking is None else _filled(lacking, roots)
        for panel in _panels(self._columns):
            self._sum[panel, : panel.stop] += x[:, panel].T @ x[:, : panel.stop]
            self.cross[:, panel] += lacking.T @ x[:, panel]

    def factor(self, what: str) -> Array:
        """H + damping and its factor L in one array [columns, columns + 1], which this object loses.

        ``[:, :-1]`` has L in its lower triangle, ``[:, 1:]`` has H + damping in its upper one. The damping, relative to
        the mean of the diagonal, grows with columns over inputs: the fewer inputs there are for each column, the less
        of what they say holds for other texts.

        Args:
            what: name of the product, for the error.

        Raises:
            ExportError: the inputs were all zero or not finite.
        """
        diagonal = np.einsum("ii->i", self._sum[:, :-1])
        damping = float(diagonal.sum(dtype=np.float64)) * (1 / max(1, self._count) + _UNLIKE / self._columns)
        if not 0 < damping < np.inf:
            hint = "calibrate with a text that is like what the model will read"
            raise ExportError(f"calibration found no finite inputs of {what}", hint=hint)
        diagonal += np.float32(damping)
        _mirror(self._sum)
        _cholesky(self._sum[:, :-1])
        return self._sum


def _filled(rows: Array, factors: Array) -> Array:
    """Rows times their factors, and rows of zeros up to a multiple of :data:`_ROWS`."""
    filled = np.zeros((-(-len(rows) // _ROWS) * _ROWS, rows.shape[1]), np.float32)
    np.multiply(rows, factors, out=filled[: len(rows)])
    return filled


def _panels(columns: int) -> Iterator[slice]:
    """Columns from the first to the last, so many at once."""
    for start in range(0, columns, _PANEL):
        yield slice(start, min(start + _PANEL, columns))


def _mirror(matrix: Array) -> None:
    """Copy the lower triangle of ``[:, :-1]`` to the upper one of ``[:, 1:]``."""
    lower, upper = matrix[:, :-1], matrix[:, 1:]
    for panel in _panels(len(matrix)):
        upper[panel, panel.stop :] = lower[panel.stop :, panel].T
        upper[panel, panel] = np.triu(lower[panel, panel].T) + np.tril(upper[panel, panel], -1)


def _cholesky(matrix: Array) -> None:
    """Turn the lower triangle into its Cholesky factor, in place, panel by panel; what is above it stays."""
    for panel in _panels(len(matrix)):
        start, stop = panel.start, panel.stop
        above = np.triu(matrix[panel, panel], 1)
        matrix[start:, panel] -= matrix[start:, :start] @ matrix[panel, :start].T
        # Small enough for float64, which never finds a damped matrix indefinite.
        lower = np.tril(matrix[panel, panel]).astype(np.float64)
        top = np.linalg.cholesky(lower + np.tril(lower, -1).T)
        matrix[panel, panel] = top + above
        matrix[stop:, panel] = matrix[stop:, panel] @ np.linalg.inv(top).T.astype(np.float32)


def solve(factor: Array, right: Array) -> Array:
    """``right @ (H + damping)^-1`` for right [n, columns], which it replaces, with what :meth:`Hessian.factor` made."""
    lower = factor[: right.shape[1], : right.shape[1]]
    panels = list(_panels(right.shape[1]))
    inverses = [np.linalg.inv(np.tril(lower[each, each]).astype(np.float64)).astype(np.float32) for each in panels]
    for panel, inverse in zip(panels, inverses, strict=True):
        right[:, panel] -= right[:, : panel.start] @ lower[panel, : panel.start].T
        right[:, panel] = right[:, panel] @ inverse.T
    for panel, inverse in zip(reversed(panels), reversed(inverses), strict=True):
        right[:, panel] -= right[:, panel.stop :] @ lower[panel.stop :, panel]
        right[:, panel] = right[:, panel] @ inverse
    return right


def gptq_rows(weights: Array, factor: Array, form: Blockwise) -> QuantizedRows:
    """Quantize ``weights`` [rows, columns] for inputs with the factor that :meth:`Hessian.factor` made."""
    weights = np.pad(weights, ((0, 0), (0, len(factor) - weights.shape[1])))
    rounding = _Rounding(weights, form)
    rounding.round(factor[:, :-1])
    for _ in range(_SWEEPS):
        rounding.descend(factor[:, 1:])
    return pack_rows(rounding.codes.T, rounding.scales.T, rounding.zero_points.T, form)


class _Rounding:
    """One chunk of rows on its way. All arrays are transposed, so that a column of the weights is contiguous."""

    def __init__(self, weights: Array, form: Blockwise) -> None:
        self._weights = np.ascontiguousarray(weights.T)
        self._form = form
        columns, rows = self._weights.shape
        self._errors = np.zeros_like(self._weights)
        self._carried = np.zeros_like(self._weights)
        """What the errors of other columns contribute to each."""
        self.codes = np.zeros((columns, rows), np.uint8)
        self.scales = np.zeros((columns // form.block, rows), np.float32)
        self.zero_points = np.zeros_like(self.scales, dtype=np.uint8)

    def round(self, lower: Array) -> None:
        """Choose grids and codes, with L."""
        self._walk(lower.T, self._span)

    def descend(self, hessian: Array) -> None:
        """Choose better scales and codes, with H in an upper triangle."""
        for panel in _panels(len(hessian)):
            inner = np.triu(hessian[panel, panel], 1)
            self._carried[panel] = inner.T @ self._errors[panel]
            self._carried[panel] += hessian[: panel.start, panel].T @ self._errors[: panel.start]
        self._walk(hessian, self._refit)

    def _walk(self, couplings: Array, choose_scale: Callable[[int, int], None]) -> None:
        """Round all columns, coupled as the upper triangle says; ``choose_scale`` is called before each block."""
        self._couplings = couplings
        self._diagonal = np.einsum("ii->i", couplings)
        self._choose_scale = choose_scale
        self._solve(0, len(couplings))

    def _solve(self, start: int, stop: int) -> None:
        """Round columns [start, stop): the right half, then the left half with the right half's errors carried over."""
        width, block = stop - start, self._form.block
        if width == block:
            self._choose_scale(start, stop)
        if width <= _NARROW:
            for column in range(stop - 1, start - 1, -1):
                self._round(column, start)
            return
        middle = start + (width // 2 if width <= block else -(-width // (2 * block)) * block)
        self._solve(middle, stop)
        self._carried[start:middle] += self._couplings[start:middle, middle:stop] @ self._errors[middle:stop]
        self._solve(start, middle)

    def _span(self, start: int, stop: int) -> None:
        """A grid that spans the range of a block as it is now."""
        current = self._weights[start:stop] + self._carried[start:stop] / self._diagonal[start:stop, None]
        place = start // self._form.block
        self.scales[place], self.zero_points[place] = block_grid(current.T, self._form)

    def _refit(self, start: int, stop: int) -> None:
        """The best scale for a block's codes, all else as it is.

        A change d of the scale takes ``d C`` off the errors E, C the codes less their zero point, so the error becomes
        ``E H E^T - 2 d C H E^T + d^2 C H C^T``.
        """
        place = start // self._form.block
        steps = self.codes[start:stop] - self.zero_points[place].astype(np.float32)
        above = np.triu(self._couplings[start:stop, start:stop], 1)
        diagonal, errors = self._diagonal[start:stop, None], self._errors[start:stop]
        slope = (steps * (self._carried[start:stop] + diagonal * errors + above @ errors)).sum(axis=0)
        curvature = (steps * (diagonal * steps + 2 * (above @ steps))).sum(axis=0)
        old = self.scales[place]
        new = _nearest_float16(old + np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0), old)
        self._carried[start:stop] -= above.T @ ((new - old) * steps)
        self.scales[place] = new

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
        self._carried[start:column] += self._couplings[start:column, column, None] * error


def _nearest_float16(scales: Array, otherwise: Array) -> Array:
    """The numbers of float16 nearest to ``scales``; what is ``otherwise`` where those are not positive or too large."""
    halves = np.clip(scales, 0, _LARGEST).astype(np.float16).astype(np.float32)
    return np.where((halves > 0) & (scales <= _LARGEST), halves, otherwise)
