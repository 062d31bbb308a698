"""The peer: one training step of transformers' Qwen2 with torch.compile, timed on this GPU.

    python benchmarks/peer_train.py --model 1.5b --batch 4 --length 4096

bf16 weights and Adam states, fused AdamW, SDPA attention: what a user of transformers gets from one
`torch.compile`. Prints one JSON line: tokens a second and TFLOP/s (attention counted causally).
"""

import argparse
import json
import statistics
import time

import torch
import transformers

SHAPES = {  # hidden, layers, heads, kv heads, ffn, tied, vocabulary
    "tiny": (64, 2, 4, 2, 128, True, 512),
    "0.5b": (896, 24, 14, 2, 4864, True, 151936),
    "1.5b": (1536, 28, 12, 2, 8960, True, 151936),
    "7b": (3584, 28, 28, 4, 18944, False, 152064),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="1.5b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()

    hidden, layers, heads, kv_heads, ffn, tied, rows = SHAPES[args.model]
    config = transformers.Qwen2Config(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        use_cache=False,
        attn_implementation="sdpa",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    tokens = torch.randint(0, rows, (args.batch, args.length), device=device)
    compiled = torch.compile(model)

    def step() -> float:
        loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    seconds = []
    for _ in range(args.steps + 3):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[3:])
    count = sum(p.numel() for p in model.parameters())
    flops = 6 * count + 6 * args.length * hidden * layers  # a token
    rate = args.batch * args.length / median
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
    print(
        json.dumps(
            {
                "peer": f"transformers {transformers.__version__} + torch {torch.__version__}",
                "model": args.model,
                "batch": args.batch,
                "length": args.length,
                "step_ms": round(median * 1e3, 2),
                "tokens_per_second": round(rate),
                "tflops": round(rate * flops / 1e12, 1),
                "peak_gb": round(memory, 1),
                "loss": loss,
            }
        )
    )


if __name__ == "__main__":
    main()
