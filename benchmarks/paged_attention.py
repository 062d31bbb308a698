"""Attention over pages on one GPU: decoding by shape and implementation, and chunks of prompts.

    python benchmarks/paged_attention.py            # about five minutes
    python benchmarks/paged_attention.py --parts steps int8 few   # a minute
    python benchmarks/paged_attention.py --tiny     # rehearsal on a CPU, kernels interpreted

Every line of decoding is one query a row, over as many layers' keys and values as are more than a
GPU's cache holds, in one program. GB/s count keys and values read once, and are held against a
large copy, read and write counted. `ours` is `qwen_jax/ops/attention/paged/gpu.py`, as it is set,
then with one setting changed at a time, the best kept; `jax` is the kernel that JAX ships for GPUs.
Numbers are checked before they are timed.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.ops.attention.paged import gpu as paged_gpu
from qwen_jax.ops.attention.paged import kv_pages
from qwen_jax.ops.attention.paged import reference as paged_reference

PAGE_SIZE = 64
PARTS = ("chunks", "grid", "int8", "steps", "few", "others")


@dataclass(frozen=True)
class Case:
    """`rows` queries of N heads over `keys` positions each; `spread` draws lengths up to twice."""

    name: str
    rows: int
    keys: int
    N: int
    K: int
    H: int
    lengths: str = "equal"  # equal, spread, or few: one row of eight is active

    def draw_lengths(self) -> np.ndarray:
        random = np.random.default_rng(0)
        if self.lengths == "spread":
            return random.integers(1, 2 * self.keys + 1, self.rows).astype(np.int32)
        lengths = np.full(self.rows, self.keys, np.int32)
        if self.lengths == "few":
            lengths[np.arange(self.rows) % 8 != 0] = 0
        return lengths

    @property
    def pages_of_row(self) -> int:
        longest = 2 * self.keys if self.lengths == "spread" else self.keys
        return -(-longest // PAGE_SIZE)


CASES = (
    Case("7b", 256, 1152, 28, 4, 128),
    Case("7b", 1, 32768, 28, 4, 128),
    Case("7b", 1, 1152, 28, 4, 128),
    Case("7b", 32, 4096, 28, 4, 128),
    Case("0.5b", 256, 1152, 14, 2, 64),
    Case("0.5b", 1, 1152, 14, 2, 64),
    Case("7b spread", 256, 1152, 28, 4, 128, "spread"),
    Case("7b few", 256, 1152, 28, 4, 128, "few"),
)
TINY = (Case("tiny", 3, 200, 4, 2, 32), Case("tiny spread", 3, 100, 4, 2, 32, "spread"))

# What is tried, one setting at a time, in this order.
GRID = {
    "block": (32, 64, 128),
    "warps": (2, 4, 8),
    "stages": (2, 3, 4, 5),
    "programs": (512, 1024, 2048, 4096),
    "min_keys": (128, 256, 512),
}


@dataclass(frozen=True)
class Inputs:
    """A case's arrays: the pages of several layers, and the table that they share."""

    q_BNH: jax.Array
    layers: tuple[jax.Array, ...]
    table_BM: jax.Array
    lengths_B: jax.Array


