"""Cutoffs against a sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qwen_jax.ops.top_k_top_p import api as top_k_top_p

ROWS = 4


@functools.partial(jax.jit, static_argnames=("which",))
def kept(scores_BV, value_B, *, which: str):
    values = {
        "top_k_B": jnp.zeros(len(value_B), jnp.int32),
        "top_p_B": jnp.ones(len(value_B)),
        "min_p_B": jnp.zeros(len(value_B)),
    }
    cutoff_B = top_k_top_p.threshold(scores_BV, **{**values, which: value_B})
    return scores_BV >= cutoff_B[:, None]


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.1, 3.0, 40.0]),
    st.sampled_from(["distinct", "ties", "masked"]),
    st.lists(st.integers(1, 200), min_size=ROWS, max_size=ROWS),
)
def test_top_k_is_what_a_sort_finds(seed, scale, kind, counts):
    V = 157
    scores_BV = scores(seed, scale, kind, V)
    got_BV = np.asarray(kept(scores_BV, np.asarray(counts, np.int32), which="top_k_B"))
    for row, count in enumerate(counts):
        kth = np.sort(scores_BV[row])[::-1][min(count, V) - 1]
        np.testing.assert_array_equal(got_BV[row], scores_BV[row] >= kth)


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.1, 3.0, 40.0]),
    st.sampled_from(["distinct", "ties", "masked"]),
    st.lists(st.integers(1, 9999).map(lambda n: n / 10_000), min_size=ROWS, max_size=ROWS),
)
def test_top_p_is_the_fewest_likeliest_that_reach_it(seed, scale, kind, shares):
    scores_BV = scores(seed, scale, kind, 157)
    got_BV = np.asarray(kept(scores_BV, np.asarray(shares, np.float32), which="top_p_B"))
    for row, share in enumerate(shares):
        weights_V = np.exp(np.float64(scores_BV[row] - scores_BV[row].max()))
        weights_V /= weights_V.sum()
        inside = got_BV[row]
        least = scores_BV[row][inside].min()
        assert inside.any() and not (~inside & (scores_BV[row] >= least)).any()
        assert weights_V[inside].sum() >= share - 1e-6
        # Without its least likely tokens, it would fall short.
        assert weights_V[scores_BV[row] > least].sum() < share + 1e-6


def scores(seed: int, scale: float, kind: str, V: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores_BV = scale * rng.standard_normal((ROWS, V))
    if kind == "ties":
        scores_BV = np.round(scores_BV)
    if kind == "masked":
        scores_BV = np.where(rng.random((ROWS, V)) < 0.9, -np.inf, scores_BV)
        scores_BV[:, 7] = 1.0
    return scores_BV.astype(np.float32)


def test_a_vocabulary_as_large_as_qwens():
    V = 151_936
    scores_1V = 2.0 * np.random.default_rng(0).standard_normal((1, V)).astype(np.float32)
    ordered = np.sort(scores_1V[0])[::-1]
    weights = np.exp(np.float64(ordered))
    for count in (1, 20, 100_000):
        kept_1V = np.asarray(kept(scores_1V, np.asarray([count], np.int32), which="top_k_B"))
        assert kept_1V.sum() == count
    for share in (0.01, 0.8, 0.999):
        kept_1V = np.asarray(kept(scores_1V, np.asarray([share], np.float32), which="top_p_B"))
        mass = weights[: kept_1V.sum()].sum() / weights.sum()
        last = weights[kept_1V.sum() - 1] / weights.sum()
        assert share - 2e-6 <= mass <= share + last + 2e-6


def test_equal_scores_overflow_no_sum():
    V = 2**18
    equal_1V = np.zeros((1, V), np.float32)
    assert np.asarray(kept(equal_1V, np.asarray([0.5], np.float32), which="top_p_B")).all()
    equal_1V[0, 5] = 1e-4  # alone above the rest, with less than half of the weight
    assert np.asarray(kept(equal_1V, np.asarray([3.8e-6], np.float32), which="top_p_B")).sum() == 1
    assert np.asarray(kept(equal_1V, np.asarray([1e-5], np.float32), which="top_p_B")).all()


@pytest.mark.parametrize("which", ["top_k_B", "top_p_B", "min_p_B"])
def test_a_row_without_any_token_keeps_to_itself(which):
    scores_BV = np.asarray([[-np.inf] * 5, [0.0, 2.0, 1.0, -np.inf, -1.0]], np.float32)
    value = 1 if which == "top_k_B" else 0.6
    kept_BV = np.asarray(kept(scores_BV, np.full(2, value), which=which))
    assert np.flatnonzero(kept_BV[1]).tolist() == [1]
