"""Sampling: logits to tokens, with per-request settings as arrays.

Top-k, top-p and min-p each keep the tokens whose score is at least some cutoff; so one cutoff a row
is found, and the token is drawn from what lies above it by the Gumbel trick. A row's noise depends
on its seed and the token's position alone: neighbours, slots and padding do not change a result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from configs import schema


@dataclass(frozen=True)
class Settings:
    """The requests' `schema.Sampling`s, one row each."""

    temperature_B: jax.Array  # float32; 0 is greedy
    top_k_B: jax.Array  # int32; 0 keeps all
    top_p_B: jax.Array  # float32
    min_p_B: jax.Array  # float32
    penalty_B: jax.Array  # float32
    seed_B: jax.Array  # uint32


_FIELDS = ["temperature_B", "top_k_B", "top_p_B", "min_p_B", "penalty_B", "seed_B"]
jax.tree_util.register_dataclass(Settings, _FIELDS, [])


@dataclass(frozen=True)
class Plan:
    """What a batch needs at all: static, so that the rest is never computed.

    candidates: how many of the likeliest tokens must be sorted to find every row's cutoff; 0 none,
    -1 the whole vocabulary.
    """

    greedy: bool = True
    penalty: bool = False
    candidates: int = 0


_CANDIDATES = (32, 128, 1024)  # sizes of a partial sort; more needs the whole


def settings(requests: Sequence[schema.Sampling], *, num_rows: int) -> Settings:
    """Arrays of `num_rows` rows; rows beyond the requests are greedy."""
    rows = [*requests, *[schema.Sampling(temperature=0.0)] * (num_rows - len(requests))]

    def column(name: str, dtype: type) -> np.ndarray:
        return np.asarray([getattr(row, name) for row in rows], dtype)

    return Settings(
        temperature_B=column("temperature", np.float32),
        top_k_B=np.minimum(column("top_k", np.int64), 2**31 - 1).astype(np.int32),
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        penalty_B=column("repetition_penalty", np.float32),
        seed_B=column("seed", np.uint32),
    )


def plan(requests: Sequence[schema.Sampling]) -> Plan:
    """The least work that serves all the requests."""
    drawn = [r for r in requests if r.temperature > 0]
    sizes = [r.top_k for r in drawn if r.top_k]
    unbounded = any(r.top_p < 1 and not r.top_k for r in drawn)
    candidates = 0
    if unbounded or sizes:
        fitting = [size for size in _CANDIDATES if size >= max(sizes, default=0)]
        candidates = fitting[0] if fitting and not unbounded else -1
    return Plan(
        greedy=not drawn,
        penalty=any(r.repetition_penalty != 1 for r in requests),
        candidates=candidates,
    )


def sample(
    logits_BV: jax.Array,
    settings: Settings,
    *,
    plan: Plan,
    positions_B: jax.Array,
    seen_BV: jax.Array | None = None,
) -> jax.Array:
    """The next token of each row, [B] int32.

    positions_B is the index that the new token will have in its sequence; seen_BV marks the tokens
    of prompt and answer so far, and is needed only where the plan has a penalty.
    """
    scores_BV = processed(logits_BV, settings, plan=plan, seen_BV=seen_BV)
    if plan.greedy:
        return argmax(scores_BV)
    V = scores_BV.shape[-1]

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (V,), jnp.float32)

    noise_BV = jax.vmap(noise)(settings.seed_B, positions_B)
    greedy_B1 = (settings.temperature_B == 0)[:, None]
    return argmax(scores_BV + jnp.where(greedy_B1, 0.0, noise_BV))


def processed(
    logits_BV: jax.Array, settings: Settings, *, plan: Plan, seen_BV: jax.Array | None = None
) -> jax.Array:
    """Scores in float32 after penalty, temperature, top-k, top-p, min-p; -inf where masked."""
    # float32 island: probabilities are summed.
    scores_BV = logits_BV.astype(jnp.float32)
    if plan.penalty:
        penalty_B1 = settings.penalty_B[:, None]
        penalised_BV = jnp.where(scores_BV < 0, scores_BV * penalty_B1, scores_BV / penalty_B1)
        scores_BV = jnp.where(seen_BV, penalised_BV, scores_BV)
    if plan.greedy:
        return scores_BV
    greedy_B = settings.temperature_B == 0
    scores_BV = scores_BV / jnp.where(greedy_B, 1.0, settings.temperature_B)[:, None]
    cutoff_B = jnp.where(greedy_B, -jnp.inf, _cutoff(scores_BV, settings, plan.candidates))
    return jnp.where(scores_BV >= cutoff_B[:, None], scores_BV, -jnp.inf)


def argmax(scores_BV: jax.Array) -> jax.Array:
    """The first of the largest in each row, [B] int32.

    In two stages, because a GPU gives one row of a vocabulary's length to a single block.
    """
    B, V = scores_BV.shape
    width = int(np.gcd(V, 1024))
    rows_BRW = scores_BV.reshape(B, V // width, width)
    row_B = jnp.argmax(jnp.max(rows_BRW, axis=-1), axis=-1)
    best_BW = jnp.take_along_axis(rows_BRW, row_B[:, None, None], axis=1)[:, 0]
    return (row_B * width + jnp.argmax(best_BW, axis=-1)).astype(jnp.int32)


def mark_seen(tokens_BT: jax.Array, lengths_B: jax.Array, *, vocab_size: int) -> jax.Array:
    """[B, V] booleans: which tokens occur among the first `lengths_B` of each row."""
    B, T = tokens_BT.shape
    real_BT = jnp.arange(T)[None, :] < lengths_B[:, None]
    seen_BV = jnp.zeros((B, vocab_size), bool)
    return seen_BV.at[jnp.arange(B)[:, None], tokens_BT].max(real_BT)


def _cutoff(scores_BV: jax.Array, settings: Settings, candidates: int) -> jax.Array:
    """The smallest score that top-k, top-p and min-p all keep, [B]. Ties with it are kept."""
    V = scores_BV.shape[-1]
    if candidates == 0:
        # log(0) = -inf keeps all.
        return jnp.max(scores_BV, axis=-1) + jnp.log(settings.min_p_B)
    count = V if candidates == -1 else min(candidates, V)
    best_BC = jax.lax.top_k(scores_BV, count)[0]
    limit_B = jnp.where(settings.top_k_B == 0, count, jnp.minimum(settings.top_k_B, count))
    kth_B = jnp.take_along_axis(best_BC, limit_B[:, None] - 1, axis=1)[:, 0]
    kept_BC = best_BC >= kth_B[:, None]
    weights_BC = jax.nn.softmax(jnp.where(kept_BC, best_BC, -jnp.inf), axis=-1)
    # Summed from the least likely upward, as transformers does; the likeliest always stays.
    tail_BC = jnp.cumsum(weights_BC[:, ::-1], axis=-1)[:, ::-1]
    nucleus_BC = kept_BC & (tail_BC > 1.0 - settings.top_p_B[:, None])
    nucleus_BC = nucleus_BC.at[:, 0].set(True)
    nucleus_B = jnp.min(jnp.where(nucleus_BC, best_BC, jnp.inf), axis=-1)
    top_k_B = jnp.where(settings.top_k_B == 0, -jnp.inf, kth_B)
    top_p_B = jnp.where(settings.top_p_B < 1.0, nucleus_B, -jnp.inf)
    min_p_B = best_BC[:, 0] + jnp.log(settings.min_p_B)
    return jnp.maximum(jnp.maximum(top_k_B, top_p_B), min_p_B)
