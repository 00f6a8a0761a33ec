"""GPTQ on matrices small enough to know the answer."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise, product

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.errors import ExportError
from export.quantize.blockwise import dequantize_rows, quantize_rows
from export.quantize.gptq import Hessian, gptq_rows, solve
from export.quantize.recipes import Blockwise

Array = NDArray[np.float32]
B32, B128 = Blockwise(bits=4, block=32), Blockwise(bits=4, block=128)


def regression(w: Array, x: Array, targets: Array, parts: int = 3) -> tuple[Array, NDArray[np.float64]]:
    """Weights fitted to targets [n, rows] by way of the cross products, and by least squares with the damping."""
    hessian = Hessian(x.shape[1], len(w))
    for inputs_, wanted in zip(np.array_split(x, parts), np.array_split(targets, parts), strict=True):
        hessian.add(inputs_, wanted - inputs_ @ w.T)
    found = w + solve(hessian.factor("test"), hessian.cross)
    root = np.linalg.cholesky(damped(x) - (x.T @ x).astype(np.float64))
    rows = np.vstack([x.astype(np.float64), root.T])
    wanted_rows = np.vstack([targets.astype(np.float64), root.T @ w.T.astype(np.float64)])
    return found, np.linalg.lstsq(rows, wanted_rows, rcond=None)[0].T


def weights(rows: int, columns: int, seed: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def inputs(count: int, columns: int, seed: int = 0) -> Array:
    """Correlated, and of very different sizes, as a network's are; one distribution whatever the seed."""
    mixer = np.random.default_rng(99)
    mix = mixer.standard_normal((columns, columns)) * np.exp(mixer.standard_normal(columns)) / columns**0.5
    return np.asarray(np.random.default_rng(seed).standard_normal((count, columns)) @ mix, np.float32)


def factor(x: Array, parts: int = 3) -> Array:
    hessian = Hessian(x.shape[1])
    for part in np.array_split(x, parts):
        hessian.add(part)
    return hessian.factor("test")


def damped(x: Array) -> NDArray[np.float64]:
    """What :func:`factor` factors."""
    hessian: NDArray[np.float64] = (x.T @ x).astype(np.float64)
    hessian += np.eye(len(hessian)) * np.trace(hessian) * (1 / len(x) + 0.4 / len(hessian))
    return hessian


def squares(w: Array, rounded: Array, hessian: NDArray[np.float64]) -> NDArray[np.float64]:
    """``E H E^T`` of each row."""
    errors = (w - rounded).astype(np.float64)
    return np.asarray(((errors @ hessian) * errors).sum(axis=1))


def error(w: Array, rounded: Array, x: Array) -> float:
    return float(np.linalg.norm((rounded - w) @ x.T) / np.linalg.norm(w @ x.T))


@pytest.mark.parametrize("columns", [32, 96, 896, 1120])
def test_the_damped_hessian_and_its_factor_share_an_array(columns: int) -> None:
    x = inputs(700, columns)
    expected, found = damped(x), factor(x)
    lower, upper = np.tril(found[:, :-1]), np.triu(found[:, 1:])
    np.testing.assert_allclose(lower, np.linalg.cholesky(expected), atol=1e-5 * float(lower.max()))
    np.testing.assert_allclose(upper, np.triu(expected), atol=1e-5 * float(upper.max()))


@pytest.mark.parametrize("columns", [32, 80, 640])
def test_weights_that_make_up_for_changed_inputs_are_those_of_ridge_regression(columns: int) -> None:
    w, x = weights(24, columns), inputs(3 * columns, columns)
    drifted = x + 0.1 * inputs(3 * columns, columns, seed=5)
    found, expected = regression(w, drifted, x @ w.T)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(w - expected)
    # Nearer to what was meant than the weights that were made for other inputs.
    assert np.linalg.norm((drifted - x) @ w.T) > 1.02 * np.linalg.norm(drifted @ found.T - x @ w.T)


def test_what_one_enormous_input_lacks_counts_no_more_than_what_others_lack() -> None:
    w, x = weights(8, 64), inputs(3000, 64)
    drifted = x + 0.1 * inputs(3000, 64, seed=5)
    spoiled, targets = drifted.copy(), x @ w.T
    spoiled[0] *= 1e4
    wrong = targets.copy()
    wrong[0] = 1e5
    clean, found = (regression(w, each, wanted, 1)[0] for each, wanted in ((drifted, targets), (spoiled, wrong)))
    assert np.linalg.norm(found - clean) < 0.5 * np.linalg.norm(clean)


@pytest.mark.parametrize(("columns", "form"), [(64, B32), (896, B128), (1120, B32), (1120, Blockwise(4, 16))])
def test_products_with_new_inputs_are_closer_than_by_rounding_to_nearest(columns: int, form: Blockwise) -> None:
    w, unseen = weights(48, columns), inputs(500, columns, seed=1)
    nearest = dequantize_rows(quantize_rows(w, form), form, columns)
    found = dequantize_rows(gptq_rows(w, factor(inputs(8 * columns, columns)), form), form, columns)
    assert error(w, found, unseen) < 0.9 * error(w, nearest, unseen)


