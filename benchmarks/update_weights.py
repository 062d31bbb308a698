"""Seconds until a running engine serves new weights, and until its next first token.

    python benchmarks/update_weights.py           # on a GPU: 0.5B and 7B, random bfloat16 weights
    python benchmarks/update_weights.py --tiny    # a rehearsal on a CPU
    python benchmarks/update_weights.py --only 7b # models whose name holds this

Each engine is warmed up, serves one request, and is then given other weights three times, each time
from stacked parameters as a trainer on the same device holds them: `prepare` is the time to bring
them into the engine's form beside the old ones, `update` that of `Engine.update_weights` until the
device is done, `first token` from the submission of a request of 128 tokens to its first token, and
`before` the same before any update. The number of programs that XLA compiled in the process from
the second update on must be 0 (the first also compiles the copies of `prepare`), and that of the
engine's own programs must not change at all.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from configs.engine import EngineConfig
from configs.models import qwen2_5
from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from infer.engine import engine as engine_lib
from infer.engine.request import Request
from qwen_jax.decode import weights
from qwen_jax.model import transformer

SETTINGS = EngineConfig(
    num_slots=8, max_length=512, prefill_chunk=256, prefill_tokens=256, buckets="one"
)
NUM_UPDATES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any device")
    parser.add_argument("--only", default="", help="models whose name holds this")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            event.endswith("backend_compile_duration") and compiled.append(seconds)
        )
    )
    print(
        "| model | GB | update | prepare ms | update ms | first token ms | before ms | "
        "compiled: engine, process | peak GB |\n|" + " --- |" * 9
    )
    for name in ("tiny",) if arguments.tiny else ("0.5b", "7b"):
        if arguments.only in name:
            cfg = qwen2_5.tiny() if name == "tiny" else qwen2_5.base(name)
            measure(name, cfg, compiled)


def measure(name: str, cfg: ModelConfig, compiled: list[float]) -> None:
    dtype = jnp.dtype(jnp.bfloat16)
    init = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(dtype), transformer.init(cfg, key)))
    made = weights.prepare(cfg, init(jax.random.key(0)), dtype=dtype)
    engine = engine_lib.Engine(cfg, made, settings=SETTINGS, eos_ids=(), dtype=dtype)
    made_form = made.form
    del made
    engine.warm_up()
    first_token(engine, cfg, seed=0)
    before = first_token(engine, cfg, seed=1)
    for version in range(1, NUM_UPDATES + 1):
        trained = jax.block_until_ready(init(jax.random.key(version)))
        size = sum(x.nbytes for x in jax.tree.leaves(trained))
        of_engine, of_process = engine.stats()["compilations"], len(compiled)
        began = time.perf_counter()
        new = weights.prepare(cfg, trained, dtype=dtype, form=made_form, source="kept")
        jax.block_until_ready(new)
        prepared = time.perf_counter()
        engine.update_weights(new, version=version)
        jax.block_until_ready(new)
        updated = time.perf_counter()
        del new
        first = first_token(engine, cfg, seed=1 + version)
        assert engine.weight_version == version
        of_engine = int(engine.stats()["compilations"] - of_engine)
        of_process = len(compiled) - of_process
        assert of_engine == 0 and (version == 1 or of_process == 0), (of_engine, of_process)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        print(
            f"| {name} | {size / 1e9:.2f} | {version} | {(prepared - began) * 1e3:.1f} | "
            f"{(updated - prepared) * 1e3:.2f} | {first * 1e3:.1f} | {before * 1e3:.1f} | "
            f"{of_engine}, {of_process} | {peak / 1e9:.1f} |",
            flush=True,
        )


def first_token(engine: engine_lib.Engine, cfg: ModelConfig, *, seed: int) -> float:
    """Seconds from the submission of a request to its first token."""
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, 128).tolist()
    sampling = SamplingParams(temperature=0.0, max_tokens=2)
    began, seconds = time.perf_counter(), 0.0
    for event in engine.run([Request(id="one", tokens=tuple(tokens), sampling=sampling)]):
        if event.tokens and not seconds:
            seconds = time.perf_counter() - began
    return seconds


if __name__ == "__main__":
    main()
