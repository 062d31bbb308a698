"""Times drawing a token for a batch: greedy, and `full` for settings that ask for more and more.

    python benchmarks/sampling.py [--tiny]

Each figure is a step inside one program of many, as an engine's dispatch has it: milliseconds, and
the multiple of the greedy plan's.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import schema
from qwen_jax import sampling

ASKED = {
    "nothing": {"temperature": 0.0},
    "logprobs": {"temperature": 0.0, "logprobs": 20},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.05},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8},
    "qwen": {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
}


@functools.partial(jax.jit, static_argnames=("how", "steps"))
def draws(logits_BV, settings, told: dict, *, how: sampling.How, steps: int) -> jax.Array:
    """The tokens of `steps` draws, each from logits that the one before has changed."""

    def one(carry, step):
        logits_BV, positions_B = carry
        drawn = sampling.draw(logits_BV, settings, how=how, positions_B=positions_B, **told)
        rows_B = jnp.arange(positions_B.shape[0])
        logits_BV = logits_BV.at[rows_B, drawn.tokens_B].add(-0.1)
        return (logits_BV, positions_B + 1), drawn.tokens_B

    positions_B = jnp.zeros(logits_BV.shape[0], jnp.int32)
    return jax.lax.scan(one, (logits_BV, positions_B), jnp.arange(steps))[1]


def milliseconds(rows: int, V: int, values: dict, *, how: sampling.How, steps: int) -> float:
    logits_BV = 3 * jax.random.normal(jax.random.key(0), (rows, V), jnp.float32)
    settings = jax.device_put(sampling.settings([schema.Sampling(**values)] * rows, num_rows=rows))
    told = {
        "generated_B": jnp.zeros(rows, jnp.int32),
        "eos_E": jnp.asarray([1], jnp.int32),
        "seen_BV": jnp.zeros((rows, V), bool),
        "counts_BV": jnp.zeros((rows, V), jnp.int32),
        "mask_BW": jnp.full((rows, -(-V // 32)), 2**32 - 1, jnp.uint32),
    }
    times = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(draws(logits_BV, settings, told, how=how, steps=steps))
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times[1:])) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU")
    tiny = parser.parse_args().tiny
    V, steps = (512, 4) if tiny else (151_936, 64)
    print(f"{jax.devices()[0].device_kind}, vocabulary {V}, {steps} steps a program")
    for rows in (1, 4) if tiny else (1, 32, 256):
        least = milliseconds(rows, V, ASKED["nothing"], how="greedy", steps=steps)
        print(f"rows {rows:4}  greedy      {least:8.4f} ms")
        for name, values in ASKED.items():
            took = milliseconds(rows, V, values, how="full", steps=steps)
            print(f"rows {rows:4}  {name:11} {took:8.4f} ms  {took / least:6.1f}x", flush=True)


if __name__ == "__main__":
    main()
