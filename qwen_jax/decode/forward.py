"""One pass of a model over pages of keys and values, and the drawing of tokens from it.

Of these the programs of `paged_decode.py` and `paged_draft.py` are made. Every pass writes the keys
and values of the tokens that it reads into their rows' pages, and gives the pages back.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.decode import fused_layers, sampling
from qwen_jax.decode.slot_state import Rows
from qwen_jax.model import rope, transformer
from qwen_jax.ops.attention.paged import api as paged
from qwen_jax.ops.attention.paged import kv_pages

PAD = -1  # in token outputs: the row had ended

# Programs traced so far, by name and shape: a bucket that is used again adds nothing.
compilations: collections.Counter[str] = collections.Counter()


Attention = Literal["reference", "gpu", "tpu"]


class Hidden(NamedTuple):
    """The final norm's output, where it was asked for: of a chunk, and of each row's last token."""

    all_RTD: jax.Array | None
    last_R1D: jax.Array | None


def chunk(
    cfg: ModelConfig,
    params: dict,
    pages: kv_pages.Pages,
    tokens_RT: jax.Array,
    *,
    table_RM: jax.Array,
    starts_R: jax.Array,
    lengths_R: jax.Array,
    prefix: Literal["none", "pages"],
    outputs: Collection[Literal["all", "last"]],
    attention: Attention | None,
    layout: Layout | None,
) -> tuple[Hidden, kv_pages.Pages]:
    """Reads a chunk of every row -> what was asked for, pages.

    starts_R tokens of each row are in its pages; the first lengths_R of the chunk are written.
    prefix: "none" promises that starts_R is 0 everywhere. outputs: of the last layer, only keys and
    values of tokens that are not asked for are computed. What the last token gets is the same to
    the bit whether "all" is asked for too or not.
    """
    T = tokens_RT.shape[1]
    positions_RT = starts_R[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    last_R = jnp.maximum(lengths_R - 1, 0)
    common = {"attention": attention, "layout": layout}
    written = (table_RM, positions_RT, lengths_R)
    rotation = rope.rotation(cfg, positions_RT)
    x_RTD = transformer.embed(cfg, params, tokens_RT, dtype=pages.dtype, layout=layout)
    *before, final = zip(params["layers"], pages.layers, strict=True)

    whole = _layer(
        cfg, rotation, lambda one: _attend_chunk(one, *written, prefix=prefix, **common), layout
    )
    x_RTD, kept = _run(whole, before, x_RTD)
    all_RTD = last_R1D = None
    if "last" in outputs:
        ends = _layer(
            cfg, rotation, lambda one: _attend_last(one, *written, last_R, **common), layout, last_R
        )
        last_R1D, (pages_of_final,) = _run(ends, [final], x_RTD)
    if "all" in outputs or not outputs:
        all_RTD, (pages_of_final,) = _run(whole, [final], x_RTD)
    norm = transformer.parts(cfg)["norm"].bind(params["norm"])
    hidden = Hidden(*(None if x is None else norm(x) for x in (all_RTD, last_R1D)))
    return hidden, kv_pages.constrain(kv_pages.Pages((*kept, pages_of_final)), layout)


def step(
    cfg: ModelConfig,
    params: dict,
    pages: kv_pages.Pages,
    rows: Rows,
    *,
    attention: Attention | None,
    layout: Layout | None,
) -> tuple[jax.Array, kv_pages.Pages, Rows]:
    """Reads the last token of every row that goes on -> logits [R, V], pages, longer rows."""
    active_R = rows.remaining_B > 0

    def attend(layer: kv_pages.Layer):
        return _attend_one(layer, rows, active_R, attention=attention, layout=layout)

    tokens_R1, positions_R1 = rows.tokens_B[:, None], rows.lengths_B[:, None]
    dtype = pages.dtype
    x_R1D, kept = layers(
        cfg, params, pages.layers, tokens_R1, positions_R1, attend, dtype=dtype, layout=layout
    )
    rows = dataclasses.replace(rows, lengths_B=rows.lengths_B + active_R)
    pages = kv_pages.constrain(kv_pages.Pages(kept), layout)
    return logits(cfg, params, x_R1D, layout=layout)[:, 0], pages, rows


def layers(
    cfg: ModelConfig,
    params: dict,
    pages: Sequence[kv_pages.Layer | None],
    tokens_RT: jax.Array,
    positions_RT: jax.Array,
    attend: Callable,
    *,
    dtype: jnp.dtype,
    layout: Layout | None,
) -> tuple[jax.Array, tuple]:
    """The layers -> the final norm's output, and what `attend(a layer's pages)` kept of each."""
    rotation = rope.rotation(cfg, positions_RT)
    x_RTD = transformer.embed(cfg, params, tokens_RT, dtype=dtype, layout=layout)
    layer = _layer(cfg, rotation, attend, layout)
    x_RTD, kept = _run(layer, zip(params["layers"], pages, strict=True), x_RTD)
    return transformer.parts(cfg)["norm"].bind(params["norm"])(x_RTD), kept


def _layer(cfg, rotation, attend, layout, only_R=None) -> Callable:
    """A function of a layer's parameters, what comes in, and its pages -> what goes out, pages.

    Layers that are alike are traced once, which for 28 of them takes a third of the time.
    """

    @jax.jit
    def layer(values: dict, x_RTD: jax.Array, one: kv_pages.Layer | None) -> tuple:
        block = fused_layers.block if fused_layers.is_fused(values) else transformer.block
        bound = block(cfg, values)
        return bound(x_RTD, rotation=rotation, attend=attend(one), layout=layout, only_B=only_R)[:2]

    return layer


def _run(layer: Callable, those: Iterable[tuple], x_RTD: jax.Array) -> tuple[jax.Array, tuple]:
    """One layer after the other -> what comes out, and their pages."""
    kept = []
    for values, one in those:
        x_RTD, one = layer(values, x_RTD, one)
        kept.append(one)
    return x_RTD, tuple(kept)


def logits(cfg: ModelConfig, params: dict, x_RTD: jax.Array, *, layout: Layout | None) -> jax.Array:
    """[R, T, V], whole on every device: drawing goes by whole rows."""
    logits_RTV = transformer.unembed(cfg, params, x_RTD, layout=layout)
    # In two steps: asked for whole logits at once, XLA gathers the kernel instead.
    logits_RTV = sharding.constrain(logits_RTV, ("batch", None, "act_vocab"), layout)
    return sharding.constrain(logits_RTV, ("batch", None, None), layout)


def draw(
    logits_RV: jax.Array,
    rows: Rows,
    mask_RW: jax.Array | None,
    *,
    sampler: sampling.Sampler,
    eos_E: jax.Array,
) -> tuple[Rows, sampling.Drawn]:
    """Draws a token for every row that has some left -> the rows with it; PAD for the others."""
    drawn = sampling.draw(
        logits_RV,
        rows.settings,
        sampler=sampler,
        positions_B=rows.lengths_B,
        generated_B=rows.generated_B,
        eos_E=eos_E,
        seen_BV=rows.seen_BV,
        counts_BV=rows.counts_BV,
        mask_BW=mask_RW,
    )
    return count(drawn, rows, sampler=sampler, eos_E=eos_E)


def count(
    drawn: sampling.Drawn, rows: Rows, *, sampler: sampling.Sampler, eos_E: jax.Array
) -> tuple[Rows, sampling.Drawn]:
    """The rows with what was drawn; PAD for those that had ended."""
    active_R = rows.remaining_B > 0
    ended_R = sampling.ends(drawn.tokens_B, rows.settings, eos_E=eos_E)
    rows = dataclasses.replace(
        rows,
        before_B=jnp.where(active_R, rows.tokens_B, rows.before_B),
        tokens_B=jnp.where(active_R, drawn.tokens_B, 0),
        generated_B=rows.generated_B + active_R,
        remaining_B=jnp.where(ended_R | ~active_R, 0, rows.remaining_B - 1),
    )
    if sampler != "greedy":
        index_R = jnp.arange(active_R.shape[0])
        counts_RV = rows.counts_BV.at[index_R, drawn.tokens_B].add(active_R.astype(jnp.int32))
        rows = dataclasses.replace(rows, counts_BV=counts_RV)
    tokens_R = jnp.where(active_R, drawn.tokens_B, PAD)
    return rows, dataclasses.replace(drawn, tokens_B=tokens_R)


def precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """Who asks for float32 means it: GPUs and TPUs would otherwise multiply in fewer bits."""
    if dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def _attend_chunk(kv_PSCH, table_RM, positions_RT, lengths_R, *, prefix, attention, layout):
    """Writes a chunk's keys and values into one layer's pages, and attends over all up to it."""

    def inner(q_RTNH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array):
        kept = _write(kv_PSCH, k_RTKH, v_RTKH, table_RM, positions_RT, lengths_R)
        o_RTNH = paged.extend(
            q_RTNH,
            k_RTKH,
            v_RTKH,
            kept,
            table_BM=table_RM,
            starts_B=positions_RT[:, 0],
            lengths_B=lengths_R,
            prefix=prefix,
            implementation=attention,
            layout=layout,
        )
        return o_RTNH, kept

    return inner


def _attend_last(kv_PSCH, table_RM, positions_RT, lengths_R, last_R, *, attention, layout):
    """`_attend_chunk` for each row's last query alone."""
    ended_R = jnp.where(lengths_R > 0, positions_RT[:, 0] + lengths_R, 0)

    def inner(q_RTNH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array):
        kept = _write(kv_PSCH, k_RTKH, v_RTKH, table_RM, positions_RT, lengths_R)
        o_RNH = paged.decode(
            jnp.take_along_axis(q_RTNH, last_R[:, None, None, None], axis=1)[:, 0],
            kept,
            table_BM=table_RM,
            lengths_B=ended_R,
            implementation=attention,
            layout=layout,
        )
        return o_RNH[:, None], kept

    return inner


def _write(kv_PSCH, k_RTKH, v_RTKH, table_RM, positions_RT, lengths_R) -> kv_pages.Layer:
    return kv_pages.write(
        kv_PSCH,
        k_RTKH,
        v_RTKH,
        table_BM=table_RM,
        positions_BT=positions_RT,
        valid_BT=jnp.arange(positions_RT.shape[1])[None] < lengths_R[:, None],
    )


def _attend_one(kv_PSCH, rows: Rows, active_R, *, attention, layout):
    """Writes one key and value a row into one layer's pages, and attends over all up to it."""

    def inner(q_R1NH: jax.Array, k_R1KH: jax.Array, v_R1KH: jax.Array):
        o_RNH, kept = paged.append(
            q_R1NH[:, 0],
            k_R1KH[:, 0],
            v_R1KH[:, 0],
            kv_PSCH,
            table_BM=rows.table_BM,
            lengths_B=jnp.where(active_R, rows.lengths_B + 1, 0),
            implementation=attention,
            layout=layout,
        )
        return o_RNH[:, None], kept

    return inner
