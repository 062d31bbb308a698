"""Natural logarithms of tokens' probabilities, with the likeliest tokens beside them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from configs import schema
from partitioning import sharding
from partitioning.sharding import Layout

J = schema.MOST_LOGPROBS
_PIECE = 128  # tokens of a prompt whose logits are held at one time


@dataclass(frozen=True)
class Logprobs:
    """Leaves [...] float32, one for each token; the likeliest [..., J], best first, under the raw.

    drawn: under the distribution that was sampled. raw: under the model's own.
    """

    drawn: jax.Array
    raw: jax.Array
    top_ids: jax.Array  # int32
    top: jax.Array


jax.tree_util.register_dataclass(Logprobs, ["drawn", "raw", "top_ids", "top"], [])


def of_tokens(logits_BV: jax.Array, scores_BV: jax.Array, tokens_B: jax.Array) -> Logprobs:
    """Of each row's token, under the model's logits and under the scores that were sampled."""
    raw_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
    drawn_BV = jax.nn.log_softmax(scores_BV, axis=-1)
    top_BJ, ids_BJ = _likeliest(raw_BV)
    pick = lambda x_BV: jnp.take_along_axis(x_BV, tokens_B[:, None], axis=1)[:, 0]  # noqa: E731
    return Logprobs(pick(drawn_BV), pick(raw_BV), ids_BJ, top_BJ)


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
    B, T, D = hidden_BTD.shape
    piece = min(_PIECE, T)
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
        raw_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
        top_BCJ, ids_BCJ = _likeliest(raw_BCV)
        raw_BC = jnp.take_along_axis(raw_BCV, next_BC[..., None], axis=-1)[..., 0]
        return Logprobs(raw_BC, raw_BC, ids_BCJ, top_BCJ)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, -1, piece, *x.shape[2:]), 1, 0)

    pieces = jax.lax.map(one, (split(hidden_BTD), split(next_BT)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T], pieces)


def _likeliest(raw: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = min(J, raw.shape[-1])
    top, ids = jax.lax.top_k(raw, count)
    beyond = [(0, 0)] * (raw.ndim - 1) + [(0, J - count)]
    return jnp.pad(top, beyond, constant_values=-jnp.inf), jnp.pad(ids.astype(jnp.int32), beyond)
