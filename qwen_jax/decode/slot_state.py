"""The state of a batch inference engine on its device: pages, and one row for each slot."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.decode import sampling
from qwen_jax.ops.attention.paged import kv_pages

NO_SLOT = jnp.iinfo(jnp.int32).max  # a slot that does not exist


@dataclass(frozen=True)
class Rows:
    """The device's data of B requests, one row each.

    lengths_B counts the tokens in the cache, before_B is the last of them, and tokens_B the drawn
    token that is not there yet. generated_B counts the tokens drawn, remaining_B those that may
    still be drawn: 0 where the answer has ended. seen_BV marks the prompt's tokens, counts_BV
    counts the answer's.
    """

    table_BM: jax.Array  # int32: pages in order of position
    lengths_B: jax.Array  # int32
    before_B: jax.Array  # int32
    tokens_B: jax.Array  # int32
    generated_B: jax.Array  # int32
    remaining_B: jax.Array  # int32
    settings: sampling.Settings
    seen_BV: jax.Array  # bool
    counts_BV: jax.Array  # int32


jax.tree_util.register_dataclass(Rows, [field.name for field in dataclasses.fields(Rows)], [])


@dataclass(frozen=True)
class State:
    """All pages and all slots, between two dispatches."""

    pages: kv_pages.Pages
    slots: Rows


jax.tree_util.register_dataclass(State, ["pages", "slots"], [])


@dataclass(frozen=True)
class Chunks:
    """One chunk of each of R prompts, right-padded to T tokens; padding rows have length 0.

    starts_R tokens of each prompt are in the cache already. last_R: whether the chunk ends the
    prompt. Only then are read: slots_R (a slot that does not exist, for padding), max_tokens_R,
    settings, seen_RW (one bit for each token of the whole prompt) and mask_RW (`sampling.draw`).
    next_RT is the token after each position.
    """

    slots_R: jax.Array
    tokens_RT: jax.Array
    starts_R: jax.Array
    lengths_R: jax.Array
    table_RM: jax.Array
    last_R: jax.Array
    max_tokens_R: jax.Array
    settings: sampling.Settings
    seen_RW: jax.Array
    mask_RW: jax.Array
    next_RT: jax.Array


_CHUNKS = ["slots_R", "tokens_RT", "starts_R", "lengths_R", "table_RM", "last_R", "max_tokens_R"]
jax.tree_util.register_dataclass(
    Chunks, [*_CHUNKS, "settings", "seen_RW", "mask_RW", "next_RT"], []
)


def empty(
    cfg: ModelConfig,
    *,
    num_slots: int,
    width: int,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    storage: kv_pages.Storage = "plain",
    layout: Layout | None = None,
) -> State:
    """A state of `num_pages` pages and `num_slots` free slots, of at most `width` pages each."""
    pages = kv_pages.create(
        cfg,
        num_pages=num_pages,
        page_size=page_size,
        dtype=dtype,
        storage=storage,
        layout=layout,
    )

    def zeros(*shape: int, dtype: jnp.dtype = jnp.int32) -> jax.Array:
        return jnp.zeros((num_slots, *shape), dtype)

    slots = Rows(
        table_BM=zeros(width),
        lengths_B=zeros(),
        before_B=zeros(),
        tokens_B=zeros(),
        generated_B=zeros(),
        remaining_B=zeros(),
        settings=jax.tree.map(jnp.asarray, sampling.settings([], num_rows=num_slots)),
        seen_BV=zeros(cfg.vocab_size, dtype=bool),
        counts_BV=zeros(cfg.vocab_size),
    )
    if layout is not None:
        slots = jax.device_put(slots, jax.NamedSharding(layout.mesh, jax.P()))
    return State(pages, slots)


def shapes(cfg: ModelConfig, *, layout: Layout, **sizes) -> State:
    """The shapes and shardings of `empty`'s state, for devices that need not be here."""
    state = jax.eval_shape(functools.partial(empty, cfg, layout=layout, **sizes))

    def placed(x: jax.ShapeDtypeStruct, axes: sharding.Axes) -> jax.ShapeDtypeStruct:
        where = sharding.sharding(axes, layout)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return State(
        jax.tree.map(lambda x: placed(x, kv_pages.AXES[: x.ndim]), state.pages),
        jax.tree.map(lambda x: placed(x, ()), state.slots),
    )


def gather_rows(slots: Rows, slots_R: jax.Array, sampler: sampling.Sampler) -> tuple[Rows, Rows]:
    """The rows of these slots, and the arrays of all slots that they were gathered from.

    The greedy sampler reads neither seen_BV nor counts_BV, both large: they are left out.
    """
    exists_R = slots_R < slots.lengths_B.shape[0]
    if sampler == "greedy":
        slots = dataclasses.replace(slots, seen_BV=None, counts_BV=None)
    rows = jax.tree.map(lambda x: x.at[slots_R].get(mode="clip"), slots)
    return dataclasses.replace(rows, remaining_B=jnp.where(exists_R, rows.remaining_B, 0)), slots


def scatter_back(whole: Rows, slots: Rows, slots_R: jax.Array, rows: Rows, sampler) -> Rows:
    """All slots, with the changed rows of `gather_rows` in their places."""
    slots = scatter_rows(slots, slots_R, rows)
    if sampler == "greedy":
        slots = dataclasses.replace(slots, seen_BV=whole.seen_BV, counts_BV=whole.counts_BV)
    return slots


def scatter_rows(slots: Rows, slots_R: jax.Array, rows: Rows) -> Rows:
    """All slots with these rows in their places; rows of slots that do not exist are dropped."""
    return jax.tree.map(lambda all_, new: all_.at[slots_R].set(new, mode="drop"), slots, rows)
