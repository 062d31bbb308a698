"""Matrix-vector products, the whole of decoding at batch 1: GB/s by shape and implementation.

    python benchmarks/gemv.py            # on a GPU, about a minute
    python benchmarks/gemv.py --tiny     # rehearsal on a CPU

Each way multiplies a few rows with several matrices in one program, more bytes than a GPU's cache
holds. `in` stores a kernel input-major [K, N], `out` output-major [N, K].
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# name: (K inputs, N outputs)
SHAPES = {
    "7b o": (3584, 3584),
    "7b gate_up": (3584, 37888),
    "7b down": (18944, 3584),
    "7b lm_head": (3584, 152064),
    "0.5b o": (896, 896),
    "0.5b gate_up": (896, 9728),
    "0.5b down": (4864, 896),
    "0.5b lm_head": (896, 151936),
}


def times_in(x_MK, w_KN):
    return jnp.einsum("mk,kn->mn", x_MK, w_KN)


def times_out(x_MK, w_NK):
    return jnp.einsum("mk,nk->mn", x_MK, w_NK)


def reduce_out(x_MK, w_NK):
    """The product written as a sum over rows, which XLA emits as one reduction."""
    wide = w_NK.astype(jnp.float32)[None] * x_MK.astype(jnp.float32)[:, None]
    return jnp.sum(wide, axis=-1).astype(x_MK.dtype)


def largest_power(n: int, limit: int) -> int:
    """The largest power of two that divides n, up to `limit`."""
    return min(n & -n, limit)


def pallas_out(x_MK, w_NK, *, rows: int, columns: int, warps: int, interpret: bool):
    """One program for `rows` outputs, which runs along K in steps of `columns`."""
    M, K = x_MK.shape
    N = w_NK.shape[0]
    rows, columns = largest_power(N, rows), largest_power(K, columns)

    def kernel(x_ref, w_ref, y_ref):
        def step(i, total):
            here = pl.ds(i * columns, columns)
            w = w_ref[:, here].astype(jnp.float32)
            return total + w * x_ref[0, here].astype(jnp.float32)[None, :]

        total = jax.lax.fori_loop(
            0, K // columns, step, jnp.zeros((rows, columns), jnp.float32), unroll=False
        )
        y_ref[0, :] = jnp.sum(total, axis=1).astype(y_ref.dtype)

    options = {}
    if not interpret:
        from jax.experimental.pallas import triton

        options["compiler_params"] = triton.CompilerParams(num_warps=warps, num_stages=4)
    return pl.pallas_call(
        kernel,
        grid=(N // rows,),
        in_specs=[
            pl.BlockSpec((M, K), lambda i: (0, 0)),
            pl.BlockSpec((rows, K), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((M, rows), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((M, N), x_MK.dtype),
        interpret=interpret,
        **options,
    )(x_MK, w_NK)


def ways(interpret: bool) -> dict:
    """Implementations by name: (function, rows of x, kernel is [K, N], XLA's options)."""
    no_reduction = {"xla_gpu_enable_dot_strength_reduction": False}
    cublas = no_reduction | {"xla_gpu_enable_triton_gemm": False}
    table = {
        "in m1": (times_in, 1, True, {}),
        "in m1 no-reduction": (times_in, 1, True, no_reduction),
        "in m1 cublas": (times_in, 1, True, cublas),
        "in m8": (times_in, 8, True, {}),
        "in m16": (times_in, 16, True, {}),
        "in m16 cublas": (times_in, 16, True, cublas),
        "out m1": (times_out, 1, False, {}),
        "out m1 no-reduction": (times_out, 1, False, no_reduction),
        "out m1 cublas": (times_out, 1, False, cublas),
        "out m1 sum": (reduce_out, 1, False, {}),
        "out m16": (times_out, 16, False, {}),
        "out m16 cublas": (times_out, 16, False, cublas),
    }
    for rows, columns, warps in ((4, 512, 4), (8, 512, 4), (4, 1024, 4), (2, 1024, 4), (8, 256, 2)):
        function = functools.partial(
            pallas_out, rows=rows, columns=columns, warps=warps, interpret=interpret
        )
        table[f"out m1 pallas {rows}x{columns}w{warps}"] = (function, 1, False, {})
    return table


def measure(function, x, weights, options: dict, *, repeats: int) -> float:
    """GB/s over all the weights."""
    run = jax.jit(lambda x, weights: [function(x, w) for w in weights])
    run = run.lower(x, weights).compile(compiler_options=options)
    for _ in range(3):
        jax.block_until_ready(run(x, weights))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        # Several dispatches, so that the host's share of each is hidden.
        jax.block_until_ready([run(x, weights) for _ in range(5)])
        times.append((time.perf_counter() - begin) / 5)
    return sum(w.nbytes for w in weights) / statistics.median(times) / 1e9


def error_of(function, x_MK, w_NK) -> float:
    """Largest difference from the plain product, over its largest value; 1,024 outputs suffice."""
    w_NK = w_NK[:1024]
    want = jnp.einsum("mk,nk->mn", x_MK, w_NK, preferred_element_type=jnp.float32)
    got = function(x_MK, w_NK).astype(jnp.float32)
    return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--budget", type=float, default=240, help="seconds after which to stop")
    args = parser.parse_args()
    begin = time.perf_counter()
    shapes = {"tiny": (384, 512)} if args.tiny else SHAPES
    print(jax.devices()[0].device_kind, jax.__version__)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    big = [jnp.ones((2**20 if args.tiny else 2**30,), jnp.bfloat16)]
    rate = measure(lambda _, x: copy(x), jnp.ones(()), big, {}, repeats=5)
    print(f"copy {2 * rate:.0f} GB/s, read and write counted")
    del big
    for shape, (K, N) in shapes.items():
        count = max(2, min(24, int(6e8 // (2 * K * N))))
        for name, (function, M, input_major, options) in ways(args.tiny).items():
            if time.perf_counter() - begin > args.budget:
                print("the budget is spent")
                return
            make = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16),
                           static_argnums=1)  # fmt: skip
            keys = jax.random.split(jax.random.key(0), 1 if args.tiny else count)
            weights = [make(key, (K, N) if input_major else (N, K)) for key in keys]
            x = make(jax.random.key(1), (M, K))
            try:
                if args.tiny:
                    options = {}
                rate = measure(function, x, weights, options, repeats=10)
            except Exception as error:  # one way that cannot run must not cost the others
                print(f"{shape:14} {name:28} failed: {str(error).splitlines()[0][:120]}")
                continue
            off = f"off by {error_of(function, x, weights[0]):.4f}" if "pallas" in name else ""
            print(f"{shape:14} {name:28} {rate:7.0f} GB/s  {off}", flush=True)


if __name__ == "__main__":
    main()
