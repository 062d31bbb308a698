"""Grouped matrix products of a mixture of experts: error and TFLOP/s of every way and block size.

    python benchmarks/grouped_matmul.py            # on a Hopper GPU, about three minutes
    python benchmarks/grouped_matmul.py --tiny     # rehearsal on a CPU

`up` is 2048 -> 1408, `down` 1408 -> 2048 (Qwen1.5-MoE-A2.7B), `gate_up` both input matrices in one,
`57b up` 3584 -> 2560 with 64 experts, `8 local` the same with the 8 experts of one of 8 devices.
`fwd` is the product, `dlhs` and `drhs` its derivatives, `rows` fwd and dlhs in one program, `all`
the three through `jax.vjp`. `dense` is one product of the same size with one matrix, by XLA.
Errors are taken against float32 on groups
that are uneven, partly empty, and leave rows over; times on even and on uneven groups that fill
all rows, several calls in a row over several inputs. A candidate that hangs or breaks the device
costs its own rows only: candidates run in a child process that is started again after it.
"""

import argparse
import functools
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120

# shape: (E, K, N)
SHAPES = {
    "up": (60, 2048, 1408),
    "down": (60, 1408, 2048),
    "gate_up": (60, 2048, 2816),
    "57b up": (64, 3584, 2560),
    "8 local": (8, 3584, 2560),
}
FULL = {"M": 32_768, "inputs": 3, "calls": 12, "repeats": 5}
TINY = {"M": 256, "inputs": 2, "calls": 2, "repeats": 2}
HANG = 60  # seconds without a line after which the child is taken for hung
FAILED = 3  # the child's exit code after a device error


@dataclass(frozen=True)
class Candidate:
    shape: str
    op: str
    way: str
    blocks: tuple = ()

    def __str__(self) -> str:
        return f"{self.shape:8}{self.op:5} {self.way:10} {'x'.join(map(str, self.blocks)):16}"


def candidates(tiny: bool) -> list[Candidate]:
    ops = ("fwd", "dlhs", "drhs")
    if tiny:
        return [Candidate(shape, op, "reference") for shape in ("up", "8 local") for op in ops]
    table = []
    for op in ops:
        table += [Candidate("up", op, "hopper"), Candidate("up", op, "hopper", (128, 6, 128))]
    table += [Candidate("up", op, "hopper") for op in ("rows", "all")]
    table += [Candidate("up", "fwd", "shipped"), Candidate("up", "drhs", "shipped")]
    table += [Candidate("up", "fwd", "dense"), Candidate("up", "fwd", "reference")]
    for shape in ("down", "gate_up", "57b up", "8 local"):
        table += [Candidate(shape, op, "hopper") for op in ops]
        table += [Candidate(shape, "fwd", "dense")]
    return table


def function(candidate: Candidate):
    """f(lhs_MK, rhs_EKN, dout_MN, sizes_E) of the candidate."""
    import jax

    from qwen_jax.ops.grouped_matmul import api, hopper, reference

    if candidate.way == "shipped":
        return shipped(candidate.op)
    if candidate.way == "dense":
        return lambda lhs, rhs, dout, sizes: lhs @ rhs[0]
    if candidate.op == "all":

        def whole(lhs, rhs, dout, sizes):
            out, pull = jax.vjp(lambda lhs, rhs: api.grouped_matmul(lhs, rhs, sizes), lhs, rhs)
            return out, *pull(dout)

        return whole
    module, options = reference, {}
    if candidate.way == "hopper":
        module, options = hopper, {"blocks": hopper.Blocks(*candidate.blocks)}

    def fwd(lhs, rhs, dout, sizes):
        return module.rows(lhs, rhs, sizes, rhs_order="EKN", **options)

    def dlhs(lhs, rhs, dout, sizes):
        return module.rows(dout, rhs, sizes, rhs_order="ENK", **options)

    def drhs(lhs, rhs, dout, sizes):
        return module.outer(lhs, dout, sizes, **options)

    def rows(*arguments):
        return fwd(*arguments), dlhs(*arguments)

    return {"fwd": fwd, "dlhs": dlhs, "drhs": drhs, "rows": rows}[candidate.op]


