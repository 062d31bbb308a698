"""Sampling: logits to tokens, with per-request settings as arrays.

`draw` honours every field of `SamplingParams`, in one program for any batch. A step that no row
needs is skipped at run time; a batch that needs none pays for one test of its settings.

A token is drawn from the scores above a cutoff (`qwen_jax/ops/top_k_top_p`) by the Gumbel-max
trick. A row's noise depends on its seed and the token's position alone, so other rows, slots and
padding never change a result.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from configs import sampling
from configs.sampling import SamplingParams
from qwen_jax.decode import logprobs
from qwen_jax.ops.top_k_top_p import api as top_k_top_p


@dataclass(frozen=True)
class Settings:
    """Sampling parameters of B requests, one row each."""

    temperature_B: jax.Array  # float32; 0 is greedy
    top_k_B: jax.Array  # int32; 0 keeps all
    top_p_B: jax.Array  # float32
    min_p_B: jax.Array  # float32
    repetition_B: jax.Array  # float32
    presence_B: jax.Array  # float32
    frequency_B: jax.Array  # float32
    min_tokens_B: jax.Array  # int32
    stop_BJ: jax.Array  # int32: tokens that end the answer beside eos; -1 is none
    ignore_eos_B: jax.Array  # bool
    bias_ids_BJ: jax.Array  # int32; -1 is none
    bias_BJ: jax.Array  # float32
    logprobs_B: jax.Array  # bool: whether the request asks for log-probabilities
    seed_B: jax.Array  # uint32


jax.tree_util.register_dataclass(Settings, [f.name for f in dataclasses.fields(Settings)], [])


@dataclass(frozen=True)
class Drawn:
    """The token drawn for each row, with its log-probabilities from the sampler "full"."""

    tokens_B: jax.Array  # int32
    logprobs: logprobs.Logprobs | None


jax.tree_util.register_dataclass(Drawn, ["tokens_B", "logprobs"], [])

Sampler = Literal["greedy", "full"]  # the likeliest token alone, or all of `SamplingParams`

_ALL_ALLOWED = np.uint32(2**32 - 1)  # 32 bits of a token mask


def settings(requests: Sequence[SamplingParams], *, num_rows: int) -> Settings:
    """The requests' settings as arrays of `num_rows` rows; padding rows are plainly greedy."""
    rows = [*requests, *[SamplingParams(temperature=0.0)] * (num_rows - len(requests))]

    def column(name: str, dtype: type) -> np.ndarray:
        return np.asarray([getattr(row, name) for row in rows], dtype)

    def table(lists: Sequence[Sequence], width: int, fill: int, dtype: type) -> np.ndarray:
        padded = np.full((len(rows), width), fill, dtype)
        for row, values in enumerate(lists):
            padded[row, : len(values)] = values
        return padded

    biases = [([token for token, _ in r.logit_bias], [b for _, b in r.logit_bias]) for r in rows]
    return Settings(
        temperature_B=column("temperature", np.float32),
        top_k_B=np.minimum(column("top_k", np.int64), 2**31 - 1).astype(np.int32),
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        repetition_B=column("repetition_penalty", np.float32),
        presence_B=column("presence_penalty", np.float32),
        frequency_B=column("frequency_penalty", np.float32),
        min_tokens_B=column("min_tokens", np.int32),
        stop_BJ=table([r.stop_token_ids for r in rows], sampling.MOST_STOPS, -1, np.int32),
        ignore_eos_B=column("ignore_eos", bool),
        bias_ids_BJ=table([ids for ids, _ in biases], sampling.MOST_BIASES, -1, np.int32),
        bias_BJ=table([values for _, values in biases], sampling.MOST_BIASES, 0, np.float32),
        logprobs_B=np.asarray([r.logprobs is not None for r in rows], bool),
        seed_B=column("seed", np.uint32),
    )


def sampler(request: SamplingParams) -> Sampler:
    """The least general sampler that serves the request."""
    plain = (
        request.temperature == 0
        and request.min_tokens == 0
        and not request.logit_bias
        and request.repetition_penalty == 1
        and request.presence_penalty == 0
        and request.frequency_penalty == 0
        and request.logprobs is None
    )
    return "greedy" if plain else "full"


