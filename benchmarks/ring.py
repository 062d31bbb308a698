"""Attention over a context axis of two GPUs against one: correctness, time, TFLOP/s and memory.

    python benchmarks/ring.py            # 2 GPUs, under four minutes
    python benchmarks/ring.py --tiny     # rehearsal on two fake CPU devices

One causal attention, forward and backward, with the heads of the 7B model. FLOPs are counted
causally: 2 T^2 N H forward and 2.5 times that backward. GB are arguments, results and temporaries
of the compiled program on one device. Rows that would pass `--budget` seconds are only compiled.
"""

import argparse
import functools
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import jax
import jax.numpy as jnp
import numpy as np

from partitioning import mesh, ring, rules, sharding
from qwen_jax.ops.attention import api, context_parallelism

TINY = "--tiny" in sys.argv
N, K, H = (4, 2, 16) if TINY else (28, 4, 128)
KERNEL = "reference" if TINY else "cudnn"
LENGTHS = (64, 128) if TINY else (16384, 65536, 262144, 1048576, 2097152)
VARIANTS = ("ring", "one", "all_gather", "ulysses")  # in case that time runs out


def prepare(num_devices: int) -> None:
    """Settings that have to be there before the first look at a device."""
    if TINY:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_devices)
        return
    overlap = "--xla_gpu_enable_latency_hiding_scheduler=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {overlap}".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")


def layout(variant: str, num_devices: int) -> sharding.Layout:
    count = 1 if variant == "one" else num_devices
    config = mesh.parse(f"context={count}")
    made = mesh.make(config, devices=jax.devices()[:count])
    return sharding.Layout(made, rules.rule_set("train"))


def program(variant: str, where: sharding.Layout, shape: tuple[int, int], *, packed: bool):
    """Jitted: q, k, v, do, ids -> o, dq, dk, dv; with the arguments' shapes and shardings."""
    B, T = shape
    heads = sharding.sharding(("batch", "length", "act_heads", None), where)
    rows = sharding.sharding(("batch", "length"), where)

    def run(q, k, v, do, ids):
        attend = functools.partial(
            api.attention,
            mask=api.Mask(segment_ids_BT=ids if packed else None),
            implementation=KERNEL,
            context_parallel=None if variant == "one" else variant,
            layout=where,
        )
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    like = [jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16, sharding=heads) for n in (N, K, K, N)]
    like.append(jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows))
    return jax.jit(run, out_shardings=heads), like


