"""Every registered implementation computes the product with the dequantised matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.ops.quantized_matmul import api as quantized_matmul
from qwen_jax.ops.quantized_matmul import packed_words_kernel, row_kernels
from qwen_jax.quant import array

WAYS = [("int8", None), ("int8", 64), ("int4", None), ("int4", 64), ("int4", 128), ("fp8", None)]


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_zeros(q: array.QuantArray) -> array.QuantArray:
    zeros = np.random.default_rng(1).integers(-3, 4, q.scales.shape)
    order = np.random.default_rng(2).permutation(q.num_inputs)
    return dataclasses.replace(
        q, zeros=jnp.asarray(zeros, jnp.int8), order=jnp.asarray(order, jnp.int32)
    )


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("format", "group", "words"),
    [*((*way, words) for way in WAYS for words in (False, True)), ("int4", 32, False)],
)
def test_implementations_agree(format, group, rows, words):
    """To bfloat16's half-step where the matrix is rounded to it, else to float32's."""
    x = draw(1, rows, 256).astype(jnp.bfloat16)
    q = array.quantise(draw(256, 2, 32), format=format, group_size=group, axis=-3)
    q = with_zeros(q) if group == 64 or group == 128 else q
    stored = array.in_words(q) if words else q

    @jax.jit
    def compute(x, q, stored):
        x32, w = x.astype(jnp.float32), array.dequantise(q, dtype=jnp.float32)
        options = {"layout": None, "preferred": jnp.float32}
        products = {
            name: quantized_matmul.contract(
                "btd,dnh->btnh", x, stored, implementation=name, **options
            )
            for name in quantized_matmul.QUANTIZED_MATMUL.names
        }
        want, size = (
            jnp.einsum("btd,dnh->btnh", x, w, precision="highest")
            for x, w in ((x32, w), (jnp.abs(x32), jnp.abs(w)))
        )
        return want, size, products

    want, size, products = compute(x, q, stored)
    for name, got in products.items():
        # int8's sums in words begin with 128 times the inputs, which is taken off afterwards.
        begun = 4e-6 if words and format == "int8" else 1e-6
        bound = begun if name == "gpu" else 2**-8
        assert (np.abs(got - want) <= np.asarray(size) * bound).all(), name


@pytest.mark.parametrize(("format", "group"), WAYS)
def test_words_hold_the_same_values(format, group):
    q = array.quantise(draw(256, 2, 32), format=format, group_size=group, axis=-3)
    q = with_zeros(q) if group == 64 or group == 128 else q
    words = array.in_words(q)
    assert (words.num_inputs, words.outputs, words.group_size) == (256, (2, 32), q.group_size)
    assert words.values.nbytes == q.values.nbytes
    want = np.moveaxis(array.dequantise(q, dtype=jnp.float32), 0, -1)
    np.testing.assert_array_equal(array.dequantise(words, dtype=jnp.float32), want)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(
    ("tuning", "inputs"), [((4, 4, 1), 1216), ((8, 1, 2), 1216), ((2, 2, 2), 64)]
)
def test_words_however_they_are_cut(tuning, inputs, rows):
    """Rounds that do not end with the inputs, and fewer inputs than a warp reads at once."""
    x, w = draw(rows, inputs).astype(jnp.bfloat16), draw(inputs, 64)
    for format, group in (("int8", None), ("int4", 64), ("fp8", None)):
        q = array.in_words(array.quantise(w, format=format, group_size=group))
        got = packed_words_kernel.multiply(x, q, tuning=packed_words_kernel.Tuning(*tuning))
        want = (
            np.asarray(x, np.float64)
            @ np.asarray(array.dequantise(q, dtype=jnp.float32), np.float64).T
        )
        np.testing.assert_allclose(got, want, atol=5e-6 * np.abs(want).max(), rtol=0)


def test_words_are_multiplied_up_to_eight_rows():
    unsupported = functools.partial(packed_words_kernel.unsupported, dtype=jnp.bfloat16)
    q = array.in_words(array.quantise(draw(128, 64), format="int8"))
    assert unsupported(q, rows=8) is None
    assert "takes 8 rows, not 9" in unsupported(q, rows=9)
    odd = array.quantise(draw(128, 60), format="int8")
    assert "multiples of 8 outputs" in unsupported(odd, rows=1)
    small = array.quantise(draw(128, 64), format="int4", group_size=32)
    assert "groups of 32 inputs" in unsupported(small, rows=1)


@pytest.mark.parametrize("rows", [1, 20])
def test_an_embedding_projects_back(rows):
    x, table = draw(1, rows, 128).astype(jnp.bfloat16), draw(192, 128)
    q = array.quantise(table, format="int8", axis=-1)
    want = np.einsum("btd,vd->btv", np.asarray(x, np.float32), array.dequantise(q, dtype=x.dtype))
    for implementation in quantized_matmul.QUANTIZED_MATMUL.names:
        got = quantized_matmul.contract(
            "btd,vd->btv", x, q, layout=None, implementation=implementation, preferred=jnp.float32
        )
        np.testing.assert_allclose(got, want, atol=2**-7 * np.abs(want).max())


def test_rows_of_an_embedding_in_words():
    q = array.quantise(draw(192, 128), format="int8", axis=-1)
    index = jnp.asarray([[0, 7, 8, 191], [100, 101, 192, -1]])
    want = array.take(q, index, dtype=jnp.float32)
    assert jnp.isnan(want[1, 2:]).all() and not jnp.isnan(want[0]).any()
    np.testing.assert_array_equal(array.take(array.in_words(q), index, dtype=jnp.float32), want)


def test_merged_inputs():
    w_NHD = draw(4, 16, 64)
    q = array.quantise(w_NHD, format="int8", axis=-2, merged=2)
    x = draw(2, 3, 4, 16)
    got = quantized_matmul.contract("btnh,nhd->btd", x, q, layout=None)
    w = array.dequantise(q, dtype=jnp.float32).reshape(w_NHD.shape)
    np.testing.assert_allclose(got, np.einsum("btnh,nhd->btd", x, w), rtol=1e-4, atol=1e-4)


def test_the_choice_and_what_cannot_run():
    q = array.quantise(draw(128, 64), format="int8")
    choose = functools.partial(
        quantized_matmul.QUANTIZED_MATMUL.choose, q, devices=1, platform=jax.default_backend()
    )
    assert choose(rows=1, dtype=jnp.bfloat16).name == "xla"
    assert choose(rows=65, dtype=jnp.bfloat16).name == "dequantise"
    assert choose(rows=1, dtype=jnp.float32).name == "dequantise"
    assert row_kernels.unsupported(q, rows=64, dtype=jnp.bfloat16) is None
    with pytest.raises(ValueError, match="cannot run: it multiplies bfloat16, not float32"):
        quantized_matmul.contract(
            "btd,df->btf", draw(1, 1, 128), q, layout=None, implementation="gpu"
        )
    odd = array.quantise(draw(128, 60), format="int8")
    assert "multiples of 64" in row_kernels.unsupported(odd, rows=1, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="quantised kernels take no other product"):
        quantized_matmul.contract("btd,fd->btf", draw(1, 1, 128), q, layout=None)
    with pytest.raises(ValueError, match="unknown quantized_matmul implementation 'mosaic'"):
        quantized_matmul.contract(
            "btd,df->btf", draw(1, 1, 128), q, layout=None, implementation="mosaic"
        )


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(("format", "group"), WAYS)
def test_the_kernel_lowers_to_triton(format, group, rows):
    """Without a GPU: its program is made, not run."""
    q = array.quantise(draw(512, 256), format=format, group_size=group)
    q = with_zeros(q) if format == "int4" else q
    x = jnp.ones((rows, 512), jnp.bfloat16)
    jobs = [(lambda x, q: row_kernels.multiply(x, q, interpret=False), q)]
    if rows <= packed_words_kernel.MOST_ROWS:
        words = array.in_words(q)
        jobs.append((lambda x, q: packed_words_kernel.multiply(x, q, interpret=False), words))
    for multiply, q in jobs:
        program = jax.jit(multiply).trace(x, q).lower(lowering_platforms=("cuda",))
        assert "__gpu$xla.gpu.triton" in program.as_text()


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (3584, 3584), (3584, 4608), (3584, 37888), (18944, 3584),
        (896, 1152), (896, 9728), (4864, 896),
    ],
)  # fmt: skip
def test_blocks_of_released_models_divide_them(inputs, outputs):
    for format, group in WAYS:
        packed = 2 if format == "int4" else 1
        q = array.QuantArray(
            jax.ShapeDtypeStruct((inputs // packed, outputs), jnp.int8),
            jax.ShapeDtypeStruct((inputs // (group or inputs), outputs), jnp.float32),
            format=format,
        )
        assert row_kernels.unsupported(q, rows=1, dtype=jnp.bfloat16) is None
        assert packed_words_kernel.unsupported(q, rows=1, dtype=jnp.bfloat16) is None
        blocks = row_kernels.default_blocks(q, rows=1)
        assert inputs % (blocks.inputs * blocks.parts) == 0 and outputs % blocks.outputs == 0
        assert q.group_size % blocks.inputs == 0
        assert (outputs // blocks.outputs) * blocks.parts >= 120  # of 132 multiprocessors
