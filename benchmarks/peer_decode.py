"""transformers' decoding at batch 1, beside `benchmarks/engine.py`: a static cache, compiled.

    python benchmarks/peer_decode.py 7b      # where torch has a GPU; minutes

Random bfloat16 weights; the time of a step is the difference between a long answer and a short one.
"""

import argparse
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import transformers

from configs.models import qwen2_5


def peer(size: str, batch: int, prompt: int, new_tokens: int) -> float:
    """Milliseconds a step of transformers' generate with a static, compiled cache."""
    cfg = qwen2_5.base(size)
    config = transformers.Qwen2Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        tie_word_embeddings=cfg.tie_word_embeddings,
        eos_token_id=None,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        network = transformers.Qwen2ForCausalLM(config).eval()
        ids = torch.randint(0, cfg.vocab_size, (batch, prompt))
    options = {"do_sample": False, "cache_implementation": "static", "eos_token_id": None}

    def seconds(count: int) -> float:
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            network.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[2:])

    # The same total length, so that the static cache and its compiled step are the same.
    return 1e3 * (seconds(new_tokens) - seconds(2)) / (new_tokens - 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", help="a published size, such as 0.5b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--answer", type=int, default=256)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    ms = peer(arguments.size, arguments.batch, arguments.prompt, arguments.answer)
    rate = arguments.batch * 1e3 / ms
    print(
        f"{arguments.size} x {arguments.batch}, transformers {transformers.__version__}: "
        f"{ms:.3f} ms a step, {rate:.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