def check(num_devices: int) -> None:
    """Every variant against float32 attention on one device; packed rows too."""
    T = 64 if TINY else 2048
    chunk = T // (2 * num_devices)
    keys = jax.random.split(jax.random.key(0), 4)
    wide = [jax.random.normal(k, (3, T, n, H), jnp.float32) for k, n in zip(keys, (N, K, K, N))]  # noqa: B905
    wide = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in wide]
    # Documents that end inside chunks, at their ends, and one that spans them all.
    cuts = [[chunk // 2, chunk + 5, 3 * chunk - 3], [chunk, 2 * chunk, 3 * chunk], []]
    ids = np.stack([np.searchsorted(np.array(c), np.arange(T), side="right") for c in cuts])
    ids = ids.astype(np.int32)
    order = ring.chunk_order(num_devices)

    def arranged(x):
        x = np.asarray(x)
        return np.concatenate(np.split(x, 2 * num_devices, axis=1), axis=1)[
            :, np.concatenate([np.arange(c * chunk, (c + 1) * chunk) for c in order])
        ]

    for packed in (False, True):

        def definition(q, k, v, do, packed=packed):
            mask = api.Mask(segment_ids_BT=jnp.asarray(ids) if packed else None)
            attend = functools.partial(api.attention, mask=mask, implementation="reference")
            o, pull = jax.vjp(attend, q, k, v)
            return o, *pull(do)

        with jax.default_matmul_precision("highest"):
            want = jax.device_get(jax.jit(definition)(*wide))
        for variant in VARIANTS:
            try:
                where = layout(variant, num_devices)
                run, like = program(variant, where, (3, T), packed=packed)
                put = arranged if context_parallelism.is_zigzag(variant) else np.asarray
                values = [*(x.astype(jnp.bfloat16) for x in wide), ids]
                placed = [
                    jax.device_put(put(x), a.sharding) for x, a in zip(values, like, strict=True)
                ]
                got = jax.device_get(run(*placed))
                errors = [
                    np.linalg.norm(a.astype(np.float32) - put(b)) / np.linalg.norm(b)
                    for a, b in zip(got, want, strict=True)
                ]
                verdict = "ok" if max(errors) < 2e-2 else "WRONG"
                print(
                    f"{'packed' if packed else 'causal':8} {variant:12} relative error of o, dq, "
                    f"dk, dv: {' '.join(f'{e:.4f}' for e in errors)}  {verdict}",
                    flush=True,
                )
            except Exception as error:  # one variant that cannot run must not cost the others
                print(f"{variant:12} failed: {str(error)[:300]}", flush=True)


def random_inputs(like):
    def draw():
        keys = jax.random.split(jax.random.key(1), len(like) - 1)
        drawn = [
            jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, like[:-1], strict=True)
        ]
        return *drawn, jnp.ones(like[-1].shape, jnp.int32)

    return jax.jit(draw, out_shardings=tuple(a.sharding for a in like))()


def measure(variant: str, length: int, *, num_devices: int, may_run) -> tuple[float | None, float]:
    """(median seconds, or None where only compiled; GB on one device)."""
    run, like = program(variant, layout(variant, num_devices), (1, length), packed=False)
    compiled = run.lower(*like).compile()
    memory = compiled.memory_analysis()
    gigabytes = 1e-9 * (
        memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    )
    devices = 1 if variant == "one" else num_devices
    expected = 7 * length**2 * N * H / devices / 4e14
    if not may_run(expected, gigabytes):
        return None, gigabytes
    inputs = random_inputs(like)
    jax.block_until_ready(inputs)
    times = []
    for _ in range(1 if expected > 4 else 4):  # the first of several warms up
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:] or times), gigabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--budget", type=float, default=200, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    prepare(args.devices)
    begin = time.perf_counter()
    print(f"{args.devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {KERNEL}")
    check(args.devices)
    limit = (jax.devices()[0].memory_stats() or {"bytes_limit": 4e9})["bytes_limit"] / 1e9
    print(f"{time.perf_counter() - begin:.0f} s so far; {limit:.1f} GB a device for XLA")
    print(f"\n{'length':>8} {'variant':12} {'ms':>9} {'TFLOP/s a device':>17} {'GB':>6}")

    def may_run(seconds: float, gigabytes: float) -> bool:
        left = args.budget - (time.perf_counter() - begin)
        return seconds < left and gigabytes < limit

    for length in LENGTHS:
        measured = {}
        for variant in VARIANTS:
            try:
                seconds, gigabytes = measure(
                    variant, length, num_devices=args.devices, may_run=may_run
                )
            except Exception as error:
                print(f"{length:8} {variant:12} failed: {str(error)[:300]}", flush=True)
                continue
            if seconds is None:
                why = "does not fit" if gigabytes > limit else "not run: time"
                print(f"{length:8} {variant:12} {why:>27} {gigabytes:6.1f}", flush=True)
                continue
            measured[variant] = seconds
            devices = 1 if variant == "one" else args.devices
            rate = 7 * length**2 * N * H / devices / seconds / 1e12
            print(
                f"{length:8} {variant:12} {1e3 * seconds:9.1f} {rate:17.1f} {gigabytes:6.1f}",
                flush=True,
            )
        if alone := measured.pop("one", None):
            ratios = ", ".join(f"{name} {alone / t:.2f}" for name, t in measured.items())
            print(f"{length:8} times as fast as one device: {ratios}", flush=True)
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
