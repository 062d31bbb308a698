"""Training speed of a model with experts on one device: beside a dense model and the peer.

    python benchmarks/moe_train.py                  # Qwen1.5-MoE-A2.7B at 4 x 4,096 on a GPU
    python benchmarks/moe_train.py --tiny           # rehearsal on a CPU
    python benchmarks/moe_train.py --layers 5

The model has fewer layers than the published one, so that parameters, moments and gradients fit one
device; the dense model is Qwen2.5-1.5B, whole. FLOPs of the experts are those of the chosen ones.
The last table times the pieces of one layer's routed experts by themselves. The peer, transformers'
Qwen2Moe of as many layers, runs in its own process (`peer_moe_train.py`).
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from benchmarks import train_step
from configs.data import DataConfig
from configs.models import qwen2_5, qwen2_moe
from configs.models.architecture import ExpertTrainingConfig, ModelConfig
from configs.train import TrainConfig
from partitioning import expert_parallel
from qwen_jax.analysis import flops
from qwen_jax.model import moe

VARIANTS = {  # name: changes to the configuration, and to the experts
    "unrolled, dots": ({"layer_loop": "unrolled", "remat": "dots"}, {}),
    "unrolled, dots, packed": ({"layer_loop": "unrolled", "remat": "dots"}, {}),
    "unrolled, full": ({"layer_loop": "unrolled", "remat": "full"}, {}),
    "scan, dots": ({"layer_loop": "scan", "remat": "dots"}, {}),
    "unrolled, dots, capacity 1.25": (
        {"layer_loop": "unrolled", "remat": "dots"},
        {"capacity_factor": 1.25},
    ),
}


def run_peer(layers: int, batch: int, length: int, *, tiny: bool) -> dict:
    """`peer_moe_train.py` in its own process; its JSON, or the reason why there is none."""
    script = pathlib.Path(__file__).with_name("peer_moe_train.py")
    command = [sys.executable, str(script), "--layers", str(layers)]
    command += ["--batch", str(batch), "--length", str(length), *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}
    return json.loads(lines[-1])


def show_pieces(cfg: ModelConfig, tokens: int) -> None:
    """Milliseconds of the routed experts of one layer, piece by piece, in bfloat16."""
    D, E, J = cfg.hidden_size, cfg.moe.num_experts, cfg.moe.num_experts_per_tok
    keys = jax.random.split(jax.random.key(0), 5)
    x_MD = jax.random.normal(keys[0], (tokens, D), jnp.bfloat16)
    logits_1ME = jax.random.normal(keys[1], (1, tokens, E))
    weights_1MJ, experts_1MJ, _ = jax.jit(lambda l: moe.route(l, cfg.moe))(logits_1ME)
    weights_1MJ = weights_1MJ.astype(jnp.bfloat16)
    F = cfg.moe.moe_intermediate_size
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    kernels = {
        name: 0.02 * jax.random.normal(key, shape, jnp.bfloat16)
        for (name, shape), key in zip(shapes.items(), keys[2:], strict=True)
    }
    sort = jax.jit(lambda e: vars(expert_parallel.sort(e[0], num_experts=E, num_rows=tokens * J)))
    routes = sort(experts_1MJ)
    spread = jax.jit(lambda x: expert_parallel.spread(x, routes["source_R"], routes["slots_MJ"]))
    rows_RD = spread(x_MD)
    weights_R = weights_1MJ.reshape(-1)
    compute = functools.partial(moe.compute(None).grouped, sizes_E=routes["sizes_E"])
    grouped = jax.jit(compute)
    collect = jax.jit(lambda r: expert_parallel.collect(r, routes["slots_MJ"], routes["source_R"]))
    both = jax.jit(
        jax.grad(lambda k, r, w: jnp.sum(compute(k, r, w).astype(jnp.float32)), argnums=(0, 1, 2))
    )

    def whole(x, w, k):
        y, _ = expert_parallel.run(
            moe.compute(None), x[None], w, experts_1MJ, k,
            num_experts=E, capacity_factor=None, layout=None,
        )  # fmt: skip
        return jnp.sum(y.astype(jnp.float32))

    layer = jax.jit(jax.grad(whole, argnums=(0, 1, 2)))
    route = jax.jit(lambda l: moe.route(l, cfg.moe)[:2])
    products = 6.0 * tokens * J * D * F
    rows = {
        "route": (lambda: route(logits_1ME), 0.0),
        "sort": (lambda: sort(experts_1MJ), 0.0),
        "spread": (lambda: spread(x_MD), 0.0),
        "experts, forward": (lambda: grouped(kernels, rows_RD, weights_R), products),
        "experts, and backward": (lambda: both(kernels, rows_RD, weights_R), 3 * products),
        "collect": (lambda: collect(rows_RD), 0.0),
        "all, and backward": (lambda: layer(x_MD, weights_1MJ, kernels), 3 * products),
    }
    print(f"\none layer's routed experts, {tokens:,} tokens: ms, TFLOP/s")
    for name, (run, count) in rows.items():
        seconds = train_step.median_seconds(run)
        rate = f"{count / seconds / 1e12:8.1f}" if count else ""
        print(f"{name:34} {1e3 * seconds:8.2f} {rate}", flush=True)


def measure(name: str, cfg: ModelConfig, config: TrainConfig, report, steps: int) -> float:
    """Prints a row; the seconds of a step, or infinity where it cannot run."""
    try:
        result = train_step.measure(cfg, config, packed="packed" in name, steps=steps)
    except Exception as error:  # a variant that cannot run must not cost the others
        print(f"{name:34} failed: {str(error).splitlines()[0][:160]}", flush=True)
        return float("inf")
    note = "compiled in {:.0f} s, loss {:.3f} -> {:.3f}".format(
        result["compile"], *result["losses"]
    )
    memory = f"{result['state_gb']:.1f}+{result['temp_gb']:.1f}"
    report(name, result["seconds"], cfg=cfg, memory=memory, note=note)
    return result["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        args.layers, args.batch, args.length, args.steps = 2, 2, 64, 2
    dense = qwen2_5.tiny() if args.tiny else qwen2_5.base("1.5b")
    sparse = dataclasses.replace(
        qwen2_moe.tiny() if args.tiny else qwen2_moe.a2_7b(), num_hidden_layers=args.layers
    )
    # The peer goes first: this process takes most of the device's memory once it starts.
    peer = {} if args.no_peer else run_peer(args.layers, args.batch, args.length, tiny=args.tiny)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # read at the first device call
    kind = jax.devices()[0].device_kind
    print(f"{kind}, jax {jax.__version__}; {sparse.name} with {args.layers} layers "
          f"({flops.parameters(sparse) / 1e9:.2f} B, "
          f"{flops.parameters(sparse, count='activated') / 1e9:.2f} B activated), "
          f"{args.batch} x {args.length}")  # fmt: skip
    product, _ = train_step.ceilings(tiny=args.tiny)
    print(f"ceiling: bf16 product {product / 1e12:.0f} TFLOP/s")
    print(train_step.HEADINGS)
    tokens = args.batch * args.length
    report = functools.partial(
        train_step.print_row, length=args.length, tokens=tokens, ceiling=product
    )
    base = TrainConfig(
        batch_size=args.batch,
        data=DataConfig(sequence_length=args.length),
        loss_chunk=min(1024, args.length),
    )
    rate = lambda cfg, seconds: (  # noqa: E731
        tokens / seconds * flops.train_per_token(cfg, length=args.length, attention="causal")
    )
    reached = 0.0
    if not args.no_dense:
        config = dataclasses.replace(base, layer_loop="unrolled", remat="dots")
        seconds = measure(f"dense {dense.name}", dense, config, report, args.steps)
        reached = rate(dense, seconds)
    best = 0.0
    for name, (changes, experts) in VARIANTS.items():
        if args.only in name:
            cfg = ExpertTrainingConfig(**experts).apply(sparse)
            config = dataclasses.replace(base, **changes)
            best = max(best, rate(cfg, measure(name, cfg, config, report, args.steps)))
    if "failed" in peer:
        print(f"peer failed: {peer['failed']}")
    elif peer:
        report(
            peer["peer"], peer["step_ms"] / 1e3, cfg=sparse, memory=f"{peer['peak_gb']} peak",
            note=f"bf16 weights and moments, {peer['how']}",
        )  # fmt: skip
    if reached:
        print(f"best with experts / dense: {best / reached:.1%} of its TFLOP/s")
    show_pieces(sparse, tokens)


if __name__ == "__main__":
    main()
