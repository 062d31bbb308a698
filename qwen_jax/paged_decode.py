"""Device programs of a batch inference engine: read chunks of prompts, and draw tokens for slots.

A slot is a row of `State`: one running request. Its keys and values lie in pages that its row of
the page table names. `prefill` reads one chunk each of some prompts and, after a prompt's last
one, draws the first token; `advance` draws several tokens for some slots. Rows of a dispatch are
padded to a bucket by slots that do not exist, whose results go nowhere.
"""

import collections
import contextlib
import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from configs import schema
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax import fused, logprobs, model, paged_cache, paged_state, rope, sampling
from qwen_jax.attention import api, paged
from qwen_jax.few_rows import api as few_rows
from qwen_jax.paged_state import Chunks, Rows, State

PAD = -1  # in token outputs: the row had ended

# Programs traced so far, by name and shape: a bucket that is used again adds nothing.
compilations: collections.Counter[str] = collections.Counter()


Attention = Literal["reference", "gpu", "tpu"]


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "how", "past", "score", "attention", "layout"),
    donate_argnames=("state",),
)
def prefill(
    cfg: schema.Model,
    params: dict,
    state: State,
    chunks: Chunks,
    *,
    how: sampling.How,
    eos_E: jax.Array,
    past: Literal["none", "pages"],
    score: Literal["no", "prompt"] = "no",
    attention: Attention | None = None,
    layout: Layout | None = None,
) -> tuple[State, sampling.Drawn, logprobs.Logprobs | None]:
    """Reads the chunks; where a prompt ends, its slot begins with the first token drawn.

    past: "none" promises that every chunk is the beginning of its prompt. score: whether to give
    the logprobs [R, T] of `next_RT` too. The drawn tokens [R] are PAD where the prompt goes on.
    """
    R, T = chunks.tokens_RT.shape
    compilations[f"prefill rows={R} tokens={T} past={past} score={score} {how}"] += 1
    positions_RT = chunks.starts_R[:, None] + jnp.arange(T, dtype=jnp.int32)[None]

    attend = functools.partial(
        _attend_chunk,
        state.pages,
        chunks.table_RM,
        positions_RT,
        chunks.lengths_R,
        past=past,
        attention=attention,
        layout=layout,
    )
    dtype = state.pages.dtype
    with _precision(dtype):
        x_RTD, kept = _run(
            cfg, params, chunks.tokens_RT, positions_RT, attend, dtype=dtype, layout=layout
        )
        pages = paged_cache.constrain(paged_cache.Pages(kept), layout)
        at_R = jnp.maximum(chunks.lengths_R - 1, 0)
        logits_RV = _logits(
            cfg, params, jnp.take_along_axis(x_RTD, at_R[:, None, None], axis=1), layout=layout
        )[:, 0]
        scored = None
        if score == "prompt":
            kernel_DV = model.output_kernel(cfg, params)
            scored = logprobs.of_prompt(x_RTD, kernel_DV, chunks.next_RT, layout=layout)
    V = cfg.vocab_size
    ended = chunks.starts_R + chunks.lengths_R
    rows = Rows(
        table_BM=chunks.table_RM,
        lengths_B=ended,
        tokens_B=jnp.zeros_like(ended),
        generated_B=jnp.zeros_like(ended),
        remaining_B=jnp.where(chunks.last_R, chunks.max_tokens_R, 0),
        settings=chunks.settings,
        seen_BV=sampling.unpack(chunks.seen_RW, vocab_size=V),
        counts_BV=jnp.zeros((R, V), jnp.int32),
    )
    rows, drawn = _draw(logits_RV, rows, chunks.mask_RW, how=how, eos_E=eos_E, layout=layout)
    slots = paged_state.put(
        state.slots, jnp.where(chunks.last_R, chunks.slots_R, paged_state.NOWHERE), rows
    )
    return State(pages, slots), drawn, scored


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "how", "num_steps", "attention", "layers", "layout"),
    donate_argnames=("state",),
)
def advance(
    cfg: schema.Model,
    params: dict,
    state: State,
    slots_R: jax.Array,
    mask_RW: jax.Array,
    *,
    how: sampling.How,
    eos_E: jax.Array,
    num_steps: int,
    attention: Attention | None = None,
    layers: few_rows.Implementation | None = None,
    layout: Layout | None = None,
) -> tuple[State, sampling.Drawn]:
    """Draws up to `num_steps` tokens for each of the slots -> leaves [num_steps, R], PAD at ends.

    Rows whose slot does not exist are padding. A mask serves one step only: give it with one.
    layers: None takes the kernels for few rows where they run, unless `attention` is named.
    """
    R = slots_R.shape[0]
    compilations[f"advance rows={R} steps={num_steps} {how}"] += 1
    rows, slots = paged_state.take(state.slots, slots_R, how)
    if layers is None:
        layers = "xla"
        if attention is None:
            layers = few_rows.choose(cfg, params, state.pages, rows=R, layout=layout)
    step = {"kernels": _step_of_few, "xla": _step_of_many}[layers]
    step = functools.partial(
        step, cfg, params, mask_RW, how=how, eos_E=eos_E, attention=attention, layout=layout
    )
    carry = state.pages, rows, few_rows.barriers()
    (pages, rows, _), drawn = jax.lax.scan(step, carry, length=num_steps)
    return State(pages, paged_state.give_back(state.slots, slots, slots_R, rows, how)), drawn


