"""The sampler against a slow reference that spells every step out in float64."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.engine.sampler import Sampler, SamplingParams
from edge.errors import EngineError, RequestError

VOCAB = 151_665
PADDED = 151_936


def penalised(logits, params, prompt_ids, output_ids):
    """Logits in float64 after bias and penalties, token by token."""
    result = [float(x) + params.logit_bias.get(i, 0.0) for i, x in enumerate(logits)]
    counts = Counter(output_ids)
    for i in set(prompt_ids) | set(output_ids):
        x = result[i]
        x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        x -= params.frequency_penalty * counts[i]
        x -= params.presence_penalty * (counts[i] > 0)
        result[i] = x
    return result


def reference(logits, params, prompt_ids=(), output_ids=()):
    """Token id -> probability, in the documented order of steps."""
    logits = penalised(logits, params, prompt_ids, output_ids)
    peak = max(logits)
    weight = {i: math.exp((x - peak) / params.temperature) for i, x in enumerate(logits)}
    ranked = sorted(weight, key=lambda i: (-logits[i], i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    total = sum(weight[i] for i in ranked)
    nucleus, mass = [], 0.0
    for i in ranked:
        nucleus.append(i)
        mass += weight[i]
        if mass >= params.top_p * total:
            break
    kept = [i for i in nucleus if weight[i] >= params.min_p * weight[ranked[0]]]
    total = sum(weight[i] for i in kept)
    return {i: weight[i] / total for i in kept}


class Strata:
    """Stands in for the generator and walks a grid over the unit square: the exact distribution without noise."""

    def __init__(self, steps):
        points = (np.arange(steps) + 0.5) / steps
        self._values = iter([value for a in points for b in points for value in (a, b)])

    def random(self):
        return next(self._values)


def measured(logits, params, *, steps):
    """Token id -> share of draws over a grid of steps x steps uniforms."""
    sampler = Sampler(params, [], len(logits))
    sampler._rng = Strata(steps)
    found = Counter(sampler.sample(np.array(logits, np.float32)) for _ in range(steps * steps))
    return {i: n / steps**2 for i, n in found.items()}


# Multiples of 1/16 are exact in float32, so a cut never hangs on rounding in the input.
logit = st.integers(-160, 160).map(lambda n: n / 16)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(logit, min_size=1, max_size=200),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 20, 500]),
    top_p=st.sampled_from([0.0, 0.1237, 0.5017, 0.8031, 0.9513, 1.0]),
    min_p=st.sampled_from([0.0, 0.051, 0.51, 1.0]),
)
def test_distribution_equals_the_reference(logits, temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found, expected = measured(logits, params, steps=25), reference(logits, params)
    assert found.keys() <= expected.keys()
    # A draw is a block and then a place in it: a boundary of either moves by at most one step of the grid.
    assert all(found.get(i, 0.0) == pytest.approx(share, abs=2 / 25) for i, share in expected.items())


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=1.0, top_p=0.9, seed=1),
        SamplingParams(temperature=2.0, top_p=0.97, seed=1),
        SamplingParams(temperature=0.7, top_p=0.8, top_k=20, seed=1),
        SamplingParams(temperature=1.0, min_p=0.02, seed=1),
        SamplingParams(temperature=1.5, top_k=700, top_p=0.99, seed=1),
    ],
    ids=repr,
)
def test_wide_vocabulary(params):
    """Thousands of tokens, so that groups, bins and blocks all take part."""
    logits = (np.random.default_rng(7).standard_normal(6_011) * 2).astype(np.float32)
    sampler = Sampler(params, [], logits.size)
    found = Counter(sampler.sample(logits) for _ in range(3_000))
    expected = reference(logits, params)
    assert found.keys() <= expected.keys()
    for i in sorted(expected, key=expected.__getitem__, reverse=True)[:20]:
        deviation = math.sqrt(3_000 * expected[i] * (1 - expected[i]))
        assert abs(found[i] - 3_000 * expected[i]) <= 5 * deviation


def test_top_p_reaches_into_a_long_tail():
    """One token of weight 1 and 3,000 of weight 0.0005: 90% takes the first 2,500 of them."""
    logits = np.full(3_001, math.log(5e-4), np.float32)
    logits[3_000] = 0.0
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.9, seed=11), [], 3_001)
    found = Counter(sampler.sample(logits) for _ in range(2_000))
    assert found.pop(3_000) / 2_000 == pytest.approx(1 / 2.25, abs=0.06)
    assert 2_350 < max(found) <= 2_500


@settings(deadline=None)
@given(
    logits=st.lists(logit, min_size=5, max_size=40),
    prompt_ids=st.lists(st.integers(0, 4), max_size=8),
    repetition=st.sampled_from([0.8, 1.0, 1.1, 2.0]),
    presence=st.sampled_from([-1.0, 0.0, 0.6]),
    frequency=st.sampled_from([-0.3, 0.0, 0.7]),
    bias=st.dictionaries(st.integers(0, 4), st.sampled_from([-100.0, -1.5, 3.0]), max_size=3),
)
def test_greedy_follows_bias_and_penalties(logits, prompt_ids, repetition, presence, frequency, bias):  # noqa: PLR0917 - drawn by name
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    sampler = Sampler(params, prompt_ids, len(logits))
    output: list[int] = []
    for _ in range(12):
        chosen = sampler.sample(np.array(logits, np.float32))
        expected = penalised(logits, params, prompt_ids, output)
        assert expected[chosen] == pytest.approx(max(expected), abs=1e-4)
        output.append(chosen)


def test_penalties_count_more_ids_than_first_reserved():
    logits = np.linspace(1, 2, 500, dtype=np.float32)
    sampler = Sampler(SamplingParams(presence_penalty=2.0), [], 500)
    assert [sampler.sample(logits) for _ in range(500)] == list(range(499, -1, -1))


def test_same_seed_same_tokens():
    logits = np.random.default_rng(1).standard_normal(PADDED).astype(np.float32)
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=-5)
    runs = [[sampler.sample(logits) for _ in range(20)] for sampler in (Sampler(params, [], VOCAB) for _ in range(2))]
    assert runs[0] == runs[1]
    assert runs[0] != [Sampler(SamplingParams(temperature=1.0, top_p=0.95), [], VOCAB).sample(logits)] * 20


def test_without_a_seed_runs_differ():
    logits = np.zeros(1_000, np.float32)
    params = SamplingParams(temperature=1.0)
    first, second = ([s.sample(logits) for _ in range(20)] for s in (Sampler(params, [], 1_000) for _ in range(2)))
    assert first != second


@pytest.mark.parametrize("extra", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_is_never_chosen_and_the_buffer_is_untouched(temperature, extra):
    logits = np.zeros(PADDED, np.float32)
    logits[VOCAB:] = 50.0
    logits[VOCAB + 1] = np.nan
    before = logits.copy()
    sampler = Sampler(SamplingParams(temperature=temperature, seed=3, **extra), [1, 2], VOCAB)
    assert all(sampler.sample(logits) < VOCAB for _ in range(20))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("extra", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_forbidden_tokens_are_never_drawn(extra):
    logits = np.full(3_000, -np.inf, np.float32)
    logits[[5, 2_999]] = [0.0, 1.0]
    sampler = Sampler(SamplingParams(temperature=2.0, seed=0, **extra), [], 3_000)
    assert {sampler.sample(logits) for _ in range(60)} == {5, 2_999}


@pytest.mark.parametrize("temperature", [1e-9, 1e-4, 2.0])
def test_extreme_logits_do_not_overflow(temperature):
    logits = np.array([-3e38, 3e38, -3e38, 0.0], np.float32)
    params = SamplingParams(temperature=temperature, repetition_penalty=10.0, top_p=0.99)
    assert Sampler(params, [0, 2], 4).sample(logits) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1.0, top_k=5)], ids=["greedy", "top_k"]
)
def test_non_finite_logits(params, bad):
    logits = np.arange(100, dtype=np.float32)
    logits[17] = bad
    with pytest.raises(EngineError, match="not finite"):
        Sampler(params, [], 100).sample(logits)
    with pytest.raises(EngineError):
        Sampler(params, [], 100).sample(np.full(100, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", 2**40),
        ("top_p", 1.01),
        ("min_p", -1),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("seed", 2**63),
        ("seed", False),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"5": 0.0}),
        ("logit_bias", {5: 101}),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", dict.fromkeys(range(2_000), 0.0)),
    ],
)
def test_out_of_range_parameters_name_the_field(field, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert caught.value.hint


def test_bias_beyond_the_vocabulary():
    with pytest.raises(RequestError, match="beyond the vocabulary"):
        Sampler(SamplingParams(logit_bias={100: 1.0}), [], 100)
