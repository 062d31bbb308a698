"""Speculative decoding's rules: how many drafted tokens stand, and which token comes after them.

Two rules, both exact. `verify` draws each position's token as `sampling.draw` always does, noise of
seed and position included, and goes on while the draft says the same: the answer is, token by
token, the one without speculation, whoever drafted it. `accept` is the rule of arXiv 2211.17192
(algorithm 1) and 2302.01318 for a draft model that samples: it keeps more of such drafts, and the
answer is the same in distribution only.

T = K + 1 positions have logits: those before each of K drafted tokens, and after the last.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qwen_jax import logprobs, sampling

PAD = -1  # in tokens: beyond the first that the draft did not foresee


@dataclass(frozen=True)
class Verified:
    """tokens_BT: the accepted drafts and one more token a row, then PAD; num_B of them.

    Leaves of `logprobs` are [B, T], None for "greedy"; counts_BV includes the tokens.
    """

    tokens_BT: jax.Array
    num_B: jax.Array
    logprobs: logprobs.Logprobs | None
    counts_BV: jax.Array | None


jax.tree_util.register_dataclass(Verified, ["tokens_BT", "num_B", "logprobs", "counts_BV"], [])


@dataclass(frozen=True)
class Accepted:
    """num_B drafts stand; tokens_B is the token after them."""

    num_B: jax.Array
    tokens_B: jax.Array


jax.tree_util.register_dataclass(Accepted, ["num_B", "tokens_B"], [])


def verify(
    logits_BTV: jax.Array,
    drafts_BK: jax.Array,
    *,
    draw: Callable[..., sampling.Drawn],
    settings: sampling.Settings,
    lengths_B: jax.Array,
    positions_B: jax.Array,
    generated_B: jax.Array,
    eos_E: jax.Array,
    counts_BV: jax.Array | None = None,
) -> Verified:
    """Draws while the drafts foresee what is drawn: any draft, greedy or not, changes no token.

    draw: `sampling.draw` with its `how` and the prompt's seen_BV. The first lengths_B of a row's
    drafts are real; positions_B and generated_B are those of the token after the last known one,
    counts_BV of the answer so far. A row stops after a token that ends it. A grammar's mask would
    need the host between two positions: rows with one take drafts of length 0.
    """
    T = logits_BTV.shape[1]
    assert drafts_BK.shape[1] == T - 1, (drafts_BK.shape, T)

    def one(carry: tuple[jax.Array, jax.Array | None], inputs: tuple[jax.Array, ...]):
        open_B, counts_BV = carry
        logits_BV, draft_B, step = inputs
        drawn = draw(
            logits_BV,
            settings,
            positions_B=positions_B + step,
            generated_B=generated_B + step,
            eos_E=eos_E,
            counts_BV=counts_BV,
        )
        if counts_BV is not None:
            rows_B = jnp.arange(open_B.shape[0])
            counts_BV = counts_BV.at[rows_B, drawn.tokens_B].add(open_B.astype(counts_BV.dtype))
        tokens_B = jnp.where(open_B, drawn.tokens_B, PAD)
        ended_B = sampling.ends(drawn.tokens_B, settings, eos_E=eos_E)
        open_B &= (drawn.tokens_B == draft_B) & (step < lengths_B) & ~ended_B
        return (open_B, counts_BV), (tokens_B, drawn.logprobs)

    # After the last draft there is none to compare with.
    drafts_BT = jnp.pad(drafts_BK, ((0, 0), (0, 1)), constant_values=PAD)
    inputs = jnp.moveaxis(logits_BTV, 1, 0), drafts_BT.T, jnp.arange(T, dtype=jnp.int32)
    open_B = jnp.ones(drafts_BK.shape[0], bool)
    (_, counts_BV), outputs = jax.lax.scan(one, (open_B, counts_BV), inputs)
    tokens_BT, given = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outputs)
    num_B = jnp.sum(tokens_BT != PAD, axis=1, dtype=jnp.int32)
    return Verified(tokens_BT, num_B, given, counts_BV)


def accept(
    scores_BTV: jax.Array,
    drafts_BK: jax.Array,
    *,
    draft_scores_BKV: jax.Array,
    settings: sampling.Settings,
    lengths_B: jax.Array,
    positions_B: jax.Array,
) -> Accepted:
    """Keeps a draft x with probability min(1, p(x) / q(x)), else draws from max(0, p - q).

    p is the softmax of scores_BTV, q of draft_scores_BKV: both after all that `sampling` does to
    scores. Drafts must have been drawn from q with the noise of `draft_seeds`. Greedy rows keep
    what is their likeliest token. positions_B is the place of each row's first draft; the first
    lengths_B of them are real.
    """
    B, T, _ = scores_BTV.shape
    K = T - 1
    assert drafts_BK.shape == (B, K) and draft_scores_BKV.shape[:2] == (B, K), drafts_BK.shape
    greedy_B = settings.temperature_B == 0
    # float32 island: probabilities are compared.
    p_BKV = jax.nn.softmax(scores_BTV[:, :K].astype(jnp.float32), axis=-1)
    q_BKV = jax.nn.softmax(draft_scores_BKV.astype(jnp.float32), axis=-1)

    def of_drafts(x_BKV: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BKV, drafts_BK[..., None], axis=-1)[..., 0]

    chance_BK = _uniform(settings.seed_B, positions_B, count=K)
    # Strictly: what has no probability is never kept.
    drawn_BK = chance_BK * of_drafts(q_BKV) < of_drafts(p_BKV)
    best_BT = sampling.argmax(scores_BTV.reshape(B * T, -1)).reshape(B, T)
    kept_BK = jnp.where(greedy_B[:, None], drafts_BK == best_BT[:, :K], drawn_BK)
    kept_BK &= jnp.arange(K)[None] < lengths_B[:, None]
    num_B = jnp.sum(jnp.cumprod(kept_BK.astype(jnp.int32), axis=1), axis=1)

    def at_end(x: jax.Array, index_B: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index_B[:, None, None], axis=1)[:, 0]

    last_BV = at_end(scores_BTV, num_B).astype(jnp.float32)
    if K == 0:
        rest_BV = last_BV
    else:
        index_B = jnp.minimum(num_B, K - 1)
        left_BV = jnp.maximum(at_end(p_BKV, index_B) - at_end(q_BKV, index_B), 0.0)
        # Nothing is left where p and q agree but for rounding, or every draft was kept: then p.
        refused_B = (num_B < lengths_B) & jnp.any(left_BV > 0, axis=-1)
        rest_BV = jnp.where(refused_B[:, None], jnp.log(left_BV), last_BV)
    noise_BV = sampling.noise(settings.seed_B, positions_B + num_B, vocab_size=scores_BTV.shape[-1])
    likeliest_B = jnp.take_along_axis(best_BT, num_B[:, None], axis=1)[:, 0]
    tokens_B = jnp.where(greedy_B, likeliest_B, sampling.argmax(rest_BV + noise_BV))
    return Accepted(num_B, tokens_B)


def draft_seeds(seed_B: jax.Array) -> jax.Array:
    """Seeds for the draft model's draws: its noise must have nothing to do with the verifier's."""

    def one(seed: jax.Array) -> jax.Array:
        return jax.random.bits(sampling.key(seed, jnp.uint32(2**32 - 1)), (), jnp.uint32)

    return jax.vmap(one)(seed_B)


def _uniform(seed_B: jax.Array, positions_B: jax.Array, *, count: int) -> jax.Array:
    """[B, K] in [0, 1), of each row's seed and the draft's position, apart from `noise`."""

    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(sampling.key(seed, position), 1))

    positions_BK = positions_B[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(seed_B, positions_BK)