@functools.partial(jax.jit, static_argnums=1)
def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def make(case: Case, *, most_bytes: float) -> Inputs:
    pages = case.rows * case.pages_of_row
    shape = (pages, PAGE_SIZE, 2 * case.K, case.H)
    num_layers = max(2, min(24, int(most_bytes // (2 * np.prod(shape)))))
    keys = jax.random.split(jax.random.key(0), num_layers + 1)
    table = np.random.default_rng(1).permutation(pages).reshape(case.rows, -1)
    return Inputs(
        draw(keys[0], (case.rows, case.N, case.H)),
        tuple(draw(key, shape) for key in keys[1:]),
        jnp.asarray(table, jnp.int32),
        jnp.asarray(case.draw_lengths()),
    )


def milliseconds(run: Callable, *arguments, repeats: int) -> float:
    """Median over `repeats` of five dispatches in a row, of each."""
    for _ in range(2):
        jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready([run(*arguments) for _ in range(5)])
        times.append((time.perf_counter() - begin) / 5)
    return 1e3 * statistics.median(times)


def over_layers(function: Callable) -> Callable:
    """A program that calls function(q, one layer's cache) for every layer."""
    return jax.jit(lambda q, layers: [function(q, layer) for layer in layers])


class Table:
    """Prints a line for each way of a case, and goes on where one fails."""

    def __init__(self, copied: float, *, repeats: int, until: float) -> None:
        self.copied, self.repeats, self.until = copied, repeats, until

    def line(
        self, case: Case, way: str, function: Callable, q: jax.Array, layers, head: int = 0
    ) -> float:
        """Milliseconds a layer; infinite where it cannot run or time is up.

        `head` is the bytes of one key or value, bfloat16's where it is 0.
        """
        label = f"{case.name:10} {case.rows:4}x{case.keys:<6} {way:44}"
        if time.perf_counter() > self.until:
            return float("inf")
        try:
            took = milliseconds(over_layers(function), q, layers, repeats=self.repeats)
        except Exception as error:  # one way that cannot run must not cost the others
            print(f"{label} failed: {type(error).__name__} {str(error)[:300]!r}", flush=True)
            return float("inf")
        took /= len(layers)
        read = int(case.draw_lengths().sum()) * 2 * case.K * (head or 2 * case.H)
        rate = read / took / 1e6
        share = 100 * rate / self.copied
        print(f"{label} {took:8.4f} ms {rate:7.0f} GB/s {share:5.1f}%", flush=True)
        return took


def measure(
    case: Case, table: Table, *, parts: list[str], most_bytes: float, interpret: bool
) -> None:
    """Times the requested implementations on one case."""
    inputs = make(case, most_bytes=most_bytes)
    rows = {"table_BM": inputs.table_BM, "lengths_B": inputs.lengths_B}

    def ours(tuning: paged_gpu.Tuning) -> Callable:
        return functools.partial(paged_gpu.decode, **rows, tuning=tuning, interpret=interpret)

    check(case, ours(paged_gpu.TUNING), inputs)
    best = paged_gpu.TUNING
    least = table.line(case, f"ours {words(best)}", ours(best), inputs.q_BNH, inputs.layers)
    for name, values in GRID.items() if "grid" in parts else ():
        start = best
        for value in values:
            if value == getattr(start, name):
                continue
            tuning = dataclasses.replace(start, **{name: value})
            label = f"ours {words(tuning)}"
            took = table.line(case, label, ours(tuning), inputs.q_BNH, inputs.layers)
            if took < least:
                best, least = tuning, took
    print(f"{case.name} {case.rows}x{case.keys}: best {words(best)}, {least:.4f} ms", flush=True)
    if "int8" in parts:
        int8_ways(case, table, inputs, ours, best)
    if "steps" in parts:
        steps(case, table, inputs, tuning=best, interpret=interpret)
    if "few" in parts:
        few_queries(case, table, inputs, interpret=interpret)
    if "others" in parts:
        shipped(case, table, inputs, interpret=interpret)


def int8_ways(
    case: Case, table: Table, inputs: Inputs, ours: Callable, best: paged_gpu.Tuning
) -> None:
    """Times our kernel over int8 pages, also with larger blocks or more warps."""
    quantise = jax.jit(functools.partial(kv_pages.quantise, dtype=jnp.dtype(jnp.bfloat16)))
    layers = [quantise(layer) for layer in inputs.layers]
    for changed in ({}, {"block": 128}, {"warps": 8}):
        tuning = dataclasses.replace(best, **changed)
        label = f"int8 {words(tuning)}"
        table.line(case, label, ours(tuning), inputs.q_BNH, layers, head=case.H + 4)


def few_queries(case: Case, table: Table, inputs: Inputs, *, interpret: bool) -> None:
    """Five queries at the end of every row, as a draft is verified; keys are read once for all."""
    T = 5
    lengths_B = jnp.where(inputs.lengths_B >= T, T, 0)
    way = functools.partial(
        paged_gpu.extend,
        table_BM=inputs.table_BM,
        starts_B=inputs.lengths_B - lengths_B,
        lengths_B=lengths_B,
        prefix="pages",
        interpret=interpret,
    )
    q_BTNH = draw(jax.random.key(5), (case.rows, T, case.N, case.H))

    def read(q_BTNH, layer):
        return way(q_BTNH, None, None, layer)

    table.line(case, f"{T} queries a row", read, q_BTNH, inputs.layers)


def steps(
    case: Case, table: Table, inputs: Inputs, *, tuning: paged_gpu.Tuning, interpret: bool
) -> None:
    """Milliseconds a layer of a step: writing one position of every row, and reading."""
    rows = {"table_BM": inputs.table_BM, "lengths_B": inputs.lengths_B}
    read = functools.partial(paged_gpu.decode, **rows, tuning=tuning, interpret=interpret)
    append = functools.partial(paged_gpu.append, **rows, tuning=tuning, interpret=interpret)

    def apart(q_BNH, new_BKH, layer):
        layer = kv_pages.write(
            layer,
            new_BKH[:, None],
            new_BKH[:, None],
            table_BM=inputs.table_BM,
            positions_BT=jnp.maximum(inputs.lengths_B - 1, 0)[:, None],
            valid_BT=(inputs.lengths_B > 0)[:, None],
        )
        return read(q_BNH, layer), layer

    def at_once(q_BNH, new_BKH, layer):
        return append(q_BNH, new_BKH, new_BKH, layer)

    results = []
    for name, function in (("write, then read", apart), ("both in one kernel", at_once)):
        try:
            took, o = _time_steps(function, inputs, repeats=table.repeats)
        except Exception as error:
            print(f"{case.name}: {name} failed: {type(error).__name__} {str(error)[:600]!r}")
            continue
        results.append(o.astype(jnp.float32))
        off = float(jnp.abs(o - results[0]).max() / jnp.abs(results[0]).max())
        print(f"{case.name} {case.rows}x{case.keys}: {name} {took:.4f} ms, off by {off:.5f}")


def _time_steps(function: Callable, inputs: Inputs, *, repeats: int) -> tuple[float, jax.Array]:
    """Milliseconds a layer with pages donated, as an engine's are, and the first layer's result."""

    @functools.partial(jax.jit, donate_argnums=1)
    def run(q_BNH, layers):
        new = q_BNH[:, : layers[0].shape[2] // 2]
        done = [function(q_BNH, new, layer) for layer in layers]
        return [layer for _, layer in done], [o for o, _ in done]

    layers = jax.tree.map(jnp.copy, list(inputs.layers))
    layers, o = jax.block_until_ready(run(inputs.q_BNH, layers))
    first, times = o[0], []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(5):
            layers, o = run(inputs.q_BNH, layers)
        jax.block_until_ready(o)
        times.append((time.perf_counter() - begin) / 5 / len(layers))
    return 1e3 * statistics.median(times), first


def words(tuning: paged_gpu.Tuning) -> str:
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(tuning).items())


def check(case: Case, function: Callable, inputs: Inputs) -> None:
    """Prints how far two rows are from the reference in float32, over the largest value."""
    chosen = np.argsort(np.asarray(inputs.lengths_B))[-2:]
    try:
        got = function(inputs.q_BNH, inputs.layers[0])[chosen].astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            want = paged_reference.decode(
                inputs.q_BNH[chosen].astype(jnp.float32),
                inputs.layers[0].astype(jnp.float32),
                table_BM=inputs.table_BM[chosen],
                lengths_B=inputs.lengths_B[chosen],
            )
        off = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    except Exception as error:
        print(f"{case.name}: the check failed: {type(error).__name__} {str(error)[:2000]}")
        return
    print(f"{case.name} {case.rows}x{case.keys}: off by {off:.5f} of the largest value", flush=True)


def shipped(case: Case, table: Table, inputs: Inputs, *, interpret: bool) -> None:
    """The kernel that JAX ships, over [K, P, S, H] arrays of the same size."""
    try:
        from jax.experimental.pallas.ops.gpu import paged_attention
    except ImportError as error:
        print(f"{case.name}: JAX ships no kernel here: {error}")
        return
    pages = inputs.layers[0].shape[0]
    shape = (case.K, pages, PAGE_SIZE, case.H)
    keys = jax.random.split(jax.random.key(3), 2)
    sides = [tuple(draw(key, shape) for key in keys)] * 2
    M = inputs.table_BM.shape[1]
    for splits in (1, 4, 16):
        widened = jnp.pad(inputs.table_BM, ((0, 0), (0, -M % splits)))

        def way(q_BNH, sides, widened=widened, splits=splits):
            return paged_attention.paged_attention(
                q_BNH,
                *sides,
                widened,
                inputs.lengths_B,
                k_splits=splits,
                pages_per_compute_block=1,
                interpret=interpret,
            )

        table.line(case, f"jax splits={splits}", way, inputs.q_BNH, sides)


def chunks(*, interpret: bool, repeats: int) -> None:
    """A chunk of a 7B prompt behind its prefix: ms a layer, and distance in values."""
    N, K, H = (28, 4, 128) if not interpret else (4, 2, 32)
    shapes = ((1, 2048, 0), (1, 2048, 14336), (4, 2048, 2048), (1, 8192, 0), (1, 8192, 24576))
    for B, T, start in ((1, 64, 64),) if interpret else shapes:
        M = (start + T) // PAGE_SIZE
        q, k, v = (draw(jax.random.key(i), (B, T, n, H)) for i, n in enumerate((N, K, K)))
        kv = draw(jax.random.key(9), (B * M, PAGE_SIZE, 2 * K, H))
        table_BM = jnp.arange(B * M, dtype=jnp.int32).reshape(B, M)
        at = jnp.broadcast_to(start + jnp.arange(T), (B, T))
        kv = kv_pages.write(
            kv, k, v, table_BM=table_BM, positions_BT=at, valid_BT=jnp.ones((B, T), bool)
        )
        rows = {
            "table_BM": table_BM,
            "starts_B": jnp.full(B, start, jnp.int32),
            "lengths_B": jnp.full(B, T, jnp.int32),
        }
        for prefix in ("none", "pages") if start == 0 else ("pages",):
            label = f"chunk {B}x{T} behind {start}, prefix={prefix}"
            way = jax.jit(functools.partial(paged_gpu.extend, **rows, prefix=prefix))
            try:
                took = milliseconds(way, q, k, v, kv, repeats=repeats)
                rows["lengths_B"] = jnp.where(jnp.arange(B) == 0, T, 0).astype(jnp.int32)
                want = jax.jit(functools.partial(paged_reference.extend, **rows, prefix=prefix))(
                    q, k, v, kv
                )
                got = way(q, k, v, kv)
                off = float(jnp.abs(got - want)[0].max() / jnp.abs(want).max())
            except Exception as error:
                print(f"{label} failed: {type(error).__name__} {str(error)[:1000]!r}", flush=True)
                continue
            flops = 4 * B * N * H * T * (start + T / 2)
            rate = flops / took / 1e9
            print(f"{label}: {took:8.3f} ms {rate:6.0f} TFLOP/s, off by {off:.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which to stop")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    args = parser.parse_args()
    until = time.perf_counter() + args.budget
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    repeats = 2 if args.tiny else 10
    big = jnp.ones(2**20 if args.tiny else 2**30, jnp.bfloat16)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    copied = 2 * big.nbytes / milliseconds(copy, big, repeats=repeats) / 1e6
    del big
    print(f"copy {copied:.0f} GB/s, read and write counted")
    table = Table(copied, repeats=repeats, until=until)
    if "chunks" in args.parts:
        chunks(interpret=args.tiny, repeats=repeats)
    for case in TINY if args.tiny else CASES:
        try:
            measure(
                case,
                table,
                parts=args.parts,
                most_bytes=0 if args.tiny else 3e9,
                interpret=args.tiny,
            )
        except Exception as error:
            print(f"{case.name} failed: {type(error).__name__} {str(error)[:1000]!r}", flush=True)


if __name__ == "__main__":
    main()
