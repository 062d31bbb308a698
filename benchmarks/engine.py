"""The engine on one device: tokens a second and time to the first, in the manner of vLLM's figures.

    python benchmarks/engine.py                   # on a GPU: 7B and 0.5B, random bfloat16 weights
    python benchmarks/engine.py --tiny            # rehearsal on a CPU
    python benchmarks/engine.py --only 7b         # models whose name holds this
    python benchmarks/engine.py --mesh fsdp=1,tensor=2   # on two GPUs
    python benchmarks/engine.py --weights bf16,int8,int4 --requests 1   # quantised, one request

Prompts are random tokens, drawn anew for every case and run, so that no prompt finds its beginning
in the prefix cache; answers run to their full length (no eos). Each row is one run of the engine
after its warm-up: all requests are submitted at once, the clock
stops with the last token. The bandwidth of a large copy, read and write counted, and the speed of
a large bfloat16 product are measured in the same process and stand above the table.
"""

import argparse
import dataclasses
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import train_step

from configs.engine import EngineConfig
from configs.models import qwen2_5
from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from infer.engine import engine as engine_lib
from infer.engine.request import Request
from partitioning import mesh as mesh_lib
from partitioning import rules, sharding
from qwen_jax.checkpoint.quantised import quantised_params
from qwen_jax.decode import weights as decode_weights
from qwen_jax.model import transformer


@dataclasses.dataclass(frozen=True)
class Case:
    """A load: the number of simultaneous requests, and their tokens in and out."""

    requests: int
    prompt: int
    answer: int


CASES = (
    Case(1, 1024, 256), Case(64, 1024, 256), Case(256, 1024, 256),
    Case(1, 8192, 1), Case(1, 32512, 1),
)  # fmt: skip
TINY = (Case(1, 24, 8), Case(6, 24, 8), Case(1, 100, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--mesh", default="", help="for example tensor=2")
    parser.add_argument("--weights", default="bf16", help="some of bf16, int8, int4, fp8")
    parser.add_argument("--requests", type=int, default=0, help="only cases of so many at once")
    parser.add_argument("--steps", type=int, default=16, help="tokens a dispatch draws")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; no case begins later")
    arguments = parser.parse_args()
    began = time.monotonic()
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}", flush=True)
    if not arguments.tiny:
        product, copied = train_step.ceilings(tiny=False)
        print(f"copy {copied / 1e9:.0f} GB/s, product {product / 1e12:.0f} TFLOP/s", flush=True)
    print("| model | requests | in, out | s | first token s | output tokens/s | decode ms a step |")
    for name in ("tiny",) if arguments.tiny else ("0.5b", "7b"):
        for weights in arguments.weights.split(",") if arguments.only in name else ():
            run_model(name, weights, arguments, until=began + arguments.budget)


def run_model(name: str, weights: str, arguments: argparse.Namespace, *, until: float) -> None:
    cfg = qwen2_5.tiny() if name == "tiny" else qwen2_5.base(name)
    cases = TINY if arguments.tiny else CASES
    cases = [case for case in cases if arguments.requests in (0, case.requests)]
    settings = EngineConfig(
        num_slots=max(case.requests for case in cases),
        max_length=max(case.prompt + case.answer for case in cases),
        prefill_chunk=64 if arguments.tiny else 8192,
        prefill_tokens=128 if arguments.tiny else 8192,
        page_size=16 if arguments.tiny else 64,
        decode_steps=arguments.steps,
        prefill_rounds=64,
    )
    engine = make(cfg, settings, weights=weights, mesh=arguments.mesh)
    for number, case in enumerate(cases):
        if time.monotonic() > until:
            print("# out of time")
            return
        try:
            drive(engine, cfg, case, seed=2 * number)  # compiles what it needs
            row = drive(engine, cfg, case, seed=2 * number + 1)
            print(f"| {name} {weights} {arguments.mesh} | {row}", flush=True)
        except Exception as error:  # the other cases may still run
            print(f"| {name} | {case} failed: {type(error).__name__}: {error}"[:2000], flush=True)


FORMATS = {
    "int8": quantised_params.Settings(),
    "int4": quantised_params.Settings(weights="int4", group_size=128),
    "fp8": quantised_params.Settings(weights="fp8"),
}


def make(cfg: ModelConfig, settings: EngineConfig, *, weights: str, mesh: str) -> engine_lib.Engine:
    dtype, layout, placed = jnp.dtype(jnp.bfloat16), None, None
    if mesh:
        layout = sharding.Layout(mesh_lib.make(mesh_lib.parse(mesh)), rules.rule_set("engine"))
        placed = sharding.shardings(transformer.axes(cfg), layout)
    init = jax.jit(
        lambda key: jax.tree.map(lambda x: x.astype(dtype), transformer.init(cfg, key)),
        out_shardings=placed,
    )
    params = init(jax.random.key(0))
    if weights != "bf16":
        params = quantised_params.quantise(cfg, params, FORMATS[weights])
    params = decode_weights.prepare(
        cfg, params, dtype=dtype, layout=layout, num_rows=settings.num_slots
    )
    return engine_lib.Engine(cfg, params, settings=settings, eos_ids=(), dtype=dtype, layout=layout)


def drive(engine: engine_lib.Engine, cfg: ModelConfig, case: Case, *, seed: int) -> str:
    random = np.random.default_rng(seed)
    sampling = SamplingParams(temperature=0.0, max_tokens=case.answer)
    began = time.perf_counter()
    for index in range(case.requests):
        tokens = tuple(random.integers(0, cfg.vocab_size, case.prompt).tolist())
        engine.submit(Request(id=f"{seed}-{index}", tokens=tokens, sampling=sampling))
    first, started, count = {}, 0.0, 0
    while not engine.idle:
        for event in engine.step():
            first.setdefault(event.id, time.perf_counter() - began)
            if len(first) == case.requests:
                started = started or time.perf_counter()
            count += len(event.tokens)
    seconds = time.perf_counter() - began
    assert count == case.requests * case.answer, (count, case)
    step = (
        "" if case.answer == 1 else f"{(began + seconds - started) / (case.answer - 1) * 1e3:.2f}"
    )
    return (
        f"{case.requests} | {case.prompt:,}, {case.answer} | {seconds:.3f} | "
        f"{np.median(list(first.values())):.4f} | {count / seconds:,.0f} | {step} |"
    )


if __name__ == "__main__":
    main()
