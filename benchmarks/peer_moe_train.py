"""The peer: one training step of transformers' Qwen2Moe, timed on this GPU.

    python benchmarks/peer_moe_train.py --layers 4 --batch 4 --length 4096

bf16 weights and Adam states, fused AdamW, SDPA attention, and the fastest of the ways in which its
experts can run: torch's grouped product, compiled and not, then its plain loop. The balance loss is
left out, as transformers does by default. Prints one JSON line.
"""

import argparse
import gc
import json
import statistics
import time

import torch
import transformers

WAYS = (  # experts' implementation, whether torch.compile is used
    ("grouped_mm", "compiled"),
    ("grouped_mm", "eager"),
    ("eager", "eager"),
)


def build(args: argparse.Namespace, experts: str, device: str) -> transformers.PreTrainedModel:
    """Qwen1.5-MoE-A2.7B with fewer layers, random."""
    small = {
        "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 12, "num_experts_per_tok": 3,
        "moe_intermediate_size": 96, "shared_expert_intermediate_size": 256,
    }  # fmt: skip
    config = transformers.Qwen2MoeConfig(
        **(small if args.tiny else {}),
        num_hidden_layers=args.layers,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    with torch.device(device):
        return transformers.Qwen2MoeForCausalLM(config).to(torch.bfloat16).train()


def measure(args: argparse.Namespace, experts: str, how: str, device: str) -> dict:
    """Median milliseconds a step and the peak of memory."""
    torch.manual_seed(0)
    model = build(args, experts, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.length), device=device)
    run = torch.compile(model) if how == "compiled" else model
    seconds = []
    for _ in range(args.steps + 3):
        start = time.perf_counter()
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    return {
        "step_ms": round(statistics.median(seconds[3:]) * 1e3, 2),
        "peak_gb": round(memory, 1),
        "how": f"experts {experts}, {how}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    found, failed = [], []
    for experts, how in WAYS[1:] if args.tiny else WAYS:
        try:
            found.append(measure(args, experts, how, device))
        except Exception as error:  # a way that cannot run must not cost the others
            failed.append(f"{experts}, {how}: {str(error).splitlines()[0][:100]}")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if not found:
        raise SystemExit("; ".join(failed))
    best = min(found, key=lambda way: way["step_ms"])
    name = f"transformers {transformers.__version__} + torch {torch.__version__}"
    ways = ", ".join(f"{way['how']}: {way['step_ms']} ms" for way in found)
    print(json.dumps({"peer": name, **best, "how": f"{best['how']} (of {ways or failed})"}))


if __name__ == "__main__":
    main()