Carry = tuple[paged_cache.Pages, Rows, jax.Array]


def _step_of_many(
    cfg, params, mask_RW, carry: Carry, _, *, how, eos_E, attention, layout
) -> tuple[Carry, sampling.Drawn]:
    """One token of every row, by the model's own layers."""
    pages, rows, barriers = carry
    active_R = rows.remaining_B > 0
    attend = functools.partial(
        _attend_one, pages, rows, active_R, attention=attention, layout=layout
    )
    tokens_R1, positions_R1 = rows.tokens_B[:, None], rows.lengths_B[:, None]
    dtype = pages.dtype
    with _precision(dtype):
        x_R1D, kept = _run(cfg, params, tokens_R1, positions_R1, attend, dtype=dtype, layout=layout)
        logits_RV = _logits(cfg, params, x_R1D, layout=layout)[:, 0]
    rows = dataclasses.replace(rows, lengths_B=rows.lengths_B + active_R)
    rows, drawn = _draw(logits_RV, rows, mask_RW, how=how, eos_E=eos_E, layout=layout)
    return (paged_cache.constrain(paged_cache.Pages(kept), layout), rows, barriers), drawn


def _step_of_few(
    cfg, params, mask_RW, carry: Carry, _, *, how, eos_E, attention, layout
) -> tuple[Carry, sampling.Drawn]:
    """One token of every row, by the kernels of `qwen_jax/few_rows`."""
    assert attention in (None, "gpu") and layout is None, (attention, layout)
    pages, rows, barriers = carry
    active_R = rows.remaining_B > 0
    x_RD, pages, barriers = few_rows.run(cfg, params, rows, active_R, pages, barriers)
    rows = dataclasses.replace(rows, lengths_B=rows.lengths_B + active_R)
    if how == "greedy":
        drawn = sampling.Drawn(few_rows.likeliest(cfg, params, x_RD), None)
        rows, drawn = _count(drawn, rows, how=how, eos_E=eos_E)
    else:
        logits_RV = few_rows.logits(cfg, params, x_RD)
        rows, drawn = _draw(logits_RV, rows, mask_RW, how=how, eos_E=eos_E, layout=layout)
    return (pages, rows, barriers), drawn


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "how", "attention", "layout"),
    donate_argnames=("state",),
)
def verify(
    cfg: schema.Model,
    params: dict,
    state: State,
    slots_R: jax.Array,
    guesses_RT: jax.Array,
    mask_RW: jax.Array,
    *,
    how: sampling.How,
    eos_E: jax.Array,
    attention: Attention | None = None,
    layout: Layout | None = None,
) -> tuple[State, sampling.Drawn]:
    """Draws up to T + 1 tokens of each slot in one pass -> leaves [T + 1, R], PAD after the last.

    guesses_RT are what the next T tokens may be; -1 is no guess. Each token is drawn as `advance`
    draws it, by the same noise, after the guesses before it; so long as it is what was guessed, the
    next counts too. Hence the tokens are those of `advance`, whatever is guessed (of a draw with
    probability p, a guess is right with probability p, as in speculative sampling, arXiv
    2211.17192, with a guess of probability 1).
    """
    R, T = guesses_RT.shape
    compilations[f"verify rows={R} guesses={T} {how}"] += 1
    rows, slots = paged_state.take(state.slots, slots_R, how)
    tokens_RT = jnp.concatenate([rows.tokens_B[:, None], jnp.maximum(guesses_RT, 0)], axis=1)
    positions_RT = rows.lengths_B[:, None] + jnp.arange(T + 1, dtype=jnp.int32)[None]
    # A row's pages end where its last token may be: no further is written, nor counted.
    lengths_R = jnp.minimum(T + 1, rows.remaining_B)
    attend = functools.partial(
        _attend_chunk,
        state.pages,
        rows.table_BM,
        positions_RT,
        lengths_R,
        past="pages",
        attention=attention,
        layout=layout,
    )
    dtype = state.pages.dtype
    with _precision(dtype):
        x_RTD, kept = _run(cfg, params, tokens_RT, positions_RT, attend, dtype=dtype, layout=layout)
        logits_RTV = _logits(cfg, params, x_RTD, layout=layout)
    pages = paged_cache.constrain(paged_cache.Pages(kept), layout)

    def step(carry: tuple[Rows, jax.Array], inputs: tuple[jax.Array, jax.Array]):
        rows, right_R = carry
        logits_RV, guess_R = inputs
        active_R = right_R & (rows.remaining_B > 0)
        trial = dataclasses.replace(
            rows,
            lengths_B=rows.lengths_B + active_R,
            remaining_B=jnp.where(active_R, rows.remaining_B, 0),
        )
        trial, drawn = _draw(logits_RV, trial, mask_RW, how=how, eos_E=eos_E, layout=layout)
        trial = dataclasses.replace(
            trial,
            tokens_B=jnp.where(active_R, trial.tokens_B, rows.tokens_B),
            remaining_B=jnp.where(active_R, trial.remaining_B, rows.remaining_B),
        )
        return (trial, active_R & (drawn.tokens_B == guess_R)), drawn

    last_R1 = jnp.full((R, 1), -1, guesses_RT.dtype)
    guesses_TR = jnp.concatenate([guesses_RT, last_R1], axis=1).T
    carry = rows, jnp.ones(R, bool)
    (rows, _), drawn = jax.lax.scan(step, carry, (logits_RTV.swapaxes(0, 1), guesses_TR))
    return State(pages, paged_state.give_back(state.slots, slots, slots_R, rows, how)), drawn


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "attention", "layout"))
def embed(
    cfg: schema.Model,
    params: dict,
    tokens_RT: jax.Array,
    lengths_R: jax.Array,
    *,
    dtype: jnp.dtype,
    attention: str | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """The final hidden state of each row's last token, of length 1: [R, D] in float32."""
    R, T = tokens_RT.shape
    compilations[f"embed rows={R} tokens={T}"] += 1
    positions_RT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (R, T))

    def attend(index: int):
        def inner(q_RTNH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array):
            mask = api.Mask(causal=True)
            return api.attention(
                q_RTNH, k_RTKH, v_RTKH, mask=mask, implementation=attention, layout=layout
            ), None

        return inner

    with _precision(dtype):
        x_RTD, _ = _run(cfg, params, tokens_RT, positions_RT, attend, dtype=dtype, layout=layout)
    last_RD = jnp.take_along_axis(x_RTD, (lengths_R - 1)[:, None, None], axis=1)[:, 0]
    last_RD = last_RD.astype(jnp.float32)
    return last_RD / jnp.linalg.norm(last_RD, axis=-1, keepdims=True)