def shipped(op: str):
    """The example kernels that JAX itself carries; they leave rows past the last group alone."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    if op == "fwd":
        kernel = functools.partial(ragged_dot_mgpu.ragged_dot, max_concurrent_steps=4)
        return lambda lhs, rhs, dout, sizes: kernel(
            lhs, rhs, group_sizes=sizes, block_m=128, block_n=128, block_k=64, grid_block_n=1
        )
    kernel = functools.partial(
        transposed_ragged_dot_mgpu.transposed_ragged_dot, max_concurrent_steps=4
    )
    return lambda lhs, rhs, dout, sizes: kernel(
        lhs, dout, group_sizes=sizes, block_m=128, block_n=128, block_k=64, grid_block_n=1
    )


def exact(op: str, lhs, rhs, dout, sizes):
    """The exact result by the definition, in float32, one group after the other."""
    import jax
    import jax.numpy as jnp

    ends = jnp.cumsum(sizes)
    row = jnp.arange(len(lhs))
    product = functools.partial(jnp.matmul, precision="highest")

    def mask(e, x):
        return jnp.where(((row >= ends[e] - sizes[e]) & (row < ends[e]))[:, None], x, 0)

    wide = functools.partial(jnp.asarray, dtype=jnp.float32)
    lhs, dout = wide(lhs), wide(dout)
    if op == "drhs":
        return jax.lax.map(lambda e: product(mask(e, lhs).T, dout), jnp.arange(len(rhs)))
    a, K = (lhs, rhs.shape[2]) if op == "fwd" else (dout, rhs.shape[1])

    def add(e, total):
        matrix = wide(rhs[e]) if op == "fwd" else wide(rhs[e]).T
        return total + product(mask(e, a), matrix)

    return jax.lax.fori_loop(0, len(rhs), add, jnp.zeros((len(lhs), K), jnp.float32))


def group_sizes(kind: str, *, M: int, E: int):
    """Group sizes: even, uneven (both sum to M), or ragged (empty groups, M/8 rows over)."""
    import numpy as np

    if kind == "even":
        return np.full(E, M // E) + (np.arange(E) < M % E)
    rng = np.random.default_rng(time.time_ns())
    shares = rng.dirichlet(np.full(E, 2.0))
    if kind == "ragged":
        shares[::5] = 0
        M = M - M // 8 - 3
    return rng.multinomial(M, shares / shares.sum())


def inputs(shape: str, seed: int, *, tiny: bool):
    import jax
    import jax.numpy as jnp

    size = TINY if tiny else FULL
    E, K, N = SHAPES[shape]
    E, K, N = (min(E, 6), K // 16, N // 16) if tiny else (E, K, N)
    M = size["M"]
    keys = jax.random.split(jax.random.key(seed), 3)
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    return [draw(key, s) for key, s in zip(keys, [(M, K), (E, K, N), (M, N)], strict=True)]


def errors(got, want) -> str:
    """Errors of the whole array, and of its worst row, which the first figure would hide."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def distances(got, want):
        off = got.astype(jnp.float32) - want
        row, size = (jnp.sqrt(jnp.sum(x * x, axis=-1)) for x in (off, want))
        zero = size == 0
        worst = jnp.max(jnp.where(zero, jnp.where(row > 0, jnp.inf, 0), row / (size + zero)))
        return jnp.linalg.norm(row) / jnp.linalg.norm(size), worst

    whole, worst = map(float, distances(got, want))
    verdict = "ok" if whole < 4e-3 and worst < 1e-2 else "WRONG"
    return f"{verdict:5} {whole:.1e} row {worst:.1e}"


def seconds(f, arguments: list, *, calls: int, repeats: int) -> float:
    """Median seconds of a call, of several in a row so that the host's time is hidden."""
    import jax

    jax.block_until_ready([f(*a) for a in arguments])
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        out = None
        for i in range(calls):
            out = f(*arguments[i % len(arguments)])
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


