"""Cross-entropy of a text under a model, in nats per token."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs.models.architecture import ModelConfig
from qwen_jax.model import transformer
from qwen_jax.text.tokenizer.tokenizer import Tokenizer

WINDOW = 512  # tokens that are predicted in one row, each from those before it in the row


@dataclass(frozen=True)
class Loss:
    """Mean cross-entropy per token in nats, and the number of tokens predicted."""

    nats: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)


def windows(cfg: ModelConfig, tokenizer: Tokenizer, path: Path | str, *, most: int) -> np.ndarray:
    """The first tokens of a text as rows [n, T + 1], at most `most` rows; the rest is dropped.

    Raises `ValueError` for a text of fewer than two tokens.
    """
    text = Path(path).read_text(encoding="utf-8")
    tokens = tokenizer.encode(text, special="text")
    length = min(WINDOW, transformer.max_length(cfg), len(tokens) - 1)
    if length < 1:
        raise ValueError(f"{path} has {len(tokens)} tokens; the loss needs at least 2")
    count = min(most, len(tokens) // (length + 1))
    return np.asarray(tokens[: count * (length + 1)], np.int32).reshape(count, length + 1)


def loss(cfg: ModelConfig, params: dict, rows: np.ndarray, *, dtype: jnp.dtype) -> Loss:
    """Cross-entropy of `rows` [n, T + 1], computed row by row to hold the logits of one only."""
    total = sum(float(_row_loss(cfg, params, row[None], dtype=dtype)) for row in rows)
    count = rows.shape[0] * (rows.shape[1] - 1)
    return Loss(nats=total / count, num_tokens=count)


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def _row_loss(
    cfg: ModelConfig, params: dict, tokens_BT: jax.Array, *, dtype: jnp.dtype
) -> jax.Array:
    hidden_BTD = transformer.apply(cfg, params, tokens_BT[:, :-1], dtype=dtype).hidden_BTD
    log_p_BTV = jax.nn.log_softmax(transformer.unembed(cfg, params, hidden_BTD), axis=-1)
    chosen_BT1 = jnp.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], axis=-1)
    return -jnp.sum(chosen_BT1)
