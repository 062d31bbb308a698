"""Natural logarithms of tokens' probabilities, with the likeliest tokens beside them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from configs import sampling
from partitioning import sharding
from partitioning.sharding import Layout

J = sampling.MOST_LOGPROBS
_HELD = 512  # tokens of prompts whose logits are held at one time
_WIDTH = 128  # tokens of a vocabulary among which a first search for the likeliest is made


@dataclass(frozen=True)
class Logprobs:
    """Leaves [...] float32, one for each token; the likeliest [..., J], best first, under the raw.

    drawn: under the distribution that was sampled: 0 where that was greedy. raw: under the model's
    own. Where the vocabulary has fewer than J tokens, `top` ends in -inf.
    """

    drawn: jax.Array
    raw: jax.Array
    top_ids: jax.Array  # int32
    top: jax.Array


jax.tree_util.register_dataclass(Logprobs, ["drawn", "raw", "top_ids", "top"], [])


def of_tokens(
    logits_BV: jax.Array, scores_BV: jax.Array, tokens_B: jax.Array, *, greedy_B: jax.Array
) -> Logprobs:
    """Of each row's token, under the model's logits and under the scores that were sampled."""
    raw_B, top_ids_BJ, top_BJ = _raw(logits_BV.astype(jnp.float32), tokens_B)
    score_B1 = jnp.take_along_axis(scores_BV, tokens_B[:, None], axis=1)
    drawn_B = _relative(score_B1, scores_BV)[:, 0]
    drawn_B = jnp.where(greedy_B & (drawn_B > -jnp.inf), 0.0, drawn_B)
    return Logprobs(drawn_B, raw_B, top_ids_BJ, top_BJ)


def none(B: int) -> Logprobs:
    """What stands in where no row asked."""
    zeros = lambda *shape, dtype=jnp.float32: jnp.zeros((B, *shape), dtype)  # noqa: E731
    return Logprobs(zeros(), zeros(), zeros(J, dtype=jnp.int32), zeros(J))


def of_prompt(
    hidden_BTD: jax.Array, kernel_DV: jax.Array, next_BT: jax.Array, *, layout: Layout | None
) -> Logprobs:
    """Of the token after each position, from final hidden states: leaves [B, T].

    Some tokens at a time: logits [B, T, V] never exist.
    """
    B, T, _ = hidden_BTD.shape
    piece = min(max(1, _HELD // B), T)
    padding = ((0, 0), (0, -T % piece))
    hidden_BTD = jnp.pad(hidden_BTD, (*padding, (0, 0)))
    next_BT = jnp.pad(next_BT, padding)

    def one(inputs: tuple[jax.Array, jax.Array]) -> Logprobs:
        hidden_BCD, next_BC = inputs
        logits_BCV = jnp.einsum(
            "bcd,dv->bcv",
            hidden_BCD,
            kernel_DV.astype(hidden_BCD.dtype),
            preferred_element_type=jnp.float32,
        )
        logits_BCV = sharding.constrain(logits_BCV, ("batch", None, None), layout)
        raw_BC, ids_BCJ, top_BCJ = _raw(logits_BCV, next_BC)
        return Logprobs(raw_BC, raw_BC, ids_BCJ, top_BCJ)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, -1, piece, *x.shape[2:]), 1, 0)

    pieces = jax.lax.map(one, (split(hidden_BTD), split(next_BT)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T], pieces)


def likeliest(logits: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest of [..., V] and their indices, [..., count] each; of equals the first.

    Sought among parts whose largest are the largest, because the sort behind a GPU's top-k should
    not see a whole vocabulary. Beyond V tokens: -inf.
    """
    spare = -logits.shape[-1] % _WIDTH
    beyond = [(0, 0)] * (logits.ndim - 1) + [(0, spare)]
    parts = jnp.pad(logits, beyond, constant_values=-jnp.inf)
    parts = parts.reshape(*logits.shape[:-1], -1, _WIDTH)
    _, chosen = jax.lax.top_k(jnp.max(parts, axis=-1), min(count, parts.shape[-2]))
    chosen = jnp.sort(chosen, axis=-1)  # so that the first of equals is still the first
    kept = jnp.take_along_axis(parts, chosen[..., None], axis=-2)
    kept = kept.reshape(*logits.shape[:-1], -1)
    top, at = jax.lax.top_k(kept, min(count, kept.shape[-1]))
    part = jnp.take_along_axis(chosen, at // _WIDTH, axis=-1)
    return top, (part * _WIDTH + at % _WIDTH).astype(jnp.int32)


def _raw(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[...] of the tokens, then ids and logprobs [..., J] of the likeliest."""
    top, ids = likeliest(logits, count=J)
    token = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    both = _relative(jnp.concatenate([token, top], axis=-1), logits)
    return both[..., 0], ids, both[..., 1:]


def _relative(some: jax.Array, scores: jax.Array) -> jax.Array:
    """log_softmax of `some` of the scores: only these are ever written. -inf stays -inf."""
    best = jnp.max(scores, axis=-1, keepdims=True)
    best = jnp.where(jnp.isfinite(best), best, 0.0)
    weight = jnp.sum(jnp.exp(scores - best), axis=-1, keepdims=True)
    return jnp.where(some == -jnp.inf, -jnp.inf, some - best - jnp.log(weight))
