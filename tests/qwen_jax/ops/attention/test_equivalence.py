"""One table: every registered implementation computes the same as JAX's own attention."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.ops.attention import api, splash

HAS_GPU = jax.default_backend() == "gpu"

# (dtype, relative tolerance) of the table, and of implementations that take fewer dtypes.
DTYPES = [("float32", 2e-6), ("bfloat16", 2e-2)]
FEWER_DTYPES = {"cudnn": [("bfloat16", 2e-2)]}
# Kernels of other platforms that run everywhere in Pallas's interpreter, and those that do not.
INTERPRETED = {"splash": functools.partial(splash.attention, interpret=True)}
NOT_INTERPRETED = ("cudnn",)

B, T = 2, 48
# (query heads, key-value heads, head size): the family's ratios, and one to one.
HEADS = [(14, 2, 64), (12, 2, 128), (10, 2, 128), (4, 4, 64)]


def _masks() -> dict[str, api.Mask]:
    segments_BT = np.repeat([[1, 1, 2, 3, 3, 0], [1, 2, 2, 2, 2, 2]], T // 6, axis=1)
    lengths_B = np.array([T, 17])
    return {
        "causal": api.Mask(causal=True),
        "packed": api.Mask(causal=True, segment_ids_BT=segments_BT),
        "padded": api.Mask(causal=True, lengths_B=lengths_B),
        "both ways": api.Mask(causal=False),
    }


MASKS = _masks()


def _inputs(N: int, K: int, H: int, dtype: str):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def _definition(q_BTNH, k_BSKH, v_BSKH, mask: api.Mask) -> np.ndarray:
    """softmax(q k^T / sqrt(H)) v, one query at a time in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    out = np.zeros_like(q)
    groups = q.shape[2] // k.shape[2]
    for b, t, n in itertools.product(*map(range, q.shape[:3])):
        seen = [s for s in range(k.shape[1]) if _sees(mask, b, t, s)]
        scores = k[b, seen, n // groups] @ q[b, t, n] / math.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // groups]
    return out


def _sees(mask: api.Mask, b: int, t: int, s: int) -> bool:
    if mask.causal and s > t:
        return False
    if mask.segment_ids_BT is not None and mask.segment_ids_BT[b, s] != mask.segment_ids_BT[b, t]:
        return False
    return mask.lengths_B is None or s < mask.lengths_B[b]


def _real_queries(mask: api.Mask) -> np.ndarray:
    """[B, T, 1, 1] booleans: queries whose output the mask specifies."""
    lengths_B = np.full(B, T) if mask.lengths_B is None else mask.lengths_B
    return (np.arange(T) < lengths_B[:, None])[:, :, None, None]


def _oracle(q_BTNH, k_BSKH, v_BSKH, mask: api.Mask):
    """JAX's own attention, told the mask as booleans."""
    visible_BTS = np.array(
        [[[_sees(mask, b, t, s) for s in range(T)] for t in range(T)] for b in range(B)]
    )
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=jnp.asarray(visible_BTS)[:, None], implementation="xla"
    )


CASES = [
    pytest.param(name, dtype, tolerance, heads, mask, id=f"{name}-{dtype}-{heads}-{mask}")
    for name in api.ATTENTION.names
    for dtype, tolerance in FEWER_DTYPES.get(name, DTYPES)
    for heads in HEADS
    for mask in MASKS
    # Every mask with the first heads, every heads with the mask that packing makes.
    if heads == HEADS[0] or mask == "packed"
]


def _close(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)


@pytest.mark.parametrize(("name", "dtype", "tolerance", "heads", "mask"), CASES)
def test_values_and_gradients_equal_jaxs_own_attention(name, dtype, tolerance, heads, mask):
    attend = functools.partial(api.attention, implementation=name)
    if not api.ATTENTION[name].is_chosen_on(jax.default_backend()):
        if name in NOT_INTERPRETED:
            pytest.skip(f"{name} needs its platform")
        attend = INTERPRETED[name]
    q, k, v, direction = _inputs(*heads, dtype)
    mask = MASKS[mask]
    real_BT11 = _real_queries(mask)
    direction = jnp.where(real_BT11, direction, 0)

    def ours(q, k, v):
        o = attend(q, k, v, mask=mask)
        assert o.dtype == q.dtype
        return jnp.vdot(o.astype(jnp.float32), direction.astype(jnp.float32)), o

    def theirs(q, k, v):
        o = _oracle(q, k, v, mask)
        return jnp.vdot(o.astype(jnp.float32), direction.astype(jnp.float32)), o

    with jax.default_matmul_precision("highest"):
        run = functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
        (_, got), got_gradients = jax.jit(run(ours))(q, k, v)
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        (_, want), want_gradients = jax.jit(run(theirs))(*wide)
    _close(np.where(real_BT11, got, 0), np.where(real_BT11, want, 0), tolerance)
    for g, w in zip(got_gradients, want_gradients, strict=True):
        _close(g, w, tolerance)


@pytest.mark.parametrize("mask", list(MASKS))
def test_reference_equals_the_definition(mask):
    q, k, v, _ = _inputs(6, 2, 16, "float32")
    got = api.attention(q, k, v, mask=MASKS[mask], implementation="reference")
    _close(got, _definition(q, k, v, MASKS[mask]), 1e-6)


def test_a_row_that_sees_nothing_is_finite():
    q, k, v, _ = _inputs(4, 2, 16, "float32")
    mask = api.Mask(causal=True, lengths_B=jnp.array([T, 0]))
    got = jax.grad(lambda q: api.attention(q, k, v, mask=mask, implementation="reference").sum())(q)
    assert np.isfinite(got).all()


def test_an_implementation_that_cannot_run_says_why():
    q, k, v, _ = _inputs(4, 2, 16, "float32")
    mask = api.Mask()
    with pytest.raises(ValueError, match="'cudnn' cannot run: dtype float32"):
        api.attention(q, k, v, mask=mask, implementation="cudnn")
    wide = [jnp.zeros((1, 4, 2, 256), jnp.bfloat16)] * 3
    with pytest.raises(ValueError, match="head_dim 256"):
        api.attention(*wide, mask=mask, implementation="cudnn")
    with pytest.raises(ValueError, match="'splash' cannot run: platform .* is not 'tpu'"):
        api.attention(q, k, v, mask=mask, implementation="splash")
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'; known: ref"):
        api.attention(q, k, v, mask=mask, implementation="flash")


@pytest.mark.skipif(HAS_GPU, reason="cuDNN runs here")
def test_cudnn_without_a_gpu_is_an_error():
    q, k, v, _ = _inputs(4, 2, 64, "bfloat16")
    with pytest.raises((ValueError, RuntimeError)):
        jax.block_until_ready(api.attention(q, k, v, mask=api.Mask(), implementation="cudnn"))


def test_the_choice_runs_here():
    q, k, v, _ = _inputs(4, 2, 64, "bfloat16")
    got = api.attention(q, k, v, mask=MASKS["packed"])
    _close(got, _definition(q, k, v, MASKS["packed"]), 2e-2)
