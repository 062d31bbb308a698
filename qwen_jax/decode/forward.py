"""One pass of a model over pages of keys and values, and the drawing of tokens after it.

`programs.py` and `draft_programs.py` are made of these functions. Every pass writes the keys and
values of the tokens that it reads into their rows' pages, and returns the pages.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.decode import sampling
from qwen_jax.decode.slot_state import Rows
from qwen_jax.decode.weights import DecodeWeights
from qwen_jax.model import module, rope, transformer
from qwen_jax.ops.attention.paged import api as paged
from qwen_jax.ops.attention.paged import kv_pages

PAD = -1  # in token outputs: the row had ended

# Programs traced so far, by name and shape: a bucket that is used again adds nothing.
compilations: collections.Counter[str] = collections.Counter()


Attention = Literal["reference", "gpu", "tpu"]


class Hidden(NamedTuple):
    """The final norm's output for all tokens and for each row's last one; None if not asked for."""

    all_RTD: jax.Array | None
    last_R1D: jax.Array | None


def chunk(
    cfg: ModelConfig,
    weights: DecodeWeights,
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
    """Hidden states after a chunk of every row was read, and the pages.

    starts_R tokens of each row are in its pages; the first lengths_R of the chunk are written.
    prefix: "none" promises that starts_R is 0 everywhere. outputs: the hidden states to compute; in
    the last layer, other tokens get keys and values alone. The last token's hidden state is the
    same to the bit whether "all" is asked for too or not.
    """
    T = tokens_RT.shape[1]
    positions_RT = starts_R[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    last_R = jnp.maximum(lengths_R - 1, 0)
    common = {"attention": attention, "layout": layout}
    written = (table_RM, positions_RT, lengths_R)
    rotation = rope.rotation(cfg, positions_RT)
    x_RTD = transformer.embed(cfg, weights.params, tokens_RT, dtype=pages.dtype, layout=layout)
    *earlier, final = zip(weights.blocks(cfg), weights.layers, pages.layers, strict=True)

    for_all = _layer_function(
        rotation, lambda one: _attend_chunk(one, *written, prefix=prefix, **common), layout
    )
    x_RTD, new_pages = _run(for_all, earlier, x_RTD)
    all_RTD = last_R1D = None
    if "last" in outputs:
        for_last = _layer_function(
            rotation, lambda one: _attend_last(one, *written, last_R, **common), layout, last_R
        )
        last_R1D, (final_pages,) = _run(for_last, [final], x_RTD)
    if "all" in outputs or not outputs:
        all_RTD, (final_pages,) = _run(for_all, [final], x_RTD)
    norm = transformer.definitions(cfg)["norm"].bind(weights.params["norm"])
    hidden = Hidden(*(None if x is None else norm(x) for x in (all_RTD, last_R1D)))
    return hidden, kv_pages.constrain(kv_pages.Pages((*new_pages, final_pages)), layout)


def step(
    cfg: ModelConfig,
    weights: DecodeWeights,
    pages: kv_pages.Pages,
    rows: Rows,
    *,
    attention: Attention | None,
    layout: Layout | None,
) -> tuple[jax.Array, kv_pages.Pages, Rows]:
    """Logits [R, V] after every active row's last token, the pages, and the longer rows."""
    active_R = rows.remaining_B > 0

    def attend(layer: kv_pages.Layer):
        return _attend_one(layer, rows, active_R, attention=attention, layout=layout)

    tokens_R1, positions_R1 = rows.tokens_B[:, None], rows.lengths_B[:, None]
    dtype = pages.dtype
    x_R1D, new_pages = run_layers(
        cfg, weights, pages.layers, tokens_R1, positions_R1, attend, dtype=dtype, layout=layout
    )
    rows = dataclasses.replace(rows, lengths_B=rows.lengths_B + active_R)
    pages = kv_pages.constrain(kv_pages.Pages(new_pages), layout)
    return logits(cfg, weights, x_R1D, layout=layout)[:, 0], pages, rows


