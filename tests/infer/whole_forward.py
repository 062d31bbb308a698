"""Answers by one whole forward pass a token: no cache, no pages, nothing beside."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from infer.text.loading import Loaded
from qwen_jax.decode import sampling
from qwen_jax.decode.weights import DecodeWeights
from qwen_jax.model import transformer


def logits(cfg: ModelConfig, params: dict | DecodeWeights, tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] in float32, by stacked parameters or unstacked ones. Few lengths compile."""
    if isinstance(params, DecodeWeights):
        assert params.form == "unstacked", params.form
        layers = jax.tree.map(lambda *x: jnp.stack(x), *params.layers)
        params = {**params.params, "layers": layers}
    padded = np.zeros((1, max(32, 1 << (len(tokens) - 1).bit_length())), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_logits(cfg, params, padded))[0, : len(tokens)]


@functools.partial(jax.jit, static_argnames="cfg")
def _logits(cfg: ModelConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        hidden_BTD = transformer.apply(cfg, params, tokens_BT, attention="reference").hidden_BTD
        return transformer.unembed(cfg, params, hidden_BTD).astype(jnp.float32)


def answer(loaded: Loaded, tokens: Sequence[int], *, settings: SamplingParams) -> list[int]:
    """The tokens drawn after this prompt, up to the one that ends it."""
    drawn: list[int] = []
    ends = {*settings.stop_token_ids, *(() if settings.ignore_eos else loaded.eos_ids)}
    seen_V = np.zeros(loaded.cfg.vocab_size, bool)
    seen_V[list(tokens)] = True
    while len(drawn) < settings.max_tokens and not (drawn and drawn[-1] in ends):
        row_V = logits(loaded.cfg, loaded.params, [*tokens, *drawn])[-1]
        counts_V = np.bincount(drawn, minlength=loaded.cfg.vocab_size)
        token_B = sampling.draw(
            jnp.asarray(row_V)[None],
            sampling.settings([settings], num_rows=1),
            sampler="full",
            positions_B=jnp.asarray([len(tokens) + len(drawn)]),
            generated_B=jnp.asarray([len(drawn)]),
            eos_E=jnp.asarray(loaded.eos_ids),
            seen_BV=jnp.asarray(seen_V)[None],
            counts_BV=jnp.asarray(counts_V, jnp.int32)[None],
        ).tokens_B
        drawn.append(int(token_B[0]))
    return drawn
