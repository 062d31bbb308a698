"""One table: every registered implementation computes what the definition says."""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.experimental.pallas import tpu as mosaic_tpu

from qwen_jax.ops import registry
from qwen_jax.ops.grouped_matmul import api, hopper, hopper_kernels

M, K, N, E = 384, 128, 320, 5
SIZES = {
    "uneven": [100, 0, 37, 121, 0],  # 126 rows over
    "one group": [0, 0, 384, 0, 0],
    "few rows": [3, 1, 0, 0, 252],
    "nothing": [0, 0, 0, 0, 0],
}
TOLERANCE = {"float32": 1e-6, "bfloat16": 3e-3}
# N for an implementation that does not take 320.
WIDTH = {"megablox": 256}
# Group sizes for each dtype, for implementations that do not run all of them in bfloat16.
OTHER_RUNS = {
    "reference": {"float32": SIZES, "bfloat16": ["uneven"]},
    "hopper": {"bfloat16": ["uneven", "few rows", "nothing"]},  # slow in the interpreter
}
RUNS = [
    (name, dtype, kind)
    for name in api.GROUPED_MATMUL.names
    for dtype, kinds in OTHER_RUNS.get(name, {"bfloat16": SIZES}).items()
    for kind in kinds
]


@contextlib.contextmanager
def _interpreted(implementation: str, monkeypatch):
    """Pallas's interpreters stand in for the chips; memory that nothing wrote is NaN."""
    if implementation == "hopper":
        if jax.__version_info__ < (0, 11):
            pytest.skip("the GPU interpreter before JAX 0.11 knows no transposed references")
        small = hopper.Blocks(n=256, slots=2, store_n=128)
        few = types.SimpleNamespace(
            rows=functools.partial(hopper.rows, blocks=small),
            outer=functools.partial(hopper.outer, blocks=small),
        )
        kernel = dataclasses.replace(
            api.GROUPED_MATMUL["hopper"], unsupported=hopper.unsupported_operands, compute=few
        )
        others = api.GROUPED_MATMUL.implementations[1:]
        operation = registry.Operation("grouped_matmul", (kernel, *others))
        monkeypatch.setattr(api, "GROUPED_MATMUL", operation)
        monkeypatch.setattr(hopper_kernels, "_multiprocessors", lambda: 2)
        settings = mosaic_gpu.InterpretGPUParams(uninitialized_memory="nan")
        with mosaic_gpu.force_gpu_interpret_mode(settings):
            yield
    elif implementation == "megablox":
        settings = mosaic_tpu.InterpretParams(uninitialized_memory="nan")
        with mosaic_tpu.force_tpu_interpret_mode(settings):
            yield
    else:
        yield


def _inputs(implementation: str, dtype: str, used: int):
    """Operands and the result's cotangent; the first operand's rows past the groups are NaN."""
    rng = np.random.default_rng(0)
    width = WIDTH.get(implementation, N)
    lhs, rhs, dout = (rng.normal(size=s) for s in [(M, K), (E, K, width), (M, width)])
    lhs[used:] = np.nan
    return [jnp.asarray(x, dtype) for x in (lhs, rhs, dout)]


def _definition(lhs_MK, rhs_EKN, dout_MN, sizes) -> list[np.ndarray]:
    """out, dlhs, drhs in float64, one group after the other."""
    lhs, rhs, dout = (np.asarray(x, np.float64) for x in (lhs_MK, rhs_EKN, dout_MN))
    out, dlhs, drhs = np.zeros_like(dout), np.zeros_like(lhs), np.zeros_like(rhs)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = lhs[rows] @ rhs[e]
        dlhs[rows] = dout[rows] @ rhs[e].T
        drhs[e] = lhs[rows].T @ dout[rows]
        start += size
    return [out, dlhs, drhs]


