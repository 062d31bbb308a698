"""Rounding within each format's bound, packing and back, orders and groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from qwen_jax.quant import array

WAYS = [("int8", None), ("int8", 64), ("int4", None), ("int4", 32), ("int4", 128), ("fp8", None)]


def matrix(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.05, shape), jnp.float32)


@pytest.mark.parametrize(("format", "group"), WAYS)
def test_the_error_is_within_half_a_step_of_each_group(format, group):
    w_DNH = matrix(256, 2, 16)
    q = array.quantise(w_DNH, format=format, group_size=group, axis=-3)
    assert (q.shape, q.outputs, q.group_size) == ((256, 2, 16), (2, 16), group or 256)
    got = np.asarray(array.dequantise(q, dtype=jnp.float32))
    grouped = np.asarray(w_DNH).reshape(-1, q.group_size, 2, 16)
    largest = np.abs(grouped).max(axis=1, keepdims=True)
    error = np.abs(got.reshape(grouped.shape) - grouped)
    # Half a step; a bfloat16 scale (2^-8) can also cut off or move the largest value. e4m3 has
    # three bits of mantissa, and below 2^-6 of 448 steps of 2^-9.
    step = {"int8": 1 / 254, "int4": 1 / 14, "fp8": 2**-10 / 448}[format]
    bound = largest * (step + (2**-8 if group else 1e-6))
    if format == "fp8":
        bound = bound + np.abs(grouped) * 2**-4
    assert (error <= bound).all()
    assert error.max() > 0


def test_scales_of_zeros_are_zero_and_give_zeros():
    q = array.quantise(jnp.zeros((64, 3)), format="int4", group_size=32)
    assert not np.asarray(array.dequantise(q, dtype=jnp.float32)).any()


@pytest.mark.parametrize("axis", [-2, -3])
def test_packing_loses_nothing(axis):
    values = np.random.default_rng(0).integers(-8, 8, (2, 96, 64, 3)).astype(np.int8)
    packed = array.pack(jnp.asarray(values), axis=axis)
    assert packed.dtype == jnp.uint8 and packed.size == values.size // 2
    assert (np.asarray(array.unpack(packed, axis=axis, dtype=jnp.int8)) == values).all()


def test_zeros_and_an_order_of_inputs():
    rng = np.random.default_rng(0)
    values, zeros = rng.integers(-8, 8, (64, 5)), rng.integers(-8, 8, (2, 5))
    scales, order = rng.uniform(0.1, 1, (2, 5)).astype(np.float16), rng.permutation(64)
    q = array.QuantArray(
        array.pack(jnp.asarray(values, jnp.int8), axis=-2),
        jnp.asarray(scales),
        zeros=jnp.asarray(zeros, jnp.int8),
        order=jnp.asarray(order, jnp.int32),
        format="int4",
    )
    want = np.empty((64, 5), np.float32)
    for row in range(64):
        want[order[row]] = (values[row] - zeros[row // 32]) * scales[row // 32].astype(np.float32)
    assert (np.asarray(array.dequantise(q, dtype=jnp.float32)) == want).all()


def test_an_embedding_gives_its_rows():
    table_VD = matrix(10, 32)
    q = array.quantise(table_VD, format="int8", axis=-1)
    rows = array.take(q, jnp.asarray([[3, 9], [0, 10]]), dtype=jnp.float32)
    whole = np.asarray(array.dequantise(q, dtype=jnp.float32))
    assert (np.asarray(rows)[0] == whole[[3, 9]]).all()
    assert np.isnan(np.asarray(rows)[1, 1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "int3"}, "unknown format 'int3'; known: int8, int4, fp8"),
        ({"format": "fp8", "group_size": 32}, "fp8 has a scale a channel"),
        ({"format": "int4", "group_size": 48}, "group_size=48 is not a multiple of 32"),
        ({"format": "int8", "group_size": 128}, "96 inputs are no multiple of group_size=128"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        array.quantise(matrix(96, 4), **{"format": "int8", **changes})


def test_kernels_that_differ_are_not_fused():
    one = array.quantise(matrix(64, 1, 4), format="int8", axis=-3)
    other = array.quantise(matrix(64, 1, 4), format="int8", group_size=32, axis=-3)
    ordered = dataclasses.replace(one, order=jnp.arange(64))
    assert array.alike([one, one]) and array.alike([matrix(2, 2)])
    for pair in ([one, other], [one, ordered], [one, matrix(64, 1, 4)]):
        assert not array.alike(pair)
    with pytest.raises(ValueError, match="cannot be fused; use form='unstacked'"):
        array.concatenate([one, other])


def test_a_mesh_axis_may_not_cut_a_group():
    mesh = AbstractMesh((4,), ("tensor",))
    plain = {"o": NamedSharding(mesh, PartitionSpec(None, "tensor"))}  # of [L, N, H, D]
    w_LNHD = matrix(2, 8, 32, 6)

    def placed(group: int | None):
        q = array.quantise(w_LNHD, format="int4", group_size=group, axis=-2, merged=2)
        return array.shardings(plain, {"o": q})["o"]

    assert placed(64).values.spec == PartitionSpec(None, "tensor", None)
    assert placed(64).scales.spec == PartitionSpec(None, "tensor", None)
    assert placed(None).scales.spec == PartitionSpec(None, None, None)
    with pytest.raises(ValueError, match="o: mesh axis tensor=4 would cut a group of 128 of its"):
        placed(128)
