"""Rematerialisation policies side by side: memory, and time where there is a device.

    python benchmarks/remat.py                                   # 1.5B at 4 x 4,096 on a GPU
    python benchmarks/remat.py --topology v5e:4x4 --batch 16     # compiled for a TPU, none needed
    python benchmarks/remat.py --tiny                            # rehearsal on a CPU

A topology needs `jax[tpu]` and the environment TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu. `--hlo
FOLDER` keeps every compiled program's text, from which executed FLOPs and cycles can be read.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import train_step
from jax.experimental import topologies

from configs.data import DataConfig
from configs.models import qwen2_5, remat
from configs.models.architecture import ModelConfig
from configs.train import TrainConfig
from partitioning import mesh, rules, sharding
from train.core import step as step_lib


def compile_for(topology: str, cfg: ModelConfig, config: TrainConfig) -> tuple[dict, str]:
    """Memory and seconds of the step compiled for a TPU topology, and the program's text."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    layout = sharding.Layout(mesh.make(config.mesh, devices=devices), rules.rule_set("train"))
    program = step_lib.make(cfg, config, layout)
    begin = time.perf_counter()
    compiled = program.step.lower(*program.inputs).compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    result = {
        "compile": seconds,
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "temp_gb": memory.temp_size_in_bytes / 1e9,
        "host_gb": memory.host_temp_size_in_bytes / 1e9,
    }
    return result, compiled.as_text()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1.5b")
    parser.add_argument("--batch", type=int, default=4, help="sequences over all devices")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layer-loop", default="scan")
    parser.add_argument("--layers", type=int, default=0, help="instead of the model's own number")
    parser.add_argument("--policies", nargs="*", default=list(remat.POLICIES))
    parser.add_argument("--topology", default="", help="a TPU's, such as v5e:4x4; empty: run here")
    parser.add_argument("--hlo", type=pathlib.Path, help="folder for the programs of a topology")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.tiny:
        args.model, args.batch, args.length, args.steps = "tiny", 2, 64, 2
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # read at the first device call
    cfg = qwen2_5.tiny() if args.tiny else qwen2_5.base(args.model)
    if args.layers:
        cfg = dataclasses.replace(cfg, num_hidden_layers=args.layers)
    base = TrainConfig(
        batch_size=args.batch,
        data=DataConfig(sequence_length=args.length),
        loss_chunk=min(1024, args.length),
        layer_loop=args.layer_loop,
    )
    where = args.topology or jax.devices()[0].device_kind
    print(
        f"{where}, jax {jax.__version__}; {args.model}, {args.batch} x {args.length}, "
        f"{cfg.num_hidden_layers} layers, {args.layer_loop}"
    )
    print(f"{'policy':44} GB state  temporaries  on the host  compile s  ms/step  losses")
    for policy in args.policies:
        config = dataclasses.replace(base, remat=policy)
        try:
            if args.topology:
                result, text = compile_for(args.topology, cfg, config)
                if args.hlo:
                    args.hlo.mkdir(parents=True, exist_ok=True)
                    name = re.sub(r"[^a-z_]+", "_", policy)
                    (args.hlo / f"{args.layer_loop}_{name}.txt").write_text(text)
            else:
                result = train_step.measure(cfg, config, packed=False, steps=args.steps)
        except Exception as error:  # a policy that does not fit must not cost the others
            print(f"{policy:44} failed: {str(error).splitlines()[0][:160]}", flush=True)
            continue
        timing = "" if args.topology else f"{1e3 * result['seconds']:9.1f}"
        losses = "" if args.topology else "  {:.4f} -> {:.4f}".format(*result["losses"])
        print(
            f"{policy:44} {result['state_gb']:8.2f} {result['temp_gb']:12.2f} "
            f"{result['host_gb']:12.2f} {result['compile']:10.0f}{timing}{losses}",
            flush=True,
        )


if __name__ == "__main__":
    main()