def run_layers(
    cfg: ModelConfig,
    weights: DecodeWeights,
    pages: Sequence[kv_pages.Layer | None],
    tokens_RT: jax.Array,
    positions_RT: jax.Array,
    attend: Callable,
    *,
    dtype: jnp.dtype,
    layout: Layout | None,
) -> tuple[jax.Array, tuple]:
    """The final norm's output [R, T, D], and the pages of each layer after it wrote into them.

    `attend` makes a layer's attention from its pages.
    """
    rotation = rope.rotation(cfg, positions_RT)
    x_RTD = transformer.embed(cfg, weights.params, tokens_RT, dtype=dtype, layout=layout)
    layer = _layer_function(rotation, attend, layout)
    layers = zip(weights.blocks(cfg), weights.layers, pages, strict=True)
    x_RTD, new_pages = _run(layer, layers, x_RTD)
    return transformer.definitions(cfg)["norm"].bind(weights.params["norm"])(x_RTD), new_pages


def _layer_function(
    rotation: rope.Rotation,
    attend: Callable,
    layout: Layout | None,
    only_R: jax.Array | None = None,
) -> Callable:
    """A function of one layer's definition, parameters, input and pages -> output, pages.

    Layers with the same definition are traced once, which for 28 of them takes a third of the time.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def layer(
        block: module.Definition, params: dict, x_RTD: jax.Array, pages: kv_pages.Layer | None
    ) -> tuple:
        x_RTD, pages, _ = block.bind(params)(
            x_RTD, rotation=rotation, attend=attend(pages), layout=layout, only_B=only_R
        )
        return x_RTD, pages

    return layer


def _run(layer: Callable, layers: Iterable[tuple], x_RTD: jax.Array) -> tuple[jax.Array, tuple]:
    """The output of the last of `layers` (definition, parameters, pages), and the pages of all."""
    new_pages = []
    for block, params, pages in layers:
        x_RTD, pages = layer(block, params, x_RTD, pages)
        new_pages.append(pages)
    return x_RTD, tuple(new_pages)


def logits(
    cfg: ModelConfig, weights: DecodeWeights, x_RTD: jax.Array, *, layout: Layout | None
) -> jax.Array:
    """Logits [R, T, V], replicated on every device, since drawing needs whole rows."""
    logits_RTV = transformer.unembed(cfg, weights.params, x_RTD, layout=layout)
    # Two steps, since XLA gathers the kernel where replicated logits are asked for at once.
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
    """The rows with one more token each, and the tokens drawn; PAD for rows that had ended."""
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
    """The rows with the drawn tokens in them, and the tokens; PAD for rows that had ended."""
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
    """A context in which float32 products have float32 precision, also on GPUs and TPUs."""
    if dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def _attend_chunk(kv_PSCH, table_RM, positions_RT, lengths_R, *, prefix, attention, layout):
    """One layer's attention for a chunk, whose keys and values it writes into the pages first."""

    def inner(q_RTNH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array):
        written = _write(kv_PSCH, k_RTKH, v_RTKH, table_RM, positions_RT, lengths_R)
        o_RTNH = paged.extend(
            q_RTNH,
            k_RTKH,
            v_RTKH,
            written,
            table_BM=table_RM,
            starts_B=positions_RT[:, 0],
            lengths_B=lengths_R,
            prefix=prefix,
            implementation=attention,
            layout=layout,
        )
        return o_RTNH, written

    return inner


def _attend_last(kv_PSCH, table_RM, positions_RT, lengths_R, last_R, *, attention, layout):
    """One layer's attention, as `_attend_chunk`, for each row's last query alone."""
    ended_R = jnp.where(lengths_R > 0, positions_RT[:, 0] + lengths_R, 0)

    def inner(q_RTNH: jax.Array, k_RTKH: jax.Array, v_RTKH: jax.Array):
        written = _write(kv_PSCH, k_RTKH, v_RTKH, table_RM, positions_RT, lengths_R)
        o_RNH = paged.decode(
            jnp.take_along_axis(q_RTNH, last_R[:, None, None, None], axis=1)[:, 0],
            written,
            table_BM=table_RM,
            lengths_B=ended_R,
            implementation=attention,
            layout=layout,
        )
        return o_RNH[:, None], written

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
    """One layer's attention for one token of each row, whose key and value it writes first."""

    def inner(q_R1NH: jax.Array, k_R1KH: jax.Array, v_R1KH: jax.Array):
        o_RNH, written = paged.append(
            q_R1NH[:, 0],
            k_R1KH[:, 0],
            v_R1KH[:, 0],
            kv_PSCH,
            table_BM=rows.table_BM,
            lengths_B=jnp.where(active_R, rows.lengths_B + 1, 0),
            implementation=attention,
            layout=layout,
        )
        return o_RNH[:, None], written

    return inner
