"""Training on two GPUs of one host against one of them: FSDP and tensor parallelism.

    python benchmarks/parallel_train.py            # 2 GPUs, about four minutes
    python benchmarks/parallel_train.py --tiny     # rehearsal on two fake CPU devices

The step is the training loop's own (`train/core/step.py`); a row names the sequences that a GPU has
in a step. FLOPs are the model's (`qwen_jax/analysis/flops.py`), attention counted causally; the
ratio is a GPU's TFLOP/s over the best of one GPU by itself, in this run. A model that one GPU
cannot hold with its float32 state has fewer layers here, on one and on two. XLA's flags are those
of `configs/hardware/xla_flags.py`, unless a row says otherwise.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import re
import sys
import time
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import train_step

from configs.data import DataConfig
from configs.hardware import chips, xla_flags
from configs.models import qwen2_5
from configs.optimizer import OptimizerConfig
from configs.train import TrainConfig
from partitioning import mesh
from qwen_jax.analysis import flops

SCHEDULER = {"xla_gpu_enable_latency_hiding_scheduler": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table. options: XLA's, None for those of the chip's table."""

    model: str
    layers: int
    mesh: str
    rows: int  # sequences a device
    remat: str
    options: dict | None = None
    changes: dict = dataclasses.field(default_factory=dict)  # of the optimizer
    note: str = ""


def cases() -> list[Case]:
    """The cases, most important first, should time run out."""
    whole = {"model": "3b", "layers": 36, "rows": 2}
    part = {"model": "7b", "layers": 8, "rows": 2, "remat": "dots"}
    one, fsdp, tensor = meshes = "fsdp=1", "fsdp=2", "tensor=2"
    return [
        *(Case(mesh=m, **part) for m in meshes),
        *(Case(mesh=one, **whole, remat=r) for r in ("dots", "minimal")),
        Case(mesh=fsdp, **whole, remat="dots"),
        Case(mesh=fsdp, **{**whole, "rows": 4}, remat="minimal"),
        Case(mesh=tensor, **whole, remat="dots"),
        Case(mesh=fsdp, **whole, remat="minimal"),
        Case(mesh=fsdp, **part, options=SCHEDULER, note="scheduler alone"),
        Case(mesh=fsdp, **part, options={}, note="no flags"),
        Case(mesh=fsdp, **{**part, "rows": 4}),
        # All of 7B: 14 bytes a parameter in two halves.
        Case(
            **{**part, "layers": 28, "rows": 1, "remat": "full"},
            mesh=fsdp,
            changes={"moment_dtype": "bfloat16"},
            note="bfloat16 first moment",
        ),
    ]


def tiny_cases() -> list[Case]:
    meshes = ("fsdp=1", "fsdp=2", "tensor=2")
    return [Case(model="tiny", layers=2, mesh=m, rows=1, remat="dots", options={}) for m in meshes]


def prepare(*, tiny: bool) -> None:
    """Settings that have to be there before the first look at a device."""
    if tiny:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 2)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # NCCL needs the rest


def collectives(text: str) -> str:
    """Number of collectives of each kind in a compiled program, loops counted once."""
    kinds = "all-gather|reduce-scatter|all-reduce|all-to-all"
    found = collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items())) or "none"


def measure(case: Case, *, length: int, steps: int, profile: pathlib.Path | None) -> dict:
    """Figures of one case; with `profile`, a trace of two more steps is left there."""
    cfg = qwen2_5.tiny() if case.model == "tiny" else qwen2_5.base(case.model)
    cfg = dataclasses.replace(cfg, num_hidden_layers=case.layers)
    shape = mesh.parse(case.mesh)
    devices = jax.devices()[: shape.fsdp * shape.tensor]
    config = TrainConfig(
        batch_size=case.rows * len(devices),
        data=DataConfig(sequence_length=length),
        loss_chunk=min(1024, length),
        layer_loop="unrolled",
        remat=case.remat,
        mesh=shape,
        optimizer=OptimizerConfig(**case.changes),
    )
    options = case.options
    if options is None:
        options = xla_flags.options(chips.chip_of(devices[0].device_kind))
    begin = time.perf_counter()
    program, batch, compiled = train_step.build(
        cfg, config, packed=False, devices=devices, options=options
    )
    compile_seconds = time.perf_counter() - begin
    found = {
        "cfg": cfg,
        "devices": len(devices),
        "tokens": config.batch_size * length,
        "collectives": collectives(compiled.as_text()),
        **train_step.memory_gb(compiled),
    }
    # Before the first step: what does not fit fails there.
    memory = f"{found['state_gb']:.1f}+{found['temp_gb']:.1f} GB of state and temporaries"
    print(f"# compiled in {compile_seconds:.0f} s, {memory}, {found['collectives']}", flush=True)
    seconds, losses = train_step.time_steps(program, batch, compiled, steps=steps)
    if profile is not None:
        state, rate = program.init(jax.random.key(0)), program.learning_rate(0)
        state, _ = compiled(state, batch, rate)
        jax.block_until_ready(state)
        with jax.profiler.trace(str(profile)):
            state, _ = compiled(state, batch, rate)
            jax.block_until_ready(compiled(state, batch, rate))
    return found | {"seconds": seconds, "losses": (losses[0], losses[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--budget", type=float, default=240, help="seconds for everything")
    parser.add_argument("--only", default="", help="cases whose name matches this expression")
    parser.add_argument("--profile", type=pathlib.Path, help="folder for traces of FSDP")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    prepare(tiny=args.tiny)
    begin = time.perf_counter()
    if args.tiny:
        args.length, args.steps = 64, 2
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'':45}  ms/step  tokens/s  TFLOP/s a GPU  of one GPU  loss", flush=True)
    alone: dict[str, float] = {}  # a model's best on one GPU, FLOP/s
    took = 0.0
    for case in tiny_cases() if args.tiny else cases():
        rows = f"{case.rows} row{'s' * (case.rows > 1)} a GPU"
        name = f"{case.model}, {case.layers} layers, {case.mesh}, {rows}, {case.remat}"
        if not re.search(args.only, f"{name} {case.note}"):
            continue
        start = time.perf_counter()
        if start - begin + took > args.budget:
            print(f"{name:45} {case.note} not run: time", flush=True)
            continue
        traced = args.profile if case.mesh == "fsdp=2" and not case.note else None
        try:
            found = measure(case, length=args.length, steps=args.steps, profile=traced)
        except Exception as error:  # a case that cannot run must not cost the others
            print(f"{name:45} {case.note} failed: {str(error).strip()[:200]}", flush=True)
            continue
        took = time.perf_counter() - start
        rate = found["tokens"] / found["seconds"]
        each = flops.train_per_token(found["cfg"], length=args.length, attention="causal")
        each *= rate / found["devices"]
        if found["devices"] == 1:
            alone[case.model] = max(each, alone.get(case.model, 0.0))
        ratio = f"{each / alone[case.model]:.1%}" if case.model in alone else "-"
        print(
            f"{name:45} {1e3 * found['seconds']:8.1f} {rate:9.0f} {each / 1e12:14.1f} {ratio:>11} "
            f" {found['losses'][0]:.3f} -> {found['losses'][1]:.3f}  {case.note}",
            flush=True,
        )
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
