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

from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.decode import forward, sampling, slot_state
from qwen_jax.decode.slot_state import Rows
from qwen_jax.ops.attention.paged import kv_pages


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "prefix", "attention", "layout"),
    donate_argnames=("pages",),
)
def read(
    cfg: ModelConfig,
    params: dict,
    pages: kv_pages.Pages,
    tokens_RT: jax.Array,
    *,
    table_RM: jax.Array,
    starts_R: jax.Array,
    lengths_R: jax.Array,
    prefix: Literal["none", "pages"],
    attention: forward.Attention | None = None,
    layout: Layout | None = None,
) -> kv_pages.Pages:
    """Reads chunks of prompts or answers into the draft's pages, as `paged_pass.chunk` does."""
    R, T = tokens_RT.shape
    forward.compilations[f"draft reads rows={R} tokens={T} prefix={prefix}"] += 1
    with forward.precision(pages.dtype):
        _, pages = forward.chunk(
            cfg,
            params,
            pages,
            _known(tokens_RT, cfg),
            table_RM=table_RM,
            starts_R=starts_R,
            lengths_R=lengths_R,
            prefix=prefix,
            outputs=(),
            attention=attention,
            layout=layout,
        )
    return pages


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "sampler", "num_guesses", "vocab_size", "attention", "layout"),
    donate_argnames=("pages",),
)
def propose(
    cfg: ModelConfig,
    params: dict,
    pages: kv_pages.Pages,
    slots: Rows,
    slots_R: jax.Array,
    *,
    sampler: sampling.Sampler,
    eos_E: jax.Array,
    num_guesses: int,
    vocab_size: int,
    attention: forward.Attention | None = None,
    layout: Layout | None = None,
) -> tuple[kv_pages.Pages, jax.Array]:
    """Guesses the next tokens of the slots -> pages, guesses [R, num_guesses], PAD where none.

    They are drawn as the target draws: by the request's own settings, and by its noise of each
    position over `vocab_size` tokens (the target's). Where both models give a token the same score
    they draw alike, so that guesses come true at a temperature too. A token that ends the answer
    is no guess: nothing comes after it that could be checked in the same pass.

    Needs the draft's pages to hold all that the target's do, but for the last token of them, which
    is read anew: where all guesses of the round before came true, the last was not read.
    """
    R = slots_R.shape[0]
    forward.compilations[f"propose rows={R} guesses={num_guesses} {sampler}"] += 1
    rows, _ = slot_state.gather_rows(slots, slots_R, sampler)
    untold = dataclasses.replace(rows.settings, logprobs_B=jnp.zeros(R, bool))
    rows = dataclasses.replace(rows, settings=untold)

    def drawn(logits_RV: jax.Array, rows: Rows) -> tuple[Rows, jax.Array]:
        rows, _ = forward.draw(
            _over(logits_RV, vocab_size), rows, None, sampler=sampler, eos_E=eos_E
        )
        return rows, jnp.where(rows.remaining_B > 0, rows.tokens_B, forward.PAD)

    def step(carry: tuple[kv_pages.Pages, Rows], _):
        pages, rows = carry
        known = dataclasses.replace(rows, tokens_B=_known(rows.tokens_B, cfg))
        with forward.precision(pages.dtype):
            logits_RV, pages, rows = forward.step(
                cfg, params, pages, known, attention=attention, layout=layout
            )
        rows, guess_R = drawn(logits_RV, rows)
        return (pages, rows), guess_R

    with forward.precision(pages.dtype):
        logits_RV, pages, rows = _read_two(
            cfg, params, pages, rows, attention=attention, layout=layout
        )
    rows, first_R = drawn(logits_RV, rows)
    (pages, _), others_TR = jax.lax.scan(step, (pages, rows), length=num_guesses - 1)
    guesses_RT = jnp.concatenate([first_R[None], others_TR]).T
    return pages, sharding.constrain(guesses_RT, (None, None), layout)


def _read_two(cfg, params, pages, rows: Rows, *, attention, layout):
    """`paged_pass.step` of a row's last two tokens, the first of which may be there already."""
    active_R = rows.remaining_B > 0
    hidden, pages = forward.chunk(
        cfg,
        params,
        pages,
        _known(jnp.stack([rows.before_B, rows.tokens_B], axis=1), cfg),
        table_RM=rows.table_BM,
        starts_R=jnp.maximum(rows.lengths_B - 1, 0),
        lengths_R=jnp.where(active_R, 2, 0),
        prefix="pages",
        outputs=("last",),
        attention=attention,
        layout=layout,
    )
    rows = dataclasses.replace(rows, lengths_B=rows.lengths_B + active_R)
    return forward.logits(cfg, params, hidden.last_R1D, layout=layout)[:, 0], pages, rows


def _known(tokens: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Tokens that the draft has rows for: vocabularies are padded, and not all alike."""
    return jnp.minimum(tokens, cfg.vocab_size - 1)


def _over(logits_RV: jax.Array, vocab_size: int) -> jax.Array:
    """Logits of the target's tokens: never those that the draft has no rows for."""
    missing = max(0, vocab_size - logits_RV.shape[1])
    padding = ((0, 0), (0, missing))
    return jnp.pad(logits_RV, padding, constant_values=-jnp.inf)[:, :vocab_size]