def draw(
    logits_BV: jax.Array,
    settings: Settings,
    *,
    sampler: Sampler,
    positions_B: jax.Array,
    generated_B: jax.Array,
    eos_E: jax.Array,
    seen_BV: jax.Array | None = None,
    counts_BV: jax.Array | None = None,
    mask_BW: jax.Array | None = None,
) -> Drawn:
    """The next token of each row, drawn by its settings.

    positions_B is the index that the new token will have in its sequence. generated_B is the number
    of answer tokens before it, and counts_BV the number of each of them; seen_BV marks the prompt's
    tokens. mask_BW holds one bit for each token that a grammar allows; None allows all. The sampler
    "greedy" reads the logits alone, "full" needs seen_BV and counts_BV. A row in which no token is
    allowed gets token 0, with log-probability -inf.
    """
    if sampler == "greedy":
        return Drawn(argmax(logits_BV.astype(jnp.float32)), None)
    assert seen_BV is not None and counts_BV is not None
    any_random = jnp.any(settings.temperature_B > 0)
    any_logprobs = jnp.any(settings.logprobs_B)
    edits_some, edits_all = _edits(settings, generated_B, mask_BW)

    def everything(logits_BV: jax.Array) -> Drawn:
        # float32 island: probabilities are summed.
        scores_BV = edited(
            logits_BV.astype(jnp.float32),
            settings,
            generated_B=generated_B,
            eos_E=eos_E,
            seen_BV=seen_BV,
            counts_BV=counts_BV,
            mask_BW=mask_BW,
        )
        tokens_B, scores_BV = jax.lax.cond(
            any_random,
            lambda x_BV: _pick(narrowed(x_BV, settings), settings, positions_B),
            lambda x_BV: (argmax(x_BV), x_BV),
            scores_BV,
        )
        greedy_B = settings.temperature_B == 0
        token_logprobs = jax.lax.cond(
            any_logprobs,
            lambda: logprobs.of_tokens(logits_BV, scores_BV, tokens_B, greedy_B=greedy_B),
            lambda: logprobs.none(tokens_B.shape[0]),
        )
        return Drawn(tokens_B, token_logprobs)

    def likeliest(logits_BV: jax.Array) -> Drawn:
        tokens_B = argmax(logits_BV.astype(jnp.float32))
        return Drawn(tokens_B, logprobs.none(tokens_B.shape[0]))

    # One condition around all others: a GPU's host waits for the value of each, so that most
    # batches should evaluate this one alone.
    needs_more = edits_some | edits_all | any_random | any_logprobs
    return jax.lax.cond(needs_more, everything, likeliest, logits_BV)


def ends(tokens_B: jax.Array, settings: Settings, *, eos_E: jax.Array) -> jax.Array:
    """Whether the token ends its row's answer, [B]."""
    eos_B = jnp.any(tokens_B[:, None] == eos_E[None, :], axis=1) & ~settings.ignore_eos_B
    return eos_B | jnp.any(tokens_B[:, None] == settings.stop_BJ, axis=1)


def edited(
    scores_BV: jax.Array,
    settings: Settings,
    *,
    generated_B: jax.Array,
    eos_E: jax.Array,
    seen_BV: jax.Array,
    counts_BV: jax.Array,
    mask_BW: jax.Array | None = None,
) -> jax.Array:
    """Scores after logit bias, min_tokens, the grammar's mask and the penalties, in this order.

    A bias therefore cannot allow what min_tokens or a grammar forbids, as in vLLM.
    """
    edits_some, edits_all = _edits(settings, generated_B, mask_BW)

    def some_tokens(scores_BV: jax.Array) -> jax.Array:
        scores_BV = _biased(scores_BV, settings)
        return _unended(scores_BV, settings, eos_E, generated_B < settings.min_tokens_B)

    def all_tokens(scores_BV: jax.Array) -> jax.Array:
        if mask_BW is not None:
            allowed_BV = unpack(mask_BW, vocab_size=scores_BV.shape[1])
            scores_BV = jnp.where(allowed_BV, scores_BV, -jnp.inf)
        return _penalised(scores_BV, settings, seen_BV, counts_BV)

    scores_BV = jax.lax.cond(edits_some, some_tokens, lambda x_BV: x_BV, scores_BV)
    return jax.lax.cond(edits_all, all_tokens, lambda x_BV: x_BV, scores_BV)


def narrowed(scores_BV: jax.Array, settings: Settings) -> jax.Array:
    """Scores after temperature, top-k, top-p and min-p, in this order; -inf below the cutoff.

    Greedy rows are unchanged. The order is that of transformers: each filter sees the scores that
    the one before it kept, and probabilities are those at the request's temperature.
    """
    greedy_B = settings.temperature_B == 0
    scores_BV = scores_BV / jnp.where(greedy_B, 1.0, settings.temperature_B)[:, None]
    cutoff_B = top_k_top_p.threshold(
        scores_BV,
        top_k_B=jnp.where(greedy_B, 0, settings.top_k_B),
        top_p_B=jnp.where(greedy_B, 1.0, settings.top_p_B),
        min_p_B=jnp.where(greedy_B, 0.0, settings.min_p_B),
    )
    return jnp.where(scores_BV >= cutoff_B[:, None], scores_BV, -jnp.inf)


