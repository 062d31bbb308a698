"""Quantised weights on one GPU: times of products by matrix, implementation and block size.

    python benchmarks/quantised_decode.py                # both parts, under ten minutes
    python benchmarks/quantised_decode.py --parts tune   # some of: matrices, tune
    python benchmarks/quantised_decode.py --tiny         # rehearsal on a CPU

Weights are random. GB/s are of the bytes as stored, scales included; the ratio is to the same
product in bfloat16, and `off` the largest difference from the dequantised product over its largest
value. `words` is the kernel of few rows in words of 32 bits. Each product is timed over several
matrices in one program; small ones may stay in the cache.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys
import time
from concurrent import futures

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from qwen_jax.ops.quantized_matmul import api as quantized_matmul
from qwen_jax.ops.quantized_matmul import packed_words_kernel, row_kernels
from qwen_jax.quant import array

# name: (inputs, outputs, whether it is an embedding [outputs, inputs])
MATRICES = {
    "7b gate_up": (3584, 37888, False),
    "7b down": (18944, 3584, False),
    "7b qkv": (3584, 4608, False),
    "7b o": (3584, 3584, False),
    "7b lm_head": (3584, 152064, False),
    "0.5b gate_up": (896, 9728, False),
    "0.5b down": (4864, 896, False),
    "0.5b qkv": (896, 1152, False),
    "0.5b o": (896, 896, False),
    "0.5b embed": (896, 151936, True),
}
TINY = {"tiny": (256, 512, False), "tiny embed": (256, 512, True)}
# Warps, tiles and reads of `words_kernel`.
TUNINGS = ((8, 1, 1), (4, 1, 2), (8, 1, 2), (16, 1, 2), (4, 2, 2), (4, 1, 4), (16, 1, 1), (8, 2, 1))
FORMATS = {"int8": ("int8", None), "int4 g128": ("int4", 128), "fp8": ("fp8", None)}
ROWS = (1, 8, 64, 256)


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to time: several products of x with different matrices."""

    name: str
    run: object
    x: jax.Array
    weights: list
    reference: jax.Array | None = None

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.weights))


def multiply(x, w, *, way: str, embedding: bool):
    """x [1, M, C] times a plain or a quantised matrix, one of the implementations."""
    einsum = "btd,vd->btv" if embedding else "btd,dv->btv"
    if way == "plain":
        return jnp.einsum(einsum, x, w)
    if way == "words":
        way = "gpu"
    return quantized_matmul.contract(einsum, x, w, layout=None, implementation=way)


def compiled(job: Job):
    """The job's compiled program, or the first line of the compiler's error."""
    try:
        program = jax.jit(lambda x, ws: [job.run(x, w) for w in ws])
        return program.lower(job.x, job.weights).compile()
    except Exception as error:  # a way that cannot run must not cost the others
        return f"{type(error).__name__}: {str(error).splitlines()[0][:110]}"


def seconds(program, job: Job, *, repeats: int) -> float:
    """Seconds of one product."""
    for _ in range(2):
        jax.block_until_ready(program(job.x, job.weights))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready([program(job.x, job.weights) for _ in range(5)])
        times.append((time.perf_counter() - begin) / 5)
    return statistics.median(times) / len(job.weights)


def run_jobs(jobs: list[Job], *, tiny: bool) -> dict[str, float]:
    """Compiles all at once, then times one after the other -> seconds of a product by name."""
    found, plain = {}, {}
    with futures.ThreadPoolExecutor(2 if tiny else 12) as pool:
        programs = list(pool.map(compiled, jobs))
    for job, program in zip(jobs, programs, strict=True):
        if isinstance(program, str):
            print(f"{job.name:44} failed: {program}", flush=True)
            continue
        try:
            took = seconds(program, job, repeats=3 if tiny else 7)
            off = ""
            if job.reference is not None:
                got = program(job.x, job.weights)[0].astype(jnp.float32)
                largest = jnp.abs(job.reference).max()
                off = f"off {float(jnp.abs(got - job.reference).max() / largest):.4f}"
        except Exception as error:
            print(f"{job.name:44} failed: {str(error).splitlines()[0][:110]}", flush=True)
            continue
        found[job.name] = took
        key = job.name.split(" | ")[0], job.x.shape[1]
        if " plain" in job.name:
            plain[key] = took
        rate = job.nbytes / len(job.weights) / took / 1e9
        ratio = f"{plain[key] / took:5.2f}x" if key in plain else " " * 6
        print(f"{job.name:44} {1e6 * took:8.1f} us {rate:6.0f} GB/s {ratio} {off}", flush=True)
    return found


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key, shape: tuple[int, ...], scale: float):
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(jnp.bfloat16)