def _attend_chunk(pages, table_RM, positions_RT, lengths_R, index: int, *, past, attention, layout):
    """Writes a chunk's keys and values into one layer's pages, and attends over all up to it."""
    kv_PSCH = pages.layers[index]
    valid_RT = jnp.arange(positions_RT.shape[1])[None] < lengths_R[:, None]

    def inner(q_RTNH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array):
        kept = paged_cache.write(
            kv_PSCH,
            k_RTKH,
            v_RTKH,
            table_BM=table_RM,
            positions_BT=positions_RT,
            valid_BT=valid_RT,
        )
        o_RTNH = paged.extend(
            q_RTNH,
            k_RTKH,
            v_RTKH,
            kept,
            table_BM=table_RM,
            starts_B=positions_RT[:, 0],
            lengths_B=lengths_R,
            past=past,
            implementation=attention,
            layout=layout,
        )
        return o_RTNH, kept

    return inner


def _attend_one(pages, rows: Rows, active_R, index: int, *, attention, layout):
    """Writes one key and value a row into one layer's pages, and attends over all up to it."""

    def inner(q_R1NH: jax.Array, k_R1KH: jax.Array, v_R1KH: jax.Array):
        o_RNH, kept = paged.append(
            q_R1NH[:, 0],
            k_R1KH[:, 0],
            v_R1KH[:, 0],
            pages.layers[index],
            table_BM=rows.table_BM,
            lengths_B=jnp.where(active_R, rows.lengths_B + 1, 0),
            implementation=attention,
            layout=layout,
        )
        return o_RNH[:, None], kept

    return inner


