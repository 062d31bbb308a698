"""Training speed on one device: ceilings, our step, and the peer, in one run and one table.

    python benchmarks/train_step.py                          # 1.5B at 4 x 4,096 on a GPU
    python benchmarks/train_step.py --tiny                   # rehearsal on a CPU
    python benchmarks/train_step.py --model 0.5b --batch 8

The step is the training loop's own (`train/core/step.py`): float32 masters and Adam moments,
bfloat16 arithmetic, clipping, donated state. FLOPs: 6 a parameter and token, and attention counted
causally (half) or in full, as the two columns say. The peer runs in its own process
(`peer_train.py`).
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from configs.data import DataConfig
from configs.models import qwen2_5
from configs.models.architecture import ModelConfig
from configs.train import TrainConfig
from partitioning import mesh, rules, sharding
from qwen_jax.analysis import flops
from train.core import step as step_lib

VARIANTS = {  # name: changes to the configuration
    "unrolled, dots": {"layer_loop": "unrolled", "remat": "dots"},
    "unrolled, dots, packed": {"layer_loop": "unrolled", "remat": "dots"},
    "scan, dots": {"layer_loop": "scan", "remat": "dots"},
    "scan, full": {"layer_loop": "scan", "remat": "full"},
}


def ceilings(*, tiny: bool) -> tuple[float, float]:
    """FLOP/s of a bf16 matrix product, and bytes/s of the fastest of several passes over memory.

    The passes are copies (read and write counted) of elements of 2 and of 4 bytes, and a sum (read
    alone), each 20 times in a row: XLA's copies alone stay below what decoding reads.
    """
    n, count = (256, 2**20) if tiny else (8192, 2**31)
    a_key, b_key = jax.random.split(jax.random.key(0))
    a = jax.random.normal(a_key, (n, n), jnp.bfloat16)
    b = jax.random.normal(b_key, (n, n), jnp.bfloat16) / n**0.5
    x = jax.random.normal(a_key, (count,), jnp.bfloat16)
    words = jax.lax.bitcast_convert_type(x.reshape(-1, 2), jnp.uint32)
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, 20, lambda _, a: a @ b, a))
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: x + x.dtype.type(1), x))
    # The sum of one pass enters the next, so that no pass is left out.
    read = jax.jit(
        lambda x: jax.lax.fori_loop(0, 20, lambda _, s: jnp.sum(x ^ s, dtype=x.dtype), x[0])
    )
    passes = {
        "copy of 2 bytes": 2 * x.nbytes / median_seconds(lambda: copy(x)),
        "copy of 4 bytes": 2 * words.nbytes / median_seconds(lambda: copy(words)),
        "read": words.nbytes / median_seconds(lambda: read(words)),
    }
    print("bytes: " + ", ".join(f"{name} {20 * s / 1e12:.2f} TB/s" for name, s in passes.items()))
    return (
        20 * 2 * n**3 / median_seconds(lambda: product(a, b)),
        20 * max(passes.values()),
    )


def median_seconds(run, *, repeats: int = 5) -> float:
    """Median seconds of `repeats` calls after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def random_batch(cfg: ModelConfig, batch: int, length: int, *, packed: bool) -> dict:
    """Random tokens; `packed` rows hold four documents each, the others one."""
    shape = (batch, length)
    document = length // 4 if packed else length
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, cfg.vocab_size)
    return {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "segment_ids": place // document + 1 if packed else None,
        "positions": place % document,
        "loss_weights": jnp.ones(shape, jnp.float32),
    }


def build(
    cfg: ModelConfig,
    config: TrainConfig,
    *,
    packed: bool,
    devices: Sequence[jax.Device] | None = None,
    options: dict | None = None,
) -> tuple[step_lib.Program, dict, jax.stages.Compiled]:
    """The run's program, a batch in its place, and the step compiled with XLA's `options`."""
    layout = sharding.Layout(mesh.make(config.mesh, devices=devices), rules.rule_set("train"))
    program = step_lib.make(cfg, config, layout)
    batch = random_batch(cfg, config.batch_size, config.data.sequence_length, packed=packed)
    batch = jax.device_put(batch, program.batch_sharding)
    state, _, rate = program.inputs  # without packing, the batch has no segment ids
    compiled = program.step.lower(state, batch, rate).compile(compiler_options=options)
    return program, batch, compiled


