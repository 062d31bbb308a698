"""Sampling: logits to tokens, with per-request settings as arrays.

`draw` does all that a `schema.Sampling` can ask, in one program for any batch: what no row needs is
skipped at run time. `sample` is made for one batch, and computes only what that needs at all.

Top-k, top-p and min-p each keep the tokens whose score is at least some cutoff; so one cutoff a row
is found, and the token is drawn from what lies above it by the Gumbel trick. A row's noise depends
on its seed and the token's position alone: neighbours, slots and padding do not change a result.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from configs import schema
from qwen_jax import logprobs


@dataclass(frozen=True)
class Settings:
    """The requests' `schema.Sampling`s, one row each."""

    temperature_B: jax.Array  # float32; 0 is greedy
    top_k_B: jax.Array  # int32; 0 keeps all
    top_p_B: jax.Array  # float32
    min_p_B: jax.Array  # float32
    penalty_B: jax.Array  # float32: repetition
    presence_B: jax.Array  # float32
    frequency_B: jax.Array  # float32
    min_tokens_B: jax.Array  # int32
    stop_BJ: jax.Array  # int32: tokens that end the answer beside eos; -1 is none
    ignore_eos_B: jax.Array  # bool
    bias_ids_BJ: jax.Array  # int32; -1 is none
    bias_BJ: jax.Array  # float32
    logprobs_B: jax.Array  # bool: whether they are wanted
    seed_B: jax.Array  # uint32


jax.tree_util.register_dataclass(Settings, [f.name for f in dataclasses.fields(Settings)], [])


@dataclass(frozen=True)
class Drawn:
    """A token a row, and its logprobs where `draw` was asked for them in full."""

    tokens_B: jax.Array  # int32
    logprobs: logprobs.Logprobs | None


jax.tree_util.register_dataclass(Drawn, ["tokens_B", "logprobs"], [])

How = Literal["greedy", "full"]  # of `draw`: the likeliest token and no more, or everything


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
_SORTED = (0, 128, -1)  # those that `draw` chooses from


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
        presence_B=column("presence_penalty", np.float32),
        frequency_B=column("frequency_penalty", np.float32),
        min_tokens_B=column("min_tokens", np.int32),
        stop_BJ=_lists([row.stop_token_ids for row in rows], schema.MOST_STOPS, -1, np.int32),
        ignore_eos_B=column("ignore_eos", bool),
        bias_ids_BJ=_lists([_first(row.logit_bias) for row in rows], J, -1, np.int32),
        bias_BJ=_lists([_second(row.logit_bias) for row in rows], J, 0, np.float32),
        logprobs_B=np.asarray([row.logprobs is not None for row in rows], bool),
        seed_B=column("seed", np.uint32),
    )


J = schema.MOST_BIASES


def _lists(values: Sequence[Sequence], width: int, fill: int, dtype: type) -> np.ndarray:
    table = np.full((len(values), width), fill, dtype)
    for row, some in enumerate(values):
        table[row, : len(some)] = some
    return table


def _first(pairs: Sequence[tuple[int, float]]) -> list[int]:
    return [token for token, _ in pairs]


def _second(pairs: Sequence[tuple[int, float]]) -> list[float]:
    return [value for _, value in pairs]


def how(request: schema.Sampling) -> How:
    """The least that `draw` must do for it."""
    plain = schema.Sampling(
        temperature=0.0,
        max_tokens=max(1, request.max_tokens),
        stop_token_ids=request.stop_token_ids,
    )
    asked = dataclasses.replace(
        request,
        max_tokens=plain.max_tokens,
        seed=0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        ignore_eos=False,
        prompt_logprobs=None,
    )
    return "greedy" if asked == plain else "full"


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

    greedy_B = settings.temperature_B == 0
    return argmax(scores_BV + _noise(settings, positions_B, V=V, greedy_B=greedy_B))


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


