"""Device programs of a batch inference engine: prefill, decoding, and checks of draft tokens.

A slot is a row of `State`: one running request. Its keys and values lie in pages that its row of
the page table names. `prefill` reads one chunk each of some prompts and, after a prompt's last
chunk, draws the first token; `advance` draws several tokens for some slots. Rows of a dispatch are
padded to a bucket by slots that do not exist, whose results are dropped.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from partitioning.sharding import Layout
from qwen_jax.decode import forward, logprobs, sampling, slot_state
from qwen_jax.decode import small_batch_step as small_batch
from qwen_jax.decode.slot_state import Chunks, Rows, State
from qwen_jax.decode.weights import DecodeWeights
from qwen_jax.model import transformer
from qwen_jax.ops.attention import api
from qwen_jax.ops.attention.paged import kv_pages


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "sampler", "prefix", "score", "attention", "layout"),
    donate_argnames=("state",),
)
def prefill(
    cfg: ModelConfig,
    weights: DecodeWeights,
    state: State,
    chunks: Chunks,
    *,
    sampler: sampling.Sampler,
    eos_E: jax.Array,
    prefix: Literal["none", "pages"],
    score: Literal["no", "prompt"] = "no",
    attention: forward.Attention | None = None,
    layout: Layout | None = None,
) -> tuple[State, sampling.Drawn, logprobs.Logprobs | None]:
    """State after the chunks were read, first tokens [R], and log-probabilities [R, T] or None.

    Where a prompt ends, its slot begins with the first token drawn; where it goes on, the token is
    PAD. prefix: "none" promises that every chunk is the beginning of its prompt. score: "prompt"
    computes the log-probabilities of `next_RT`.
    """
    R, T = chunks.tokens_RT.shape
    forward.compilations[
        f"prefill rows={R} tokens={T} prefix={prefix} score={score} {sampler}"
    ] += 1
    with forward.precision(state.pages.dtype):
        hidden, pages = forward.chunk(
            cfg,
            weights,
            state.pages,
            chunks.tokens_RT,
            table_RM=chunks.table_RM,
            starts_R=chunks.starts_R,
            lengths_R=chunks.lengths_R,
            prefix=prefix,
            outputs=("all", "last") if score == "prompt" else ("last",),
            attention=attention,
            layout=layout,
        )
        logits_RV = forward.logits(cfg, weights, hidden.last_R1D, layout=layout)[:, 0]
        prompt_logprobs = None
        if score == "prompt":
            kernel_DV = transformer.output_kernel(cfg, weights.params)
            prompt_logprobs = logprobs.of_prompt(
                hidden.all_RTD, kernel_DV, chunks.next_RT, layout=layout
            )
    V = cfg.vocab_size
    ended, last_R = chunks.starts_R + chunks.lengths_R, jnp.maximum(chunks.lengths_R - 1, 0)
    rows = Rows(
        table_BM=chunks.table_RM,
        lengths_B=ended,
        before_B=jnp.zeros_like(ended),
        tokens_B=jnp.take_along_axis(chunks.tokens_RT, last_R[:, None], axis=1)[:, 0],
        generated_B=jnp.zeros_like(ended),
        remaining_B=jnp.where(chunks.last_R, chunks.max_tokens_R, 0),
        settings=chunks.settings,
        seen_BV=sampling.unpack(chunks.seen_RW, vocab_size=V),
        counts_BV=jnp.zeros((R, V), jnp.int32),
    )
    rows, drawn = forward.draw(logits_RV, rows, chunks.mask_RW, sampler=sampler, eos_E=eos_E)
    slots = slot_state.scatter_rows(
        state.slots, jnp.where(chunks.last_R, chunks.slots_R, slot_state.NO_SLOT), rows
    )
    return State(pages, slots), drawn, prompt_logprobs


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "sampler", "num_steps", "attention", "layers", "layout"),
    donate_argnames=("state",),
)
def advance(
    cfg: ModelConfig,
    weights: DecodeWeights,
    state: State,
    slots_R: jax.Array,
    mask_RW: jax.Array,
    *,
    sampler: sampling.Sampler,
    eos_E: jax.Array,
    num_steps: int,
    attention: forward.Attention | None = None,
    layers: small_batch.Implementation | None = None,
    layout: Layout | None = None,
) -> tuple[State, sampling.Drawn]:
    """State, and up to `num_steps` tokens drawn for each slot: leaves [num_steps, R], then PAD.

    Rows whose slot does not exist are padding. A mask holds for one step: num_steps is 1 where one
    forbids anything. layers: None chooses the kernels of `small_batch/` where they are faster,
    unless `attention` is named.
    """
    R = slots_R.shape[0]
    forward.compilations[f"advance rows={R} steps={num_steps} {sampler}"] += 1
    rows, slots = slot_state.gather_rows(state.slots, slots_R, sampler)

    if layers is None:
        layers = "xla"
        if attention is None:
            layers = small_batch.choose(cfg, weights, state.pages, rows=R, layout=layout)
    step = {"kernels": _step_by_kernels, "xla": _step_by_xla}[layers]
    step = functools.partial(
        step,
        cfg,
        weights,
        mask_RW,
        sampler=sampler,
        eos_E=eos_E,
        attention=attention,
        layout=layout,
    )
    carry = state.pages, rows, small_batch.barriers()
    (pages, rows, _), drawn = jax.lax.scan(step, carry, length=num_steps)
    return State(pages, slot_state.scatter_back(state.slots, slots, slots_R, rows, sampler)), drawn


Carry = tuple[kv_pages.Pages, Rows, jax.Array]


def _step_by_xla(
    cfg, weights, mask_RW, carry: Carry, _, *, sampler, eos_E, attention, layout
) -> tuple[Carry, sampling.Drawn]:
    """The carry after one token of every row, and the tokens drawn, by the model's own layers."""
    pages, rows, barriers = carry
    with forward.precision(pages.dtype):
        logits_RV, pages, rows = forward.step(
            cfg, weights, pages, rows, attention=attention, layout=layout
        )
    rows, drawn = forward.draw(logits_RV, rows, mask_RW, sampler=sampler, eos_E=eos_E)
    return (pages, rows, barriers), drawn


