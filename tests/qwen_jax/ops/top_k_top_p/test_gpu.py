"""Every registered implementation finds the thresholds of the passes to the bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.ops.top_k_top_p import api as top_k_top_p
from qwen_jax.ops.top_k_top_p import gpu as top_k_top_p_gpu

V = 331  # no multiple of a piece
TUNING = top_k_top_p_gpu.Tuning(
    warps=1, pieces=2, pivots=4, depth=4
)  # lists of 128, often too short


SMALL = top_k_top_p_gpu.Tuning(warps=1, pieces=1, pivots=2, depth=4)  # soon compiled


@functools.partial(jax.jit, static_argnames=("implementation", "tuning"))
def find(scores_BV, top_k_B, top_p_B, min_p_B, *, implementation: str, tuning):
    return top_k_top_p.threshold(
        scores_BV, top_k_B=top_k_B, top_p_B=top_p_B, min_p_B=min_p_B,
        implementation=implementation, tuning=tuning,
    )  # fmt: skip


def check(scores_BV, top_k, top_p, min_p=0.0, *, tuning=TUNING) -> None:
    rows = len(scores_BV)
    values = [
        np.broadcast_to(np.asarray(value, dtype), rows)
        for value, dtype in ((top_k, np.int32), (top_p, np.float32), (min_p, np.float32))
    ]
    found = {
        name: np.asarray(find(scores_BV, *values, implementation=name, tuning=tuning)).view(
            np.uint32
        )
        for name in top_k_top_p.TOP_K_TOP_P.names
    }
    assert len(found) > 1
    for name, got_B in found.items():
        np.testing.assert_array_equal(got_B, found["passes"], err_msg=name)


def rows_of_all_kinds(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores_BV = 3 * rng.standard_normal((8, V))
    scores_BV[1] = np.round(scores_BV[1])
    scores_BV[2] = -np.inf
    scores_BV[3] = rng.standard_normal()
    scores_BV[4, np.arange(V) != 7] = -np.inf
    scores_BV[5, 90:] = -np.inf
    scores_BV[6] *= 10 ** rng.uniform(-30, 20)
    scores_BV[7, :50] = rng.choice([0.0, -0.0], 50)
    scores_BV[7, 50:] = -np.abs(scores_BV[7, 50:]) / 10 ** rng.uniform(0, 20, V - 50)
    return scores_BV.astype(np.float32)


@pytest.mark.parametrize("top_k", [0, 1, 7, 60, V - 1, V, 2**31 - 1])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999999, 1.0])
def test_cutoffs_are_those_of_passes(top_k, top_p):
    for seed in range(3):
        check(rows_of_all_kinds(seed), top_k, top_p)


def test_rows_may_ask_for_different_things():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores_BV = rng.permutation(rows_of_all_kinds(seed))
        top_k = rng.choice([0, 1, 5, 200, V], 8)
        check(scores_BV, top_k, rng.choice([1.0, 0.01, 0.5, 0.99], 8), rng.choice([0.0, 0.1], 8))


@pytest.mark.parametrize("rows", [1, 3])
def test_batches_of_any_size(rows):
    for seed in range(4):
        scores_BV = np.random.default_rng(seed).permutation(rows_of_all_kinds(seed))[:rows]
        check(scores_BV, [0, 20, 3][:rows], [0.8, 0.7, 1.0][:rows], tuning=SMALL)
        check(scores_BV, 20, 1.0, tuning=SMALL)


def test_scores_that_are_not_finite_do_not_keep_it_from_an_end():
    scores_BV = rows_of_all_kinds(0)
    scores_BV[:4, 5] = np.inf
    scores_BV[:2, 9] = np.inf
    check(scores_BV, [0, 1, 2, 3] * 2, [0.5, 1.0] * 4)


@pytest.mark.parametrize("warps", [8, 16])
def test_the_kernels_lower_to_triton(warps):
    """Without a GPU: the programs are made, not run."""

    def both(scores_BV, weights_BV, least_B, keys_B):
        tuning = top_k_top_p_gpu.Tuning(warps=warps)
        given = {"least_B": least_B, "lows_B": keys_B, "tops_B": keys_B}
        largest = functools.partial(
            top_k_top_p_gpu.largest, scores_BV, **given, tuning=tuning, interpret=False
        )
        return largest(), largest(weights_BV, bounded_B=least_B > 0)

    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((256, 151_936), jnp.float32), ((256, 151_936), jnp.uint32),
            ((256,), jnp.float32), ((256,), jnp.int32),
        )
    ]  # fmt: skip
    text = jax.jit(both).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