@pytest.mark.parametrize(("implementation", "dtype", "kind"), RUNS)
def test_values_and_gradients_meet_the_definition(implementation, dtype, kind, monkeypatch):
    sizes = SIZES[kind]
    lhs, rhs, dout = _inputs(implementation, dtype, sum(sizes))
    with _interpreted(implementation, monkeypatch):
        product = functools.partial(
            api.grouped_matmul,
            group_sizes_E=jnp.asarray(sizes, jnp.int32),
            implementation=implementation,
        )
        out, pull = jax.vjp(product, lhs, rhs)
        got = [out, *pull(dout)]
    want = _definition(lhs, rhs, dout, sizes)
    for name, g, w in zip(("out", "dlhs", "drhs"), got, want, strict=True):
        assert g.dtype == dtype, name
        off = np.linalg.norm(np.asarray(g, np.float64) - w, axis=-1)
        assert np.all(off <= TOLERANCE[dtype] * np.linalg.norm(w, axis=-1)), name


def test_kernels_for_hopper_lower_without_a_gpu():
    M, K, N, E = 4096, 2048, 1408, 60
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)

    def all_three(lhs, rhs, dout, sizes):
        return (
            hopper.rows(lhs, rhs, sizes, rhs_order="EKN"),
            hopper.rows(dout, rhs, sizes, rhs_order="ENK"),
            hopper.outer(lhs, dout, sizes),
        )

    traced = jax.jit(all_three).trace(
        shape((M, K)), shape((E, K, N)), shape((M, N)), jax.ShapeDtypeStruct((E,), jnp.int32)
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("grouped_rows_ekn", "grouped_rows_enk", "grouped_outer"):
        assert name in text


REFUSED = {
    "unknown name": ("cublas", (8, 128), (2, 128, 128), "float32", "known: reference, megablox"),
    "no Hopper GPU": ("hopper", (8, 128), (2, 128, 128), "bfloat16", "needs a Hopper GPU"),
    "odd rows": ("megablox", (20, 128), (2, 128, 128), "bfloat16", "20 rows .* pad them"),
    "odd width": ("megablox", (32, 96), (2, 96, 128), "bfloat16", "K=96 and N=128"),
    "half precision": ("megablox", (32, 128), (2, 128, 128), "float16", "dtype float16"),
    "K differs": ("reference", (8, 128), (2, 64, 128), "float32", "do not agree"),
    "E differs": ("reference", (8, 128), (3, 128, 128), "float32", "do not agree"),
    "no groups": ("reference", (8, 128), (128, 128), "float32", r"are wanted: lhs \(8, 128\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_with_the_reason(case):
    implementation, lhs_shape, rhs_shape, dtype, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        api.grouped_matmul(
            jnp.ones(lhs_shape, dtype),
            jnp.ones(rhs_shape, dtype),
            jnp.array([4, 4]),
            implementation=implementation,
        )


def test_shapes_that_the_hopper_kernels_do_not_take_are_told_apart():
    def reason(M, K, N, dtype=jnp.bfloat16):
        return hopper.unsupported_operands(jnp.ones((M, K), dtype), jnp.ones((2, K, N), dtype))

    assert reason(136, 128, 192) is None
    assert "M=132 rows" in reason(132, 128, 128)
    assert "M=64 rows" in reason(64, 128, 128)
    assert "K=96" in reason(128, 96, 128)
    assert "N=64" in reason(128, 128, 64)
    assert "float32" in reason(128, 128, 128, jnp.float32)


def test_operands_of_two_dtypes_or_fractional_sizes_are_refused():
    lhs, rhs = jnp.ones((8, 4), jnp.bfloat16), jnp.ones((2, 4, 4), jnp.float32)
    with pytest.raises(ValueError, match="lhs is bfloat16, rhs float32; cast"):
        api.grouped_matmul(lhs, rhs, jnp.array([4, 4]))
    with pytest.raises(ValueError, match="float32, not an integer"):
        api.grouped_matmul(rhs[0], rhs, jnp.array([4.0, 4.0]))


def test_the_choice_here_is_one_that_can_run():
    out = api.grouped_matmul(jnp.ones((6, 4)), jnp.ones((2, 4, 3)), jnp.array([2, 3]))
    np.testing.assert_array_equal(out, np.repeat([[4.0], [0.0]], [5, 1], axis=0) * np.ones(3))