def matrix_jobs(name: str, size: tuple[int, int, bool], *, tiny: bool) -> list[Job]:
    """Jobs for one matrix: plain, and every format and implementation, by rows."""
    inputs, outputs, embedding = size
    count = 2 if tiny else max(2, min(16, int(3e8 // (2 * inputs * outputs))))
    shape = (outputs, inputs) if embedding else (inputs, outputs)
    plain = [draw(key, shape, 0.02) for key in jax.random.split(jax.random.key(0), count)]
    formats = {"int8": FORMATS["int8"]} if embedding else FORMATS
    axis = -1 if embedding else -2
    weights = {}
    for label, (format, group) in formats.items():
        quantise = jax.jit(
            functools.partial(array.quantise, format=format, group_size=group, axis=axis)
        )
        weights[label] = [quantise(w) for w in plain]
    jobs = []
    for rows in ROWS[:2] if tiny else ROWS:
        x = draw(jax.random.key(1), (1, rows, inputs), 1.0)
        run = functools.partial(multiply, way="plain", embedding=embedding)
        jobs.append(Job(f"{name} | m{rows} plain", run, x, plain))
        for label, ws in weights.items():
            reference = jax.jit(
                lambda x, w: multiply(
                    x,
                    array.dequantise(w, dtype=jnp.bfloat16),
                    way="plain",
                    embedding=embedding,
                ).astype(jnp.float32)
            )(x, ws[0])
            ways = ["xla", "gpu"] if rows <= quantized_matmul.MOST_ROWS else ["xla", "dequantise"]
            for way in ways if label != "fp8" or rows in (1, 64) else []:
                run = functools.partial(multiply, way=way, embedding=embedding)
                jobs.append(Job(f"{name} | m{rows} {label} {way}", run, x, ws, reference))
            if rows == 1:
                run = functools.partial(multiply, way="words", embedding=embedding)
                turned = list(map(jax.jit(array.in_words), ws))
                jobs.append(Job(f"{name} | m1 {label} words", run, x, turned, reference))
    return jobs


def tune_jobs(name: str, size: tuple[int, int, bool], *, tiny: bool) -> list[Job]:
    """Jobs that time the kernel with other block sizes than the chosen ones."""
    inputs, outputs, embedding = size
    count = 2 if tiny else max(2, min(16, int(3e8 // (2 * inputs * outputs))))
    shape = (outputs, inputs) if embedding else (inputs, outputs)
    plain = [draw(key, shape, 0.02) for key in jax.random.split(jax.random.key(0), count)]
    jobs = []
    for label, rows in (("int8", 1), ("int4 g128", 1), ("int8", 8), ("int4 g128", 8)):
        format, group = FORMATS[label]
        if embedding and format == "int4":
            continue
        axis = -1 if embedding else -2
        quantise = jax.jit(
            functools.partial(array.quantise, format=format, group_size=group, axis=axis)
        )
        ws = [quantise(w) for w in plain]
        x = draw(jax.random.key(1), (rows, inputs), 1.0)
        if rows == 1:
            turned = list(map(jax.jit(array.in_words), ws))
            for tuning in TUNINGS:
                run = functools.partial(_row, tuning=packed_words_kernel.Tuning(*tuning))
                job = f"{name} | m1 {label} words{'x'.join(map(str, tuning))} p1"
                jobs.append(Job(job, run, x[None], turned))
        tried = {row_kernels.default_blocks(ws[0], rows=rows): "chosen"}
        for columns, step, warps, stages in (
            (64, 128, 4, 4), (64, 128, 2, 4), (64, 64, 2, 4), (128, 128, 4, 4), (128, 64, 4, 4),
            (128, 32, 4, 4), (256, 32, 4, 4), (256, 64, 8, 4), (128, 128, 8, 3), (64, 128, 4, 2),
        ):  # fmt: skip
            steps = inputs // step
            if outputs % columns or inputs % step:
                continue
            for programs in (264, 528, 1056):
                wanted = max(1, programs * columns // outputs)
                parts = min((n for n in range(1, steps + 1) if steps % n == 0),
                            key=lambda n, wanted=wanted: abs(n - wanted))  # fmt: skip
                blocks = row_kernels.Blocks(columns, step, parts, warps, stages)
                tried.setdefault(blocks, "")
        for blocks, note in list(tried.items())[: 2 if tiny else None]:
            said = f"{blocks.outputs}x{blocks.inputs} p{blocks.parts} w{blocks.warps}"
            job = f"{name} | m{rows} {label} {said} s{blocks.stages} {note}"
            run = functools.partial(_kernel, blocks=blocks)
            jobs.append(Job(job, run, x[None], ws))
    return jobs


def _kernel(x, w, *, blocks):
    return row_kernels.multiply(x[0], w, blocks=blocks)[None]


def _row(x, w, *, tuning):
    return packed_words_kernel.multiply(x[0], w, tuning=tuning)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--parts", default="matrices,tune", help="which, in this order")
    parser.add_argument("--budget", type=float, default=560, help="seconds after which to stop")
    args = parser.parse_args()
    begin = time.perf_counter()

    def late() -> bool:
        if time.perf_counter() - begin > args.budget:
            print("the budget is spent")
            return True
        return False

    print(jax.devices()[0].device_kind, jax.__version__)
    sizes = TINY if args.tiny else MATRICES
    for part in args.parts.split(","):
        print(f"-- {part}, {time.perf_counter() - begin:.0f} s", flush=True)
        for name, size in sizes.items() if part == "matrices" else ():
            if late():
                return
            run_jobs(matrix_jobs(name, size, tiny=args.tiny), tiny=args.tiny)
        for name in sizes if part == "tune" else ():
            if late():
                return
            found = run_jobs(tune_jobs(name, sizes[name], tiny=args.tiny), tiny=args.tiny)
            for prefix in sorted({key.rsplit(" p", 1)[0].rsplit(" ", 1)[0] for key in found}):
                best = min((k for k in found if k.startswith(prefix)), key=found.get)
                print(f"   best of {prefix}: {best.removeprefix(prefix)}", flush=True)


if __name__ == "__main__":
    main()