def _run(cfg, params, tokens_RT, positions_RT, attend, *, dtype, layout):
    """The model's layers -> final norm's output, and what `attend(index)` kept of each."""
    block = fused.block if fused.is_fused(params["layers"][0]) else model.block
    turn = rope.rotation(cfg, positions_RT)
    x_RTD = model.embed(cfg, params, tokens_RT, dtype=dtype, layout=layout)
    kept = []
    for index, layer in enumerate(params["layers"]):
        x_RTD, one, _ = block(cfg, layer)(x_RTD, turn=turn, attend=attend(index), layout=layout)
        kept.append(one)
    return model.parts(cfg)["norm"].bind(params["norm"])(x_RTD), tuple(kept)


def _logits(cfg, params, x_RTD, *, layout) -> jax.Array:
    """[R, T, V], whole on every device: drawing goes by whole rows."""
    logits_RTV = model.unembed(cfg, params, x_RTD, layout=layout)
    # In two steps: asked for whole logits at once, XLA gathers the kernel instead.
    logits_RTV = sharding.constrain(logits_RTV, ("batch", None, "act_vocab"), layout)
    return sharding.constrain(logits_RTV, ("batch", None, None), layout)


def _draw(logits_RV, rows: Rows, mask_RW, *, how, eos_E, layout) -> tuple[Rows, sampling.Drawn]:
    """Draws a token for every row that has some left -> the rows with it; PAD for the others."""
    drawn = sampling.draw(
        logits_RV,
        rows.settings,
        how=how,
        positions_B=rows.lengths_B,
        generated_B=rows.generated_B,
        eos_E=eos_E,
        seen_BV=rows.seen_BV,
        counts_BV=rows.counts_BV,
        mask_BW=mask_RW,
    )
    return _count(drawn, rows, how=how, eos_E=eos_E)


def _count(drawn: sampling.Drawn, rows: Rows, *, how, eos_E) -> tuple[Rows, sampling.Drawn]:
    """The rows with what was drawn; PAD for those that had ended."""
    active_R = rows.remaining_B > 0
    ended_R = sampling.ends(drawn.tokens_B, rows.settings, eos_E=eos_E)
    rows = dataclasses.replace(
        rows,
        tokens_B=jnp.where(active_R, drawn.tokens_B, 0),
        generated_B=rows.generated_B + active_R,
        remaining_B=jnp.where(ended_R | ~active_R, 0, rows.remaining_B - 1),
    )
    if how != "greedy":
        index_R = jnp.arange(active_R.shape[0])
        counts_RV = rows.counts_BV.at[index_R, drawn.tokens_B].add(active_R.astype(jnp.int32))
        rows = dataclasses.replace(rows, counts_BV=counts_RV)
    tokens_R = jnp.where(active_R, drawn.tokens_B, PAD)
    return rows, dataclasses.replace(drawn, tokens_B=tokens_R)


def _precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """Who asks for float32 means it: GPUs and TPUs would otherwise multiply in fewer bits."""
    if dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
