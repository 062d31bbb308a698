"""Pretrain a tiny Qwen2.5 from random weights, stop half-way, and resume.

    python examples/pretrain_tiny.py

The text is a few modules of your own Python's standard library. The result is a training run's
folder: checkpoints, metrics, tokenizer.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from configs.data import DataConfig
from configs.models import presets
from configs.optimizer import OptimizerConfig
from configs.train import CheckpointConfig, TrainConfig
from qwen_jax.text import tokenizer_training
from train.core import loop
from train.recipes import pretrain

VOCAB_SIZE = 512  # 256 bytes, 22 control tokens, and 234 merges
MODULES = ("argparse", "dataclasses", "enum", "inspect", "textwrap", "typing")


def write_corpus(path: Path) -> list[str]:
    """Functions and classes of some standard modules, one document a line, as JSONL."""
    documents = []
    for name in MODULES:
        source = Path(__import__(name).__file__).read_text(encoding="utf-8")
        documents += [text for text in source.split("\n\n\n") if text.strip()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return documents


def run_config(output: Path, *, corpus: Path, tokenizer: Path, num_steps: int) -> TrainConfig:
    """Settings of the run. Every field of a `TrainConfig` is a flag of `qwen-jax train` too."""
    tiny = dataclasses.replace(
        presets.preset("tiny"), vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, head_dim=16,
    )  # fmt: skip
    return TrainConfig(
        model=tiny,
        output=str(output),
        num_steps=num_steps,
        batch_size=8,
        compute_dtype="float32",
        remat="none",
        loss_chunk=128,
        log_every_steps=5,
        eval_every_steps=20,
        eval_batches=2,
        data=DataConfig(paths=(str(corpus),), tokenizer=str(tokenizer), sequence_length=128),
        optimizer=OptimizerConfig(peak_learning_rate=3e-3, schedule="constant", warmup_steps=5),
        checkpoint=CheckpointConfig(every_steps=20, keep=2),
    )


def main(folder: Path, *, num_steps: int = 40) -> loop.Result:
    """Trains below `folder`, the second half of the steps in a second call, and returns its end."""
    corpus, tokenizer, output = folder / "corpus.jsonl", folder / "tokenizer", folder / "run"
    documents = write_corpus(corpus)
    tokenizer_training.train_bpe(documents, vocab_size=VOCAB_SIZE).save(tokenizer)
    config = run_config(output, corpus=corpus, tokenizer=tokenizer, num_steps=num_steps)

    # A run lives in `output`: called again it goes on from its last checkpoint, whatever ended it
    # (SIGTERM, a crash, a longer `num_steps`). The learning rate is constant here; with a cosine
    # schedule, whose every value depends on the length, a new `num_steps` is refused.
    first = pretrain.run(dataclasses.replace(config, num_steps=num_steps // 2))
    print(f"{first.status} at step {first.step}, loss {first.train['cross_entropy']:.3f}")
    second = pretrain.run(config)
    print(f"{second.status} at step {second.step}, loss {second.train['cross_entropy']:.3f}")
    print(f"held-out loss {second.evaluation['cross_entropy']:.3f}; the run is in {output}")
    return second


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/examples/pretrain"))
    parser.add_argument("--num-steps", type=int, default=40)
    given = parser.parse_args()
    main(given.folder, num_steps=given.num_steps)