def noise(seed_B: jax.Array, positions_B: jax.Array, *, vocab_size: int) -> jax.Array:
    """Gumbel noise [B, V] of each row's seed and position."""

    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(key(seed, position), (vocab_size,), jnp.float32)

    return jax.vmap(one)(seed_B, positions_B)


def key(seed: jax.Array, position: jax.Array) -> jax.Array:
    """The random key of the token at `position` of a request with this seed."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)


def argmax(scores_BV: jax.Array) -> jax.Array:
    """The index of each row's largest score, the first of equal ones, [B] int32.

    Two stages, because a GPU gives one row of a vocabulary's length to a single block.
    """
    B, V = scores_BV.shape
    width = int(np.gcd(V, 1024))
    rows_BRW = scores_BV.reshape(B, V // width, width)
    row_B = jnp.argmax(jnp.max(rows_BRW, axis=-1), axis=-1)
    best_BW = jnp.take_along_axis(rows_BRW, row_B[:, None, None], axis=1)[:, 0]
    return (row_B * width + jnp.argmax(best_BW, axis=-1)).astype(jnp.int32)


def unpack(words_BW: jax.Array, *, vocab_size: int) -> jax.Array:
    """Booleans [B, V] from the bits of uint32 words: token i is bit i % 32 of word i // 32."""
    bits_BW32 = (words_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & 1
    return bits_BW32.reshape(words_BW.shape[0], -1)[:, :vocab_size].astype(bool)


def _edits(
    settings: Settings, generated_B: jax.Array, mask_BW: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Whether any row edits single tokens' scores (bias, min_tokens), and whether any edits all."""
    some = jnp.any(settings.bias_ids_BJ >= 0) | jnp.any(generated_B < settings.min_tokens_B)
    penalties_B = (
        (settings.repetition_B != 1) | (settings.presence_B != 0) | (settings.frequency_B != 0)
    )
    every = jnp.any(penalties_B)
    return some, every if mask_BW is None else every | jnp.any(mask_BW != _ALL_ALLOWED)


def _pick(
    scores_BV: jax.Array, settings: Settings, positions_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A token drawn from each row's distribution, the likeliest where greedy; and the scores."""
    noise_BV = noise(settings.seed_B, positions_B, vocab_size=scores_BV.shape[1])
    greedy_B1 = (settings.temperature_B == 0)[:, None]
    return argmax(scores_BV + jnp.where(greedy_B1, 0.0, noise_BV)), scores_BV


def _biased(scores_BV: jax.Array, settings: Settings) -> jax.Array:
    """Scores with each row's logit biases added."""
    ids_BJ = jnp.where(settings.bias_ids_BJ < 0, scores_BV.shape[1], settings.bias_ids_BJ)
    rows_B1 = jnp.arange(scores_BV.shape[0])[:, None]
    return scores_BV.at[rows_B1, ids_BJ].add(settings.bias_BJ, mode="drop")


def _unended(
    scores_BV: jax.Array, settings: Settings, eos_E: jax.Array, early_B: jax.Array
) -> jax.Array:
    """Scores with -inf for the tokens that would end a row's answer before its min_tokens."""
    B, V = scores_BV.shape
    eos_BE = jnp.where(settings.ignore_eos_B[:, None], -1, eos_E[None])
    ids_BJ = jnp.concatenate([eos_BE, settings.stop_BJ], axis=1)
    ids_BJ = jnp.where((ids_BJ < 0) | ~early_B[:, None], V, ids_BJ)
    return scores_BV.at[jnp.arange(B)[:, None], ids_BJ].set(-jnp.inf, mode="drop")


def _penalised(
    scores_BV: jax.Array, settings: Settings, seen_BV: jax.Array, counts_BV: jax.Array
) -> jax.Array:
    """Scores after the penalties.

    Repetition divides, for tokens of prompt and answer; presence and frequency are subtracted, for
    tokens of the answer.
    """
    answered_BV = counts_BV > 0
    penalty_B1 = settings.repetition_B[:, None]
    divided_BV = jnp.where(scores_BV < 0, scores_BV * penalty_B1, scores_BV / penalty_B1)
    scores_BV = jnp.where(seen_BV | answered_BV, divided_BV, scores_BV)
    penalty_BV = settings.frequency_B[:, None] * counts_BV
    penalty_BV += jnp.where(answered_BV, settings.presence_B[:, None], 0.0)
    return scores_BV - penalty_BV
