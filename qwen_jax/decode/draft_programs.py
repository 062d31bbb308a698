"""Device programs of a draft model: a smaller one, whose draft tokens `programs.verify` checks.

It has pages of its own under the same numbers: a row of the page table names the same positions of
the same tokens in both models' pages. Slots belong to the target model alone. Draft tokens never
change an answer, only the number of its tokens that one pass of the target model yields.
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
from qwen_jax.decode.weights import DecodeWeights
from qwen_jax.ops.attention.paged import kv_pages


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "prefix", "attention", "layout"),
    donate_argnames=("pages",),
)
def read(
    cfg: ModelConfig,
    weights: DecodeWeights,
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
    """The draft's pages after chunks of prompts or answers were read, as by `forward.chunk`."""
    R, T = tokens_RT.shape
    forward.compilations[f"draft reads rows={R} tokens={T} prefix={prefix}"] += 1
    with forward.precision(pages.dtype):
        _, pages = forward.chunk(
            cfg,
            weights,
            pages,
            _in_vocabulary(tokens_RT, cfg),
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
    static_argnames=("cfg", "sampler", "num_draft_tokens", "vocab_size", "attention", "layout"),
    donate_argnames=("pages",),
)
def propose(
    cfg: ModelConfig,
    weights: DecodeWeights,
    pages: kv_pages.Pages,
    slots: Rows,
    slots_R: jax.Array,
    *,
    sampler: sampling.Sampler,
    eos_E: jax.Array,
    num_draft_tokens: int,
    vocab_size: int,
    attention: forward.Attention | None = None,
    layout: Layout | None = None,
) -> tuple[kv_pages.Pages, jax.Array]:
    """The draft's pages, and draft tokens of the slots [R, num_draft_tokens], PAD where none.

    They are drawn as the target model draws: by the request's own settings, and its noise at each
    position over `vocab_size` tokens (the target's). Where both models give a token the same score
    they draw the same, so that draft tokens are accepted at a temperature too. A token that ends
    the answer is not proposed: nothing after it could be checked in the same pass.

    The draft's pages have to hold all tokens that the target's do, except the last, which is read
    again: where all draft tokens of the previous round were accepted, the last was not read.
    """
    R = slots_R.shape[0]
    forward.compilations[f"propose rows={R} draft_tokens={num_draft_tokens} {sampler}"] += 1
    rows, _ = slot_state.gather_rows(slots, slots_R, sampler)
    settings = dataclasses.replace(rows.settings, logprobs_B=jnp.zeros(R, bool))
    rows = dataclasses.replace(rows, settings=settings)

    def drawn(logits_RV: jax.Array, rows: Rows) -> tuple[Rows, jax.Array]:
        rows, _ = forward.draw(
            _over_vocabulary(logits_RV, vocab_size), rows, None, sampler=sampler, eos_E=eos_E
        )
        return rows, jnp.where(rows.remaining_B > 0, rows.tokens_B, forward.PAD)

    def step(carry: tuple[kv_pages.Pages, Rows], _):
        pages, rows = carry
        readable = dataclasses.replace(rows, tokens_B=_in_vocabulary(rows.tokens_B, cfg))
        with forward.precision(pages.dtype):
            logits_RV, pages, rows = forward.step(
                cfg, weights, pages, readable, attention=attention, layout=layout
            )
        rows, draft_R = drawn(logits_RV, rows)
        return (pages, rows), draft_R

    with forward.precision(pages.dtype):
        logits_RV, pages, rows = _read_two(
            cfg, weights, pages, rows, attention=attention, layout=layout
        )
    rows, first_R = drawn(logits_RV, rows)
    (pages, _), others_TR = jax.lax.scan(step, (pages, rows), length=num_draft_tokens - 1)
    draft_RT = jnp.concatenate([first_R[None], others_TR]).T
    return pages, sharding.constrain(draft_RT, (None, None), layout)


def _read_two(cfg, weights, pages, rows: Rows, *, attention, layout):
    """Logits [R, V], pages and rows as `forward.step` gives them, after each row's last two tokens.

    The first of the two may be in the pages already.
    """
    active_R = rows.remaining_B > 0
    hidden, pages = forward.chunk(
        cfg,
        weights,
        pages,
        _in_vocabulary(jnp.stack([rows.before_B, rows.tokens_B], axis=1), cfg),
        table_RM=rows.table_BM,
        starts_R=jnp.maximum(rows.lengths_B - 1, 0),
        lengths_R=jnp.where(active_R, 2, 0),
        prefix="pages",
        outputs=("last",),
        attention=attention,
        layout=layout,
    )
    rows = dataclasses.replace(rows, lengths_B=rows.lengths_B + active_R)
    return forward.logits(cfg, weights, hidden.last_R1D, layout=layout)[:, 0], pages, rows


def _in_vocabulary(tokens: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Tokens limited to the draft's vocabulary: two models may pad theirs to different sizes."""
    return jnp.minimum(tokens, cfg.vocab_size - 1)


def _over_vocabulary(logits_RV: jax.Array, vocab_size: int) -> jax.Array:
    """Logits over the target's vocabulary, -inf for tokens that the draft does not have."""
    missing = max(0, vocab_size - logits_RV.shape[1])
    padding = ((0, 0), (0, missing))
    return jnp.pad(logits_RV, padding, constant_values=-jnp.inf)[:, :vocab_size]
