"""What a chunk gives of its tokens, against all of them by the whole forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import qwen2_5
from qwen_jax.decode import forward, weights
from qwen_jax.model import transformer
from qwen_jax.ops.attention.paged import kv_pages

CFG = qwen2_5.tiny()
TABLE_RM = jnp.arange(6, dtype=jnp.int32).reshape(3, 2)
LENGTHS = (16, 5, 0)
TOKENS_RT = jax.random.randint(jax.random.key(1), (3, 16), 0, CFG.vocab_size)


@functools.partial(jax.jit, static_argnames=("prefix", "outputs"))
def read(params, pages, tokens_RT, starts_R, lengths_R, *, prefix: str, outputs: tuple[str, ...]):
    return forward.chunk(
        CFG,
        params,
        pages,
        tokens_RT,
        table_RM=TABLE_RM,
        starts_R=starts_R,
        lengths_R=lengths_R,
        prefix=prefix,
        outputs=outputs,
        attention=None,
        layout=None,
    )


@pytest.mark.parametrize("prefix", ["none", "pages"])
def test_the_last_token_is_given_alone_or_beside_all(prefix):
    stacked = transformer.init(CFG, jax.random.key(0))
    want_RTD = transformer.apply(CFG, stacked, TOKENS_RT).hidden_BTD
    params = weights.prepare(CFG, transformer.init(CFG, jax.random.key(0)), dtype=jnp.float32)
    pages = kv_pages.create(CFG, num_pages=6, page_size=16, dtype=jnp.float32)
    starts_R, lengths_R = jnp.zeros(3, jnp.int32), jnp.asarray(LENGTHS, jnp.int32)
    tokens_RT = TOKENS_RT
    if prefix == "pages":  # the first four tokens are there already
        four_R = jnp.minimum(lengths_R, 4)
        _, pages = read(params, pages, tokens_RT, starts_R, four_R, prefix="none", outputs=())
        starts_R, lengths_R = four_R, lengths_R - four_R
        tokens_RT = jnp.roll(tokens_RT, -4, axis=1)
    given = {
        outputs: read(params, pages, tokens_RT, starts_R, lengths_R, prefix=prefix, outputs=outputs)
        for outputs in (("all",), ("last",), ("all", "last"), ())
    }
    alone, beside = given["last",][0], given["all", "last"][0]
    assert alone.all_RTD is None and given["all",][0].last_R1D is None
    np.testing.assert_array_equal(alone.last_R1D[:2], beside.last_R1D[:2])
    np.testing.assert_array_equal(given["all",][0].all_RTD, beside.all_RTD)
    for row, length in enumerate(LENGTHS[:2]):
        want = want_RTD[row, length - 1]
        np.testing.assert_allclose(alone.last_R1D[row, 0], want, atol=1e-5)
        at = int(lengths_R[row]) - 1
        np.testing.assert_allclose(beside.all_RTD[row, at], want, atol=1e-5)
    kept = [jax.tree.leaves(pages) for _, pages in given.values()]
    for others in kept[1:]:
        for a, b in zip(kept[0], others, strict=True):
            np.testing.assert_array_equal(a, b)