def test_it_follows_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any descent each column, from the last, is rounded after the errors so far were projected onto it."""
    monkeypatch.setattr("export.quantize.gptq._SWEEPS", 0)
    columns, form = 64, B32
    w, x = weights(5, columns), inputs(900, columns)
    quantized = gptq_rows(w, factor(x), form)
    rounded = dequantize_rows(quantized, form, columns).astype(np.float64)
    hessian = damped(x)
    for column in range(columns):
        # The best value of a column, given what became of all later ones and with all earlier ones free.
        later = slice(column, columns)
        inner = hessian[later, later] - hessian[later, :column] @ np.linalg.solve(
            hessian[:column, :column], hessian[:column, later]
        )
        wanted = w[:, column] + (w - rounded)[:, column + 1 :] @ inner[1:, 0] / inner[0, 0]
        step = quantized.scales[:, column // 32]
        inside = np.abs(wanted - rounded[:, column]) <= 0.5001 * step
        low, high = rounded[:, : 32 * (column // 32 + 1)][:, -32:].min(axis=1), rounded[:, later].max(axis=1)
        assert (inside | (wanted < low) | (wanted > high)).mean() == 1.0


@pytest.mark.parametrize(("columns", "form"), [(64, B32), (640, B128), (1120, Blockwise(4, 16, symmetric=True))])
def test_no_sweep_makes_the_error_larger(columns: int, form: Blockwise, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weights(24, columns), inputs(3 * columns, columns)
    root, hessian, found = factor(x), damped(x), []
    for sweeps in range(4):
        monkeypatch.setattr("export.quantize.gptq._SWEEPS", sweeps)
        found.append(squares(w, dequantize_rows(gptq_rows(w, root, form), form, columns), hessian))
    assert all((after <= 1.0001 * before).all() for before, after in pairwise(found))
    assert found[3].sum() < 0.9 * found[0].sum()


def test_in_the_end_no_other_code_and_no_other_scale_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are tried, one at a time."""
    monkeypatch.setattr("export.quantize.gptq._SWEEPS", 60)
    w, x = weights(8, 64), inputs(400, 64)
    hessian = damped(x)
    quantized = gptq_rows(w, factor(x), B32)
    rounded = dequantize_rows(quantized, B32, 64)
    least = 0.9999 * squares(w, rounded, hessian)
    assert quantized.zero_points is not None
    zero_points = np.stack([quantized.zero_points[:, 0] & 15, quantized.zero_points[:, 0] >> 4], axis=1)
    for column in range(64):
        block = column // 32
        for code in range(16):
            other = rounded.copy()
            other[:, column] = quantized.scales[:, block] * (code - zero_points[:, block].astype(np.float32))
            assert (squares(w, other, hessian) >= least).all()
    for block, change in product(range(2), (0.999, 1.001)):
        other = rounded.copy()
        other[:, 32 * block : 32 * block + 32] *= change
        assert (squares(w, other, hessian) >= least).all()


def test_rows_do_not_depend_on_each_other() -> None:
    w, root = weights(40, 256), factor(inputs(600, 256))
    whole, part = gptq_rows(w, root, B128), gptq_rows(w[7:19], root, B128)
    assert (whole.codes[7:19] == part.codes).mean() > 0.999
    np.testing.assert_allclose(whole.scales[7:19], part.scales, rtol=1e-5)


_SUMMED = """
import hashlib
import numpy as np
from export.quantize.gptq import Hessian, solve
x, lacking = (np.random.default_rng(seed).standard_normal((498, 896), np.float32) for seed in range(2))
hessian = Hessian(896, 896)
hessian.add(x, lacking)
values = solve(hessian.factor("x"), hessian.cross)
print(hashlib.sha256(values.tobytes()).hexdigest())
"""


def test_how_many_threads_there_are_changes_no_bit() -> None:
    """Windows of a text have any number of tokens, and BLAS may cut sums by its threads."""
    results = set()
    for threads in ("1", "2", "3"):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", _SUMMED], env=environment, capture_output=True, check=True)
        results.add(done.stdout)
    assert len(results) == 1


def test_columns_without_a_block_of_their_own_are_padded() -> None:
    w, x = weights(9, 80), inputs(500, 80)
    quantized = gptq_rows(w, factor(x), B32)
    assert quantized.codes.shape == (9, 3, 16)
    found = dequantize_rows(quantized, B32, 80)
    assert error(w, found, x) < error(w, dequantize_rows(quantize_rows(w, B32), B32, 80), x)


def test_zero_weights_stay_zero() -> None:
    w = weights(6, 128)
    w[2] = 0
    w[:, 32:64] = 0
    found = dequantize_rows(gptq_rows(w, factor(inputs(300, 128)), B32), B32, 128)
    assert not found[2].any()
    assert np.isfinite(found).all()


def test_one_enormous_input_does_not_drown_the_others() -> None:
    w, x = weights(48, 256), inputs(3000, 256)
    spoiled = x.copy()
    spoiled[0] *= 1e4
    clean, found = (dequantize_rows(gptq_rows(w, factor(each, 1), B128), B128, 256) for each in (x, spoiled))
    assert error(w, found, x[1:]) < 1.1 * error(w, clean, x[1:])


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
def test_inputs_that_say_nothing_are_refused(value: float) -> None:
    hessian = Hessian(64)
    with np.errstate(all="ignore"):
        hessian.add(np.full((10, 64), value, np.float32))
        with pytest.raises(ExportError, match=r"no finite inputs of layer\.7"):
            hessian.factor("layer.7")
