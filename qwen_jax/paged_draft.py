"""Device programs of a draft model: a smaller one, whose guesses `paged_decode.verify` checks.

It has pages of its own under the same numbers: a row's table names, in both models' pages, the same
positions of the same tokens. Slots are the target's alone. What a draft says never changes an
answer, only how many of its tokens one pass of the target brings.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from configs import schema
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax import paged_cache, paged_pass, paged_state, sampling
from qwen_jax.paged_state import Rows


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "past", "attention", "layout"),
    donate_argnames=("pages",),
)
def read(
    cfg: schema.Model,
    params: dict,
    pages: paged_cache.Pages,
    tokens_RT: jax.Array,
    *,
    table_RM: jax.Array,
    starts_R: jax.Array,
    lengths_R: jax.Array,
    past: Literal["none", "pages"],
    attention: paged_pass.Attention | None = None,
    layout: Layout | None = None,
) -> paged_cache.Pages:
    """Reads chunks of prompts or answers into the draft's pages, as `paged_pass.chunk` does."""
    R, T = tokens_RT.shape
    paged_pass.compilations[f"draft reads rows={R} tokens={T} past={past}"] += 1
    with paged_pass.precision(pages.dtype):
        _, pages = paged_pass.chunk(
            cfg,
            params,
            pages,
            _known(tokens_RT, cfg),
            table_RM=table_RM,
            starts_R=starts_R,
            lengths_R=lengths_R,
            past=past,
            attention=attention,
            layout=layout,
        )
    return pages


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "how", "num_guesses", "vocab_size", "attention", "layout"),
    donate_argnames=("pages",),
)
def propose(
    cfg: schema.Model,
    params: dict,
    pages: paged_cache.Pages,
    slots: Rows,
    slots_R: jax.Array,
    *,
    how: sampling.How,
    eos_E: jax.Array,
    num_guesses: int,
    vocab_size: int,
    attention: paged_pass.Attention | None = None,
    layout: Layout | None = None,
) -> tuple[paged_cache.Pages, jax.Array]:
    """Guesses the next tokens of the slots -> pages, guesses [R, num_guesses], PAD where none.

    They are drawn as the target draws: by the request's own settings, and by its noise of each
    position over `vocab_size` tokens (the target's). Where both models give a token the same score
    they draw alike, so that guesses come true at a temperature too. A token that ends the answer
    is no guess: nothing comes after it that could be checked in the same pass.

    Needs the draft's pages to hold all that the target's do. Afterwards they hold the guesses too,
    the last of them included, so that this is so again however many of them come true.
    """
    R = slots_R.shape[0]
    paged_pass.compilations[f"propose rows={R} guesses={num_guesses} {how}"] += 1
    rows, _ = paged_state.take(slots, slots_R, how)
    untold = dataclasses.replace(rows.settings, logprobs_B=jnp.zeros(R, bool))
    rows = dataclasses.replace(rows, settings=untold)

    def step(carry: tuple[paged_cache.Pages, Rows], _):
        pages, rows = carry
        known = dataclasses.replace(rows, tokens_B=_known(rows.tokens_B, cfg))
        with paged_pass.precision(pages.dtype):
            logits_RV, pages, rows = paged_pass.step(
                cfg, params, pages, known, attention=attention, layout=layout
            )
        logits_RV = _over(logits_RV, vocab_size)
        rows, _ = paged_pass.draw(logits_RV, rows, None, how=how, eos_E=eos_E)
        return (pages, rows), jnp.where(rows.remaining_B > 0, rows.tokens_B, paged_pass.PAD)

    # One step more than guesses: it reads the last guess. What it draws is not used.
    (pages, _), guesses_TR = jax.lax.scan(step, (pages, rows), length=num_guesses + 1)
    return pages, sharding.constrain(guesses_TR[:-1].T, (None, None), layout)


def _known(tokens: jax.Array, cfg: schema.Model) -> jax.Array:
    """Tokens that the draft has rows for: vocabularies are padded, and not all alike."""
    return jnp.minimum(tokens, cfg.vocab_size - 1)


def _over(logits_RV: jax.Array, vocab_size: int) -> jax.Array:
    """Logits of the target's tokens: never those that the draft has no rows for."""
    missing = max(0, vocab_size - logits_RV.shape[1])
    padding = ((0, 0), (0, missing))
    return jnp.pad(logits_RV, padding, constant_values=-jnp.inf)[:, :vocab_size]
