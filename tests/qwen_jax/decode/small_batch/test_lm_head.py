"""The output projection of few rows in the interpreter, against the model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.decode.small_batch import lm_head


@pytest.mark.parametrize(("R", "V", "D"), [(1, 1000, 896), (3, 333, 64)])
def test_logits_and_the_likeliest_equal_the_models(R, V, D):
    keys = jax.random.split(jax.random.key(0), 3)
    x_RD, scale_D, table_VD = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((R, D), (D,), (V, D)), strict=True)
    )
    table_VD = table_VD.at[V - 7].set(table_VD[5])  # of equals the first is wanted
    x32 = x_RD.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
    normed = (normed.astype(jnp.bfloat16) * scale_D[None]).astype(jnp.float32)
    x_RD = x_RD.at[0].set((table_VD[5] / jnp.where(scale_D == 0, 1, scale_D)).astype(x_RD.dtype))
    options = {"eps": 1e-6, "tuning": lm_head.Tuning(programs=5, outputs=8), "interpret": True}
    got = lm_head.logits(x_RD, scale_D, table_VD, **options)
    want = normed @ table_VD.astype(jnp.float32).T
    np.testing.assert_allclose(got[1:], want[1:], rtol=1e-4, atol=1e-3)
    tokens = lm_head.likeliest(x_RD, scale_D, table_VD, **options)
    np.testing.assert_array_equal(tokens, jnp.argmax(got, axis=-1))
    assert tokens[0] == 5
