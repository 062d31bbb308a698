"""Log-probabilities of tokens (natural logarithm), and of the likeliest tokens beside them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from configs import sampling
from partitioning import sharding
from partitioning.sharding import Layout

J = sampling.MOST_LOGPROBS
_MOST_LOGITS = 512  # prompt tokens whose logits are in memory at one time
_WIDTH = 128  # tokens of a vocabulary that a first search takes as one group


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of tokens: leaves [...] in float32, and [..., J] for the likeliest tokens.

    drawn: under the distribution that was sampled from; 0 where sampling was greedy. raw: under the
    model's own distribution, as top_ids and top are, best first. Where the vocabulary has fewer
    than J tokens, `top` ends in -inf.
    """

    drawn: jax.Array
    raw: jax.Array
    top_ids: jax.Array  # int32
    top: jax.Array


jax.tree_util.register_dataclass(Logprobs, ["drawn", "raw", "top_ids", "top"], [])


def of_tokens(
    logits_BV: jax.Array, scores_BV: jax.Array, tokens_B: jax.Array, *, greedy_B: jax.Array
) -> Logprobs:
    """Log-probabilities of each row's token, under the logits and under the edited scores."""
    raw_B, top_ids_BJ, top_BJ = _raw(logits_BV.astype(jnp.float32), tokens_B)
    score_B1 = jnp.take_along_axis(scores_BV, tokens_B[:, None], axis=1)
    drawn_B = _relative(score_B1, scores_BV)[:, 0]
    drawn_B = jnp.where(greedy_B & (drawn_B > -jnp.inf), 0.0, drawn_B)
    return Logprobs(drawn_B, raw_B, top_ids_BJ, top_BJ)


def none(B: int) -> Logprobs:
    """Zeros in place of log-probabilities that no row asks for."""
    zeros = lambda *shape, dtype=jnp.float32: jnp.zeros((B, *shape), dtype)  # noqa: E731
    return Logprobs(zeros(), zeros(), zeros(J, dtype=jnp.int32), zeros(J))


def of_prompt(
    hidden_BTD: jax.Array, kernel_DV: jax.Array, next_BT: jax.Array, *, layout: Layout | None
) -> Logprobs:
    """Log-probability of each next token, from final hidden states: leaves [B, T].

    A part of the tokens at a time: logits [B, T, V] never exist.
    """
    B, T, _ = hidden_BTD.shape
    size = min(max(1, _MOST_LOGITS // B), T)
    padding = ((0, 0), (0, -T % size))
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
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    pieces = jax.lax.map(one, (split(hidden_BTD), split(next_BT)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T], pieces)


def likeliest(logits: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest logits of [..., V] and their indices, [..., count] each; the first of equal ones.

    They are searched among the groups of tokens with the largest maxima, because the sort behind a
    GPU's top-k should not see a whole vocabulary. Entries beyond V tokens are -inf.
    """
    spare = -logits.shape[-1] % _WIDTH
    beyond = [(0, 0)] * (logits.ndim - 1) + [(0, spare)]
    groups = jnp.pad(logits, beyond, constant_values=-jnp.inf)
    groups = groups.reshape(*logits.shape[:-1], -1, _WIDTH)
    _, chosen = jax.lax.top_k(jnp.max(groups, axis=-1), min(count, groups.shape[-2]))
    chosen = jnp.sort(chosen, axis=-1)  # so that the first of equal logits is still the first
    candidates = jnp.take_along_axis(groups, chosen[..., None], axis=-2)
    candidates = candidates.reshape(*logits.shape[:-1], -1)
    top, at = jax.lax.top_k(candidates, min(count, candidates.shape[-1]))
    group = jnp.take_along_axis(chosen, at // _WIDTH, axis=-1)
    return top, (group * _WIDTH + at % _WIDTH).astype(jnp.int32)


def _raw(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities [...] of tokens; ids and log-probabilities [..., J] of the top J."""
    top, ids = likeliest(logits, count=J)
    token = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    both = _relative(jnp.concatenate([token, top], axis=-1), logits)
    return both[..., 0], ids, both[..., 1:]


def _relative(selected: jax.Array, scores: jax.Array) -> jax.Array:
    """Log-softmax over `scores` of the selected ones alone, which are all that is written.

    A score of -inf stays -inf.
    """
    best = jnp.max(scores, axis=-1, keepdims=True)
    best = jnp.where(jnp.isfinite(best), best, 0.0)
    weight = jnp.sum(jnp.exp(scores - best), axis=-1, keepdims=True)
    return jnp.where(selected == -jnp.inf, -jnp.inf, selected - best - jnp.log(weight))
