"""Times drawing a token for a batch: greedy, and `full` for settings that ask for more and more.

    python benchmarks/sampling.py [--tiny]

Each figure is a step inside one program of many, as an engine's dispatch has it: milliseconds, and
the multiple of the greedy plan's. Then the search for cutoffs by itself, by every implementation
and some tunings of the kernel, whose cutoffs are held against each other to the bit.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from configs.sampling import SamplingParams
from qwen_jax.decode import sampling
from qwen_jax.ops.top_k_top_p import api as top_k_top_p
from qwen_jax.ops.top_k_top_p import gpu as top_k_top_p_gpu

ASKED = {
    "nothing": {"temperature": 0.0},
    "logprobs": {"temperature": 0.0, "logprobs": 20},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.05},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8},
    "qwen": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
}

SEARCHES = {  # top_k, top_p
    "neither": (0, 1.0),
    "k=20": (20, 1.0),
    "k=5000": (5000, 1.0),
    "p=0.8": (0, 0.8),
    "p=0.99": (0, 0.99),
    "both": (20, 0.8),
}
TUNINGS = [{}, {"warps": 8}, {"pieces": 4}, {"pivots": 4}, {"warps": 32, "pieces": 4, "depth": 16}]


@functools.partial(jax.jit, static_argnames=("sampler", "steps"))
def draws(logits_BV, settings, told: dict, *, sampler: sampling.Sampler, steps: int) -> jax.Array:
    """The tokens of `steps` draws, each from logits that the one before has changed."""

    def one(carry, step):
        logits_BV, positions_B = carry
        drawn = sampling.draw(logits_BV, settings, sampler=sampler, positions_B=positions_B, **told)
        rows_B = jnp.arange(positions_B.shape[0])
        logits_BV = logits_BV.at[rows_B, drawn.tokens_B].add(-0.1)
        return (logits_BV, positions_B + 1), drawn.tokens_B

    positions_B = jnp.zeros(logits_BV.shape[0], jnp.int32)
    return jax.lax.scan(one, (logits_BV, positions_B), jnp.arange(steps))[1]


def milliseconds(
    rows: int, V: int, values: dict, *, sampler: sampling.Sampler, steps: int
) -> float:
    logits_BV = 3 * jax.random.normal(jax.random.key(0), (rows, V), jnp.float32)
    settings = jax.device_put(sampling.settings([SamplingParams(**values)] * rows, num_rows=rows))
    told = {
        "generated_B": jnp.zeros(rows, jnp.int32),
        "eos_E": jnp.asarray([1], jnp.int32),
        "seen_BV": jnp.zeros((rows, V), bool),
        "counts_BV": jnp.zeros((rows, V), jnp.int32),
        "mask_BW": jnp.full((rows, -(-V // 32)), 2**32 - 1, jnp.uint32),
    }
    job = functools.partial(draws, logits_BV, settings, told, sampler=sampler, steps=steps)
    return timed(job)[0] / steps


def timed(job: Callable[[], jax.Array]) -> tuple[float, np.ndarray]:
    """Milliseconds of a job that has run before, and its result."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        result = jax.block_until_ready(job())
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times[1:])), np.asarray(result)


@functools.partial(jax.jit, static_argnames=("steps", "implementation", "tuning"))
def searches(scores_BV, top_k_B, top_p_B, *, steps: int, implementation: str, tuning) -> jax.Array:
    """The cutoffs of `steps` searches, each in scores that the one before has changed."""

    def one(scores_BV, _):
        cutoff_B = top_k_top_p.threshold(
            scores_BV,
            top_k_B=top_k_B,
            top_p_B=top_p_B,
            min_p_B=jnp.zeros_like(top_p_B),
            implementation=implementation,
            tuning=tuning,
        )
        return scores_BV.at[:, 0].set(jnp.maximum(cutoff_B, -100.0)), cutoff_B

    return jax.lax.scan(one, scores_BV, None, length=steps)[1]


def compare(rows: int, V: int, tunings: list[dict], *, steps: int) -> None:
    """Prints a line for every implementation of the search for cutoffs."""
    scores_BV = 3 * jax.random.normal(jax.random.key(0), (rows, V), jnp.float32)
    print(f"rows {rows:4}  {'cutoffs, ms':34}" + "".join(f"{name:>9}" for name in SEARCHES))
    found = {}
    for values in (None, *tunings):
        implementation = "passes" if values is None else "kernel"
        tuning = None if values is None else top_k_top_p_gpu.Tuning(**values)
        times = []
        for name, (k, p) in SEARCHES.items():
            k_B, p_B = jnp.full(rows, k, jnp.int32), jnp.full(rows, p, jnp.float32)
            ways = {"steps": steps, "implementation": implementation, "tuning": tuning}
            took, got = timed(functools.partial(searches, scores_BV, k_B, p_B, **ways))
            equal = np.array_equal(found.setdefault(name, got), got)
            times.append(f"{took / steps:8.4f}" + (" " if equal else "!"))
        what = implementation + "".join(f" {n}={x}" for n, x in (values or {}).items())
        print(f"rows {rows:4}  {what:34}" + "".join(times), flush=True)
    print("  (! where cutoffs differ from those of passes)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU")
    tiny = parser.parse_args().tiny
    V, steps = (512, 4) if tiny else (151_936, 64)
    print(f"{jax.devices()[0].device_kind}, vocabulary {V}, {steps} steps a program")
    for rows in (1, 4) if tiny else (1, 32, 256):
        least = milliseconds(rows, V, ASKED["nothing"], sampler="greedy", steps=steps)
        print(f"rows {rows:4}  greedy      {least:8.4f} ms")
        for name, values in ASKED.items():
            took = milliseconds(rows, V, values, sampler="full", steps=steps)
            print(f"rows {rows:4}  {name:11} {took:8.4f} ms  {took / least:6.1f}x", flush=True)
    for rows in (2,) if tiny else (256, 32, 8, 1):
        compare(rows, V, TUNINGS[:1] if tiny else TUNINGS, steps=steps)


if __name__ == "__main__":
    main()