def _step_by_kernels(
    cfg, weights, mask_RW, carry: Carry, _, *, sampler, eos_E, attention, layout
) -> tuple[Carry, sampling.Drawn]:
    """The carry after one token of every row, and the tokens, by the kernels of `small_batch/`."""
    assert attention in (None, "gpu") and layout is None, (attention, layout)
    pages, rows, barriers = carry
    active_R = rows.remaining_B > 0
    x_RD, pages, barriers = small_batch.run(cfg, weights, rows, active_R, pages, barriers)
    rows = dataclasses.replace(rows, lengths_B=rows.lengths_B + active_R)
    if sampler == "greedy":
        drawn = sampling.Drawn(small_batch.likeliest(cfg, weights, x_RD), None)
        rows, drawn = forward.count(drawn, rows, sampler=sampler, eos_E=eos_E)
    else:
        logits_RV = small_batch.logits(cfg, weights, x_RD)
        rows, drawn = forward.draw(logits_RV, rows, mask_RW, sampler=sampler, eos_E=eos_E)
    return (pages, rows, barriers), drawn


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "sampler", "attention", "layout"),
    donate_argnames=("state",),
)
def verify(
    cfg: ModelConfig,
    weights: DecodeWeights,
    state: State,
    slots_R: jax.Array,
    draft_RT: jax.Array,
    mask_RW: jax.Array,
    *,
    sampler: sampling.Sampler,
    eos_E: jax.Array,
    attention: forward.Attention | None = None,
    layout: Layout | None = None,
) -> tuple[State, sampling.Drawn]:
    """State, and up to T + 1 tokens drawn for each slot in one pass: leaves [T + 1, R], then PAD.

    draft_RT are the draft tokens at the next T positions; -1 is none. Each token is drawn as
    `advance` draws it, by the same noise, after the draft tokens before it; while it equals the
    draft token there, the next one counts too. Hence the tokens are those of `advance`, whatever
    the draft is: a draft token of target probability p is accepted with probability p, as in
    speculative sampling (arXiv 2211.17192) with a deterministic draft.
    """
    R, T = draft_RT.shape
    forward.compilations[f"verify rows={R} draft_tokens={T} {sampler}"] += 1
    rows, slots = slot_state.gather_rows(state.slots, slots_R, sampler)
    tokens_RT = jnp.concatenate([rows.tokens_B[:, None], jnp.maximum(draft_RT, 0)], axis=1)
    with forward.precision(state.pages.dtype):
        hidden, pages = forward.chunk(
            cfg,
            weights,
            state.pages,
            tokens_RT,
            table_RM=rows.table_BM,
            starts_R=rows.lengths_B,
            # A row's pages end at its last possible token: nothing is written or counted beyond.
            lengths_R=jnp.minimum(T + 1, rows.remaining_B),
            prefix="pages",
            outputs=("all",),
            attention=attention,
            layout=layout,
        )
        logits_RTV = forward.logits(cfg, weights, hidden.all_RTD, layout=layout)

    def step(carry: tuple[Rows, jax.Array], inputs: tuple[jax.Array, jax.Array]):
        rows, accepted_R = carry
        logits_RV, draft_R = inputs
        active_R = accepted_R & (rows.remaining_B > 0)
        trial = dataclasses.replace(
            rows,
            lengths_B=rows.lengths_B + active_R,
            remaining_B=jnp.where(active_R, rows.remaining_B, 0),
        )
        trial, drawn = forward.draw(logits_RV, trial, mask_RW, sampler=sampler, eos_E=eos_E)
        trial = dataclasses.replace(
            trial,
            tokens_B=jnp.where(active_R, trial.tokens_B, rows.tokens_B),
            remaining_B=jnp.where(active_R, trial.remaining_B, rows.remaining_B),
        )
        return (trial, active_R & (drawn.tokens_B == draft_R)), drawn

    last_R1 = jnp.full((R, 1), -1, draft_RT.dtype)
    draft_TR = jnp.concatenate([draft_RT, last_R1], axis=1).T
    carry = rows, jnp.ones(R, bool)
    (rows, _), drawn = jax.lax.scan(step, carry, (logits_RTV.swapaxes(0, 1), draft_TR))
    return State(pages, slot_state.scatter_back(state.slots, slots, slots_R, rows, sampler)), drawn


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "attention", "layout"))
def embed(
    cfg: ModelConfig,
    weights: DecodeWeights,
    tokens_RT: jax.Array,
    lengths_R: jax.Array,
    *,
    dtype: jnp.dtype,
    attention: str | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """The final hidden state of each row's last token, scaled to length 1: [R, D] in float32."""
    R, T = tokens_RT.shape
    forward.compilations[f"embed rows={R} tokens={T}"] += 1
    positions_RT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (R, T))

    def attend(no_pages: None):
        def inner(q_RTNH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array):
            mask = api.Mask(causal=True)
            return api.attention(
                q_RTNH, k_RTKH, v_RTKH, mask=mask, implementation=attention, layout=layout
            ), None

        return inner

    with forward.precision(dtype):
        no_pages = [None] * cfg.num_hidden_layers
        x_RTD, _ = forward.run_layers(
            cfg, weights, no_pages, tokens_RT, positions_RT, attend, dtype=dtype, layout=layout
        )
    last_RD = jnp.take_along_axis(x_RTD, (lengths_R - 1)[:, None, None], axis=1)[:, 0]
    last_RD = last_RD.astype(jnp.float32)
    return last_RD / jnp.linalg.norm(last_RD, axis=-1, keepdims=True)