def ceiling(tiny: bool) -> float:
    """TFLOP/s of a square bfloat16 product."""
    import jax
    import jax.numpy as jnp

    n = 256 if tiny else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    return 2 * n**3 / seconds(jax.jit(jnp.matmul), [(a, b), (b, a)], calls=6, repeats=5) / 1e12


def run(start: int, *, tiny: bool) -> None:
    """The child: candidates from `start` on, one line each."""
    import jax
    import jax.numpy as jnp

    size = TINY if tiny else FULL
    top = ceiling(tiny)
    print(f"# {jax.devices()[0].device_kind}, jax {jax.__version__}, 8192^3: {top:.0f} TFLOP/s")
    shape, sets, want = None, [], {}
    for index, c in enumerate(candidates(tiny)):
        if index < start:
            continue
        print(f"@{index}", flush=True)
        if c.shape != shape:
            shape, want, sets = c.shape, {}, []  # drops the last shape's arrays first
            sets = [inputs(shape, seed, tiny=tiny) for seed in range(size["inputs"])]
            E = len(sets[0][1])
            sizes = {k: group_sizes(k, M=size["M"], E=E) for k in ("even", "uneven", "ragged")}
            for kind, s in sizes.items():
                print(f"# {shape} {kind}: sum {s.sum()}, smallest {s.min()}, largest {s.max()}")
            sizes = {kind: jnp.asarray(s, jnp.int32) for kind, s in sizes.items()}
        try:
            begin = time.perf_counter()
            f = jax.jit(function(c))
            f = f.lower(*sets[0], sizes["even"]).compile()
            compiled = time.perf_counter() - begin
            verdict = "-"
            if c.way not in ("dense", "shipped") and c.op in ("fwd", "dlhs", "drhs"):
                if c.op not in want:
                    want = {
                        c.op: jax.jit(functools.partial(exact, c.op))(*sets[0], sizes["ragged"])
                    }
                poison = jnp.full(want[c.op].shape, jnp.nan, jnp.bfloat16)
                jax.block_until_ready(poison)
                poison.delete()  # its memory is what the next result gets
                verdict = errors(f(*sets[0], sizes["ragged"]), want[c.op])
            K, N = sets[0][1].shape[1:]
            flops = 2 * size["M"] * K * N * {"rows": 2, "all": 3}.get(c.op, 1)
            rates = []
            for kind in ("even", "uneven"):
                slow = c.way == "reference"
                took = seconds(
                    f, [(*x, sizes[kind]) for x in sets],
                    calls=3 if slow else size["calls"], repeats=2 if slow else size["repeats"],
                )  # fmt: skip
                rate = flops / took / 1e12
                rates.append(f"{kind} {took * 1e6:6.0f} us {rate:5.0f} {100 * rate / top:4.1f}%")
            print(f"{c} {verdict:24} {'  '.join(rates)}  ({compiled:.1f} s)", flush=True)
        except Exception as error:  # one candidate that cannot run must not cost the others
            text = " ".join(str(error).split())[:300]
            print(f"{c} failed: {type(error).__name__}: {text}", flush=True)
            if "CUDA" in text:
                sys.exit(FAILED)


def supervise(tiny: bool) -> None:
    """Run the child, and after a hang or a device error another one behind the bad candidate."""
    start, total = 0, len(candidates(tiny))
    while start < total:
        command = [sys.executable, __file__, "--from", str(start)] + ["--tiny"] * tiny
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines: queue.Queue = queue.Queue()

        def read(stream=child.stdout, lines=lines):
            for line in stream:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=HANG)
            except queue.Empty:
                print(f"{candidates(tiny)[start]} hung for {HANG} s", flush=True)
                child.kill()
                break
            if line is None:
                break
            if line.startswith("@"):
                start = int(line[1:])
            else:
                print(line, end="", flush=True)
        if child.wait() == 0:
            return
        start += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--from", dest="start", type=int, help="run here, from this candidate on")
    args = parser.parse_args()
    if args.start is None:
        supervise(args.tiny)
    else:
        run(args.start, tiny=args.tiny)


if __name__ == "__main__":
    main()
