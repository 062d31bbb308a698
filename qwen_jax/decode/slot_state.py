"""What a batch inference engine's device keeps between dispatches: pages, and a row a slot."""

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

NOWHERE = jnp.iinfo(jnp.int32).max  # a slot that does not exist


@dataclass(frozen=True)
class Rows:
    """What the device knows of requests, one a row.

    lengths_B tokens are in the cache, before_B being the last of them; tokens_B was drawn and is
    not there yet. remaining_B tokens may still be drawn: 0 where the row has ended. seen_BV marks
    the prompt's tokens, counts_BV counts the answer's.
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
    """Between two dispatches: all pages, and all slots."""

    pages: kv_pages.Pages
    slots: Rows


jax.tree_util.register_dataclass(State, ["pages", "slots"], [])


@dataclass(frozen=True)
class Chunks:
    """A part of each of R prompts, right-padded to T tokens; rows beyond them have length 0.

    starts_R tokens of each are in the cache already. last_R: whether the prompt ends here; only
    then do slots_R (one that does not exist for a row of padding), max_tokens_R, settings, seen_RW
    (bits of the whole prompt's tokens) and mask_RW matter. next_RT is the token after each.
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
    """`num_slots` slots without a request, of at most `width` pages each, and `num_pages` pages."""
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
    """What `empty` makes, as shapes with their shardings: for devices that are not here."""
    made = jax.eval_shape(functools.partial(empty, cfg, layout=layout, **sizes))

    def placed(x: jax.ShapeDtypeStruct, axes: sharding.Axes) -> jax.ShapeDtypeStruct:
        where = sharding.sharding(axes, layout)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return State(
        jax.tree.map(lambda x: placed(x, kv_pages.AXES[: x.ndim]), made.pages),
        jax.tree.map(lambda x: placed(x, ()), made.slots),
    )


def gather_rows(slots: Rows, slots_R: jax.Array, sampler: sampling.Sampler) -> tuple[Rows, Rows]:
    """The rows of these slots, and what of all slots they were taken from.

    Greedy ones leave what is large, and what they do not read, where it is.
    """
    exists_R = slots_R < slots.lengths_B.shape[0]
    if sampler == "greedy":
        slots = dataclasses.replace(slots, seen_BV=None, counts_BV=None)
    rows = jax.tree.map(lambda x: x.at[slots_R].get(mode="clip"), slots)
    return dataclasses.replace(rows, remaining_B=jnp.where(exists_R, rows.remaining_B, 0)), slots


def scatter_back(whole: Rows, slots: Rows, slots_R: jax.Array, rows: Rows, sampler) -> Rows:
    """All slots, with these rows in their places: the rows of `gather_rows`, changed."""
    slots = scatter_rows(slots, slots_R, rows)
    if sampler == "greedy":
        slots = dataclasses.replace(slots, seen_BV=whole.seen_BV, counts_BV=whole.counts_BV)
    return slots


def scatter_rows(slots: Rows, slots_R: jax.Array, rows: Rows) -> Rows:
    """All slots with these rows; rows of slots that do not exist go nowhere."""
    return jax.tree.map(lambda all_, some: all_.at[slots_R].set(some, mode="drop"), slots, rows)
