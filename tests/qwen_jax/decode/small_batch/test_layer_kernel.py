"""A layer of few rows in the interpreter, phase by phase, against the model's block."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import qwen2_5
from qwen_jax.decode import fused_layers
from qwen_jax.decode import weights as decode_weights
from qwen_jax.decode.small_batch import kernel_types, layer_kernel
from qwen_jax.model import rope, transformer
from qwen_jax.ops.attention.paged import api as paged
from qwen_jax.ops.attention.paged import triton_blocks

# In the middle of a page, at its end, not active, alone, and first of a page.
LENGTHS_R = np.array([301, 64, 0, 1, 129, 2, 200, 65], np.int32)
PAGE, WIDTH = 64, 5
SMALL = qwen2_5.base("0.5b")
LARGE = qwen2_5.base("7b")


def _cut(cfg, **changes):
    return dataclasses.replace(cfg, num_hidden_layers=1, **changes)


def _draw(*shape: int, seed: int, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _values(cfg) -> dict:
    """One fused layer in bfloat16, biases and scales too being random."""
    params = jax.eval_shape(functools.partial(transformer.init, cfg), jax.random.key(0))
    leaves, tree = jax.tree.flatten(params["layers"])
    drawn = [
        _draw(*x.shape[1:], seed=seed, scale=1.0 if x.ndim < 4 else 0.03)
        for seed, x in enumerate(leaves)
    ]
    return fused_layers.fuse(cfg, tree.unflatten(drawn))


def _rows(cfg, R: int) -> tuple[kernel_types.Rows, rope.Rotation]:
    lengths_R = LENGTHS_R[:R]
    table = np.random.default_rng(0).permutation(R * WIDTH).reshape(R, WIDTH).astype(np.int32)
    rotation = rope.rotation(cfg, jnp.maximum(lengths_R - 1, 0)[:, None])
    return kernel_types.Rows(
        rotation.cos_BTh[:, 0], rotation.sin_BTh[:, 0], table, lengths_R
    ), rotation


def _plain(cfg, x_RD, values, kv, rows: kernel_types.Rows, rotation, *, form="fused"):
    def attend(q, k, v):
        o, kept = paged.append(
            q[:, 0], k[:, 0], v[:, 0], kv,
            table_BM=rows.table_RM, lengths_B=rows.lengths_R, implementation="reference",
        )  # fmt: skip
        return o[:, None], kept

    x_R1D, kept, _ = decode_weights.blocks(cfg, form)["layers"].bind(values)(
        x_RD[:, None], rotation=rotation, attend=attend, layout=None
    )
    return x_R1D[:, 0], kept


def _tuning(**changes) -> kernel_types.Tuning:
    attention = triton_blocks.Tuning(block=64, min_keys=64)
    return kernel_types.Tuning(programs=6, launch="phase", attention=attention, **changes)


@pytest.mark.parametrize(
    ("cfg", "R", "changes"),
    [
        (_cut(SMALL), 1, {}),
        (qwen2_5.tiny(), 3, {"warps": 4, "gate_up": 16}),
        pytest.param(_cut(SMALL), 8, {}, marks=pytest.mark.slow),
        pytest.param(_cut(LARGE, intermediate_size=1216), 2, {}, marks=pytest.mark.slow),
    ],
    ids=["0.5b", "tiny, 3 rows", "0.5b, 8 rows", "7b narrow, 2 rows"],
)
def test_a_layer_equals_the_models(cfg, R, changes):
    values = _values(cfg)
    rows, rotation = _rows(cfg, R)
    x_RD = _draw(R, cfg.hidden_size, seed=90)
    kv = _draw(R * WIDTH, PAGE, 2 * cfg.num_key_value_heads, cfg.head_dim, seed=91)
    want, kept = jax.jit(functools.partial(_plain, cfg))(x_RD, values, kv, rows, rotation)
    run = jax.jit(
        functools.partial(layer_kernel.run, cfg, tuning=_tuning(**changes), interpret=True)
    )
    barriers = jnp.zeros(layer_kernel.NUM_BARRIERS, jnp.int32)
    weights = layer_kernel.weights(cfg, fused_layers.output_major(values))
    got, kept_few, _ = run(x_RD, weights, kv, rows, barriers)
    active_R = LENGTHS_R[:R] > 0
    added, wanted = (np.asarray(y - x_RD, np.float32)[active_R] for y in (got, want))
    # Of two roundings to bfloat16, one of x itself: 2^-9 of values of 1 beside what is added.
    assert np.linalg.norm(added - wanted) < 0.012 * np.linalg.norm(wanted)
    np.testing.assert_allclose(
        np.asarray(kept_few, np.float32), np.asarray(kept, np.float32), rtol=2**-7, atol=2**-7
    )
    changed = np.asarray(kept_few != kv).any(axis=-1).sum()
    assert changed == active_R.sum() * 2 * cfg.num_key_value_heads


def test_an_output_major_block_is_the_fused_one():
    cfg = qwen2_5.tiny()
    values = _values(cfg)
    rows, rotation = _rows(cfg, 2)
    x_RD = _draw(2, cfg.hidden_size, seed=90)
    kv = _draw(2 * WIDTH, PAGE, 2 * cfg.num_key_value_heads, cfg.head_dim, seed=91)
    one, _ = _plain(cfg, x_RD, values, kv, rows, rotation)
    values = fused_layers.output_major(values)
    other, _ = _plain(cfg, x_RD, values, kv, rows, rotation, form="output_major")
    np.testing.assert_allclose(
        np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=2**-7, atol=2**-7
    )


def test_a_layer_is_one_kernel_that_writes_its_pages_in_place():
    cfg = _cut(SMALL)
    values = jax.eval_shape(
        lambda: layer_kernel.weights(cfg, fused_layers.output_major(_values(cfg)))
    )
    rows, _ = _rows(cfg, 1)
    kv = jax.ShapeDtypeStruct((40, PAGE, 4, 64), jnp.bfloat16)
    x_RD = jax.ShapeDtypeStruct((1, cfg.hidden_size), jnp.bfloat16)
    barriers = jax.ShapeDtypeStruct((layer_kernel.NUM_BARRIERS,), jnp.int32)
    run = jax.jit(
        functools.partial(layer_kernel.run, cfg, tuning=kernel_types.Tuning(programs=132))
    )
    traced = run.trace(x_RD, values, kv, rows, barriers)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert text.count("#stablehlo.output_operand_alias<") == 2  # the pages and the barriers
    # Barriers wait in loops, the only ones without a count: where nobody took their result, they
    # would have been left out.
    assert r"\00while\00condition\00" in text  # operations of the kernel
