"""GPTQ on matrices small enough to know the answer."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.errors import ExportError
from export.quantize.blockwise import dequantize_rows, quantize_rows
from export.quantize.gptq import Hessian, gptq_rows
from export.quantize.recipes import Blockwise

Array = NDArray[np.float32]
B32, B128 = Blockwise(bits=4, block=32), Blockwise(bits=4, block=128)


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


def error(w: Array, rounded: Array, x: Array) -> float:
    return float(np.linalg.norm((rounded - w) @ x.T) / np.linalg.norm(w @ x.T))


@pytest.mark.parametrize("columns", [32, 96, 896, 1120])
def test_the_factor_is_that_of_the_damped_hessian(columns: int) -> None:
    x = inputs(700, columns)
    damped = (x.T @ x).astype(np.float64)
    damped += np.eye(columns) * np.trace(damped) / len(x)
    found = np.tril(factor(x))
    np.testing.assert_allclose(found, np.linalg.cholesky(damped), atol=1e-5 * float(found.max()))


@pytest.mark.parametrize(("columns", "form"), [(64, B32), (896, B128), (1120, B32), (1120, Blockwise(4, 16))])
def test_products_with_new_inputs_are_closer_than_by_rounding_to_nearest(columns: int, form: Blockwise) -> None:
    w, unseen = weights(48, columns), inputs(500, columns, seed=1)
    nearest = dequantize_rows(quantize_rows(w, form), form, columns)
    found = dequantize_rows(gptq_rows(w, factor(inputs(8 * columns, columns)), form), form, columns)
    assert error(w, found, unseen) < 0.9 * error(w, nearest, unseen)


def test_it_follows_the_definition() -> None:
    """Each column, from the last, is rounded after the errors so far were projected onto it."""
    columns, form = 64, B32
    w, x = weights(5, columns), inputs(900, columns)
    quantized = gptq_rows(w, factor(x), form)
    rounded = dequantize_rows(quantized, form, columns).astype(np.float64)
    hessian = (x.T @ x).astype(np.float64)
    hessian += np.eye(columns) * np.trace(hessian) / len(x)
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


def test_rows_do_not_depend_on_each_other() -> None:
    w, root = weights(40, 256), factor(inputs(600, 256))
    whole, part = gptq_rows(w, root, B128), gptq_rows(w[7:19], root, B128)
    assert (whole.codes[7:19] == part.codes).mean() > 0.999
    np.testing.assert_allclose(whole.scales[7:19], part.scales, rtol=1e-5)


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