def draw(
    logits_BV: jax.Array,
    settings: Settings,
    *,
    how: How,
    positions_B: jax.Array,
    generated_B: jax.Array,
    eos_E: jax.Array,
    seen_BV: jax.Array | None,
    counts_BV: jax.Array | None,
    mask_BW: jax.Array,
) -> Drawn:
    """The next token of each row, by everything that its settings say.

    positions_B as in `sample`. generated_B tokens of the answer were drawn before, each counts_BV
    times; seen_BV marks the prompt's. mask_BW holds the bits of the tokens that a grammar allows.
    "greedy" looks at the logits alone.
    """
    if how == "greedy":
        return Drawn(argmax(logits_BV.astype(jnp.float32)), None)
    # float32 island: probabilities are summed.
    scores_BV = logits_BV.astype(jnp.float32)
    V = scores_BV.shape[1]

    def when(needed: jax.Array, change, scores_BV: jax.Array) -> jax.Array:
        return jax.lax.cond(jnp.any(needed), change, lambda x: x, scores_BV)

    scores_BV = when(settings.bias_ids_BJ >= 0, lambda x: _biased(x, settings), scores_BV)
    early_B = generated_B < settings.min_tokens_B
    scores_BV = when(early_B, lambda x: _unended(x, settings, eos_E, early_B), scores_BV)
    allowed = lambda x: jnp.where(unpack(mask_BW, vocab_size=V), x, -jnp.inf)  # noqa: E731
    scores_BV = when(mask_BW != jnp.uint32(2**32 - 1), allowed, scores_BV)
    penalised = lambda x: _penalised(x, settings, seen_BV, counts_BV)  # noqa: E731
    penalties = (settings.penalty_B != 1, settings.presence_B != 0, settings.frequency_B != 0)
    scores_BV = when(jnp.stack(penalties), penalised, scores_BV)
    greedy_B = settings.temperature_B == 0
    scores_BV = scores_BV / jnp.where(greedy_B, 1.0, settings.temperature_B)[:, None]
    cutoff_B = jax.lax.switch(
        _sort_needed(settings),
        [lambda x, n=n: _cutoff(x, settings, n) for n in _SORTED],
        scores_BV,
    )
    cutoff_B = jnp.where(greedy_B, -jnp.inf, cutoff_B)
    scores_BV = jnp.where(scores_BV >= cutoff_B[:, None], scores_BV, -jnp.inf)
    drawn = lambda x: argmax(x + _noise(settings, positions_B, V=V, greedy_B=greedy_B))  # noqa: E731
    tokens_B = jax.lax.cond(jnp.all(greedy_B), argmax, drawn, scores_BV)
    given = jax.lax.cond(
        jnp.any(settings.logprobs_B),
        lambda: logprobs.of_tokens(logits_BV, scores_BV, tokens_B),
        lambda: logprobs.none(tokens_B.shape[0]),
    )
    return Drawn(tokens_B, given)


def ends(tokens_B: jax.Array, settings: Settings, *, eos_E: jax.Array) -> jax.Array:
    """Whether the token ends its row's answer, [B]."""
    eos_B = jnp.any(tokens_B[:, None] == eos_E[None, :], axis=1) & ~settings.ignore_eos_B
    return eos_B | jnp.any(tokens_B[:, None] == settings.stop_BJ, axis=1)


def unpack(words_BW: jax.Array, *, vocab_size: int) -> jax.Array:
    """The bits of uint32 words, [B, V] bool: token i is bit i % 32 of word i // 32."""
    bits_BW32 = (words_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    return bits_BW32.reshape(words_BW.shape[0], -1)[:, :vocab_size].astype(bool)


def _biased(scores_BV: jax.Array, settings: Settings) -> jax.Array:
    ids_BJ = jnp.where(settings.bias_ids_BJ < 0, scores_BV.shape[1], settings.bias_ids_BJ)
    rows_B1 = jnp.arange(scores_BV.shape[0])[:, None]
    return scores_BV.at[rows_B1, ids_BJ].add(settings.bias_BJ, mode="drop")


def _unended(
    scores_BV: jax.Array, settings: Settings, eos_E: jax.Array, early_B: jax.Array
) -> jax.Array:
    """Without what would end the answer, in the rows that are too early for it."""
    B, V = scores_BV.shape
    eos_BE = jnp.where(settings.ignore_eos_B[:, None], -1, eos_E[None])
    ids_BJ = jnp.concatenate([eos_BE, settings.stop_BJ], axis=1)
    ids_BJ = jnp.where((ids_BJ < 0) | ~early_B[:, None], V, ids_BJ)
    return scores_BV.at[jnp.arange(B)[:, None], ids_BJ].set(-jnp.inf, mode="drop")


def _penalised(
    scores_BV: jax.Array, settings: Settings, seen_BV: jax.Array, counts_BV: jax.Array
) -> jax.Array:
    """Repetition over prompt and answer, by division; presence and frequency over the answer."""
    answered_BV = counts_BV > 0
    penalty_B1 = settings.penalty_B[:, None]
    divided_BV = jnp.where(scores_BV < 0, scores_BV * penalty_B1, scores_BV / penalty_B1)
    scores_BV = jnp.where(seen_BV | answered_BV, divided_BV, scores_BV)
    taken_BV = settings.frequency_B[:, None] * counts_BV
    taken_BV += jnp.where(answered_BV, settings.presence_B[:, None], 0.0)
    return scores_BV - taken_BV


def _sort_needed(settings: Settings) -> jax.Array:
    """Index into `_SORTED`: how many candidates must be sorted for every row."""
    drawn_B = settings.temperature_B > 0
    has_k_B = settings.top_k_B > 0
    some_B = drawn_B & (has_k_B | (settings.top_p_B < 1))
    all_B = some_B & ~(has_k_B & (settings.top_k_B <= _SORTED[1]))
    return jnp.any(some_B).astype(jnp.int32) + jnp.any(all_B)


def _noise(settings: Settings, positions_B: jax.Array, *, V: int, greedy_B: jax.Array) -> jax.Array:
    """Gumbel noise [B, V] of each row's seed and position; 0 where the row is greedy."""

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (V,), jnp.float32)

    noise_BV = jax.vmap(noise)(settings.seed_B, positions_B)
    return jnp.where(greedy_B[:, None], 0.0, noise_BV)


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