def measure(cfg: ModelConfig, config: TrainConfig, *, packed: bool, steps: int) -> dict:
    """Seconds to compile, GB of temporaries, and median seconds a step."""
    begin = time.perf_counter()
    program, batch, compiled = build(cfg, config, packed=packed)
    compile_seconds = time.perf_counter() - begin
    seconds, losses = time_steps(program, batch, compiled, steps=steps)
    return {
        "compile": compile_seconds,
        **memory_gb(compiled),
        "seconds": seconds,
        "losses": (losses[0], losses[-1]),
    }


def memory_gb(compiled: jax.stages.Compiled) -> dict:
    """GB on one device: the state, temporaries, and temporaries in the host's memory."""
    memory = compiled.memory_analysis()
    return {
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "temp_gb": memory.temp_size_in_bytes / 1e9,
        "host_gb": memory.host_temp_size_in_bytes / 1e9,
    }


def time_steps(
    program: step_lib.Program, batch: dict, compiled: jax.stages.Compiled, *, steps: int
) -> tuple[float, list[float]]:
    """Median seconds of `steps` steps after three, from a fresh state, and all losses."""
    state = program.init(jax.random.key(0))
    times, losses = [], []
    for _ in range(3 + steps):
        begin = time.perf_counter()
        state, metrics = compiled(state, batch, program.learning_rate(0))
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[3:]), losses


def run_peer(model: str, batch: int, length: int) -> dict:
    """`peer_train.py` in its own process; its JSON, or the reason why there is none."""
    script = pathlib.Path(__file__).with_name("peer_train.py")
    command = [sys.executable, str(script), "--model", model]
    command += ["--batch", str(batch), "--length", str(length)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1.5b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.batch, args.length, args.steps = "tiny", 2, 64, 2
    cfg = qwen2_5.tiny() if args.tiny else qwen2_5.base(args.model)
    # The peer goes first: this process takes most of the device's memory once it starts.
    peer = {} if args.no_peer else run_peer(args.model, args.batch, args.length)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # read at the first device call
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, jax {jax.__version__}; {args.model}, {args.batch} x {args.length}"
    )
    product, copy = ceilings(tiny=args.tiny)
    print(f"ceilings: bf16 product {product / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s")
    print(HEADINGS)
    base = TrainConfig(
        batch_size=args.batch,
        data=DataConfig(sequence_length=args.length),
        loss_chunk=min(1024, args.length),
    )
    tokens = args.batch * args.length
    report = functools.partial(
        print_row, cfg=cfg, length=args.length, tokens=tokens, ceiling=product
    )
    for name, changes in VARIANTS.items():
        if args.only not in name:
            continue
        config = dataclasses.replace(base, **changes)
        try:
            result = measure(cfg, config, packed="packed" in name, steps=args.steps)
        except Exception as error:  # a variant that cannot run must not cost the others
            print(f"{name:34} failed: {str(error).splitlines()[0][:160]}", flush=True)
            continue
        memory = f"{result['state_gb']:.1f}+{result['temp_gb']:.1f}"
        note = "compiled in {:.0f} s, loss {:.3f} -> {:.3f}".format(
            result["compile"], *result["losses"]
        )
        report(name, result["seconds"], memory=memory, note=note)
    if "failed" in peer:
        print(f"peer failed: {peer['failed']}")
    elif peer:
        memory = f"{peer['peak_gb']} peak"
        report(peer["peer"], peer["step_ms"] / 1e3, memory=memory, note="bf16 weights and moments")


HEADINGS = f"{'':34}  ms/step  tokens/s  causal    full TFLOP/s  of product  GB state+temporaries"


def print_row(
    name: str,
    seconds: float,
    *,
    cfg: ModelConfig,
    length: int,
    tokens: int,
    ceiling: float,
    memory: str,
    note: str,
) -> None:
    """One measured variant under both conventions of attention FLOPs."""
    rate = tokens / seconds
    half, full = (
        rate * flops.train_per_token(cfg, length=length, attention=kind)
        for kind in ("causal", "full")
    )
    print(
        f"{name:34} {1e3 * seconds:8.1f} {rate:9.0f} {half / 1e12:7.1f} {full / 1e12:7.1f} "
        f"{half / ceiling:18.0%}  {memory:>12}  {note}",
        flush=True,
    )


if __name__ == "__main__":
    main()
