"""A model of a few thousand parameters, batches made from numbers, and programs compiled once."""

import dataclasses
import functools
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from configs.data import DataConfig
from configs.models.architecture import ModelConfig
from configs.optimizer import OptimizerConfig
from configs.train import CheckpointConfig, TrainConfig
from partitioning import mesh, rules
from partitioning.sharding import Layout
from train.core import loop, step

LENGTH, VOCAB = 16, 64


def tiny_model() -> ModelConfig:
    return ModelConfig(
        name="test",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_ids=(0,),
        pad_token_id=0,
    )


def tiny_config(**changes) -> TrainConfig:
    values = {
        "num_steps": 8,
        "batch_size": 4,
        "compute_dtype": "float32",
        "remat": "none",
        "attention": "reference",
        "loss_chunk": 8,
        "log_every_steps": 2,
        "eval_every_steps": 4,
        "data": DataConfig(sequence_length=LENGTH),
        "optimizer": OptimizerConfig(
            peak_learning_rate=3e-3, schedule="constant", warmup_steps=2, weight_decay=0.1
        ),
        "checkpoint": CheckpointConfig(every_steps=3, keep=2),
    }
    return TrainConfig(**{**values, **changes})


def random_batch(seed: int, rows: int) -> dict[str, np.ndarray]:
    """Two packed documents a row, of a language in which a token tells the next; some padding."""
    random = np.random.default_rng(seed)
    start = random.integers(1, VOCAB, size=(rows, 2, 1))
    tokens = ((start + 5 * np.arange(LENGTH // 2 + 1)) % (VOCAB - 1) + 1).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH // 2), (rows, 2, LENGTH // 2))
    segments = np.broadcast_to(np.array([[1], [2]]), (rows, 2, LENGTH // 2))
    weights = np.ones((rows, 2, LENGTH // 2), np.float32)
    weights[:, 1, random.integers(3, LENGTH // 2) :] = 0
    flat = {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "positions": positions.astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "loss_weights": weights,
    }
    return {name: value.reshape(rows, LENGTH) for name, value in flat.items()}


class Numbers:
    """A source whose n-th batch is made from n; `breaks` maps n to what is done to that batch."""

    def __init__(self, rows: int, *, breaks=None, before=None, end=None):
        self.rows, self.count, self.closed = rows, 0, False
        self.breaks, self.before, self.end = breaks or {}, before, end

    def __next__(self):
        if self.count == self.end:
            raise StopIteration
        self.count += 1
        if self.before:
            self.before(self.count)
        batch = random_batch(self.count, self.rows)
        return self.breaks.get(self.count, lambda batch: batch)(batch)

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]

    def close(self):
        self.closed = True


@functools.lru_cache
def _program(config: TrainConfig, cfg: ModelConfig) -> step.Program:
    layout = Layout(mesh.make(config.mesh), rules.rule_set("train"))
    return step.make(cfg, config, layout)


def program(config: TrainConfig, cfg: ModelConfig | None = None) -> step.Program:
    """The program of `config`; those that differ only in what the loop reads are one."""
    plain = {
        f.name: f.default
        for f in dataclasses.fields(TrainConfig)
        if f.name in ("init_from", "output", "log_every_steps", "eval_every_steps", "profile_steps")
        or f.name.startswith("spike")
    }
    if config.optimizer.schedule == "constant":
        plain["num_steps"] = 1
    plain |= {"model": "", "checkpoint": CheckpointConfig()}
    plain["data"] = DataConfig(sequence_length=config.data.sequence_length)
    return _program(dataclasses.replace(config, **plain), cfg or tiny_model())


def run(config: TrainConfig, *, cfg: ModelConfig | None = None, **source) -> loop.Result:
    built = program(config, cfg)
    inputs = loop.Inputs(
        source=Numbers(config.batch_size, **source),
        start=lambda: built.init(jax.random.key(config.seed)),
        held_out=lambda: [random_batch(10_000 + i, config.batch_size) for i in range(2)],
    )
    return loop.run(cfg or tiny_model(), config, built, inputs)


def write_text(folder: Path, *, documents: int) -> None:
    """Documents of counting words, of different lengths."""
    folder.mkdir()
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for n in range(documents):
        counted = [words[(n + i) % 10] for i in range(4 + 7 * n % 23)]
        (folder / f"{n:04}.txt").write_text(" ".join(counted) + "\n")


def write_tokenizer(folder: Path, *, first_byte_last: bool = False) -> None:
    """A byte a token, and <|endoftext|>, number 256."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if first_byte_last:
        alphabet = [*alphabet[1:], alphabet[0]]
    vocabulary = {letter: n for n, letter in enumerate(alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def helpers():
    """The functions above, for test modules: they cannot import a conftest by name."""
    names = (
        tiny_model, tiny_config, random_batch, Numbers, program, run, write_text, write_tokenizer
    )  # fmt: skip
    return types.SimpleNamespace(**{f.__name__: f for f in names})
