"""The key-value cache: an explicit pytree, updated in place inside jit where it is donated.

Heads come before positions, so that one head's keys lie together: attention over the cache is then
a batch of plain matrix products, and a TPU pads positions to its tile, not the few kv heads.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from configs import schema
from partitioning import sharding
from partitioning.sharding import Layout

AXES = ("layers", "batch", "act_kv_heads", "cache_length", "head_dim")

# All layers in one array [L, B, K, S, H], or a tuple with one [B, K, S, H] a layer.
Side = jax.Array | tuple[jax.Array, ...]


@dataclass(frozen=True)
class Cache:
    """Keys and values of `lengths_B` tokens a slot; what lies beyond a slot's length is never read.

    Its form follows the parameters': stacked layers, stacked cache; a tuple of layers, a tuple.
    """

    k_LBKSH: Side
    v_LBKSH: Side
    lengths_B: jax.Array  # int32

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of keys and values, and of decoding's arithmetic."""
        return jax.tree.leaves(self.k_LBKSH)[0].dtype

    @property
    def num_slots(self) -> int:
        """Sequences it holds (B)."""
        return self.lengths_B.shape[0]

    @property
    def length(self) -> int:
        """Positions of a slot (S)."""
        return jax.tree.leaves(self.k_LBKSH)[0].shape[-2]


jax.tree_util.register_dataclass(Cache, ["k_LBKSH", "v_LBKSH", "lengths_B"], [])


def create(
    cfg: schema.Model,
    *,
    num_slots: int,
    length: int,
    dtype: jnp.dtype,
    stacked: bool = True,
    layout: Layout | None = None,
) -> Cache:
    """An empty cache, made where it will live. `stacked` as the parameters' layers are.

    Raises `ValueError` if slots or kv heads do not divide by their mesh axes.
    """
    L, K, H = cfg.num_hidden_layers, cfg.num_key_value_heads, cfg.head_dim
    if layout is not None:
        shape = (L, num_slots, K, length, H)
        sharding.check_divisible(shape, AXES, layout, what="key-value cache")
    return _create(L, (num_slots, K, length, H), jnp.dtype(dtype), stacked, layout)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _create(
    L: int, shape: tuple[int, ...], dtype: jnp.dtype, stacked: bool, layout: Layout | None
) -> Cache:
    def side() -> Side:
        if stacked:
            return jnp.zeros((L, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(L))

    return constrain(Cache(side(), side(), jnp.zeros(shape[:1], jnp.int32)), layout)


def constrain(cache: Cache, layout: Layout | None) -> Cache:
    """`cache` with its sharding fixed; unchanged where there is no layout."""

    def side(value: Side) -> Side:
        if isinstance(value, tuple):
            return tuple(sharding.constrain(x, AXES[1:], layout) for x in value)
        return sharding.constrain(value, AXES, layout)

    lengths_B = sharding.constrain(cache.lengths_B, ("batch",), layout)
    return Cache(side(cache.k_LBKSH), side(cache.v_LBKSH), lengths_B)


def num_bytes(cfg: schema.Model, *, num_slots: int, length: int, dtype: jnp.dtype) -> int:
    """Bytes of a cache's keys and values over all devices."""
    positions = cfg.num_hidden_layers * num_slots * length
    heads = 2 * cfg.num_key_value_heads * cfg.head_dim
    return positions * heads * jnp.dtype(dtype).itemsize


def read(side: Side, layer: jax.Array | int) -> jax.Array:
    """One layer's keys or values, [B, K, S, H]."""
    return side[layer]


def write_prompt(side: Side, layer: jax.Array | int, x_BTKH: jax.Array) -> Side:
    """`side` with positions 0..T-1 of every slot of one layer replaced."""
    x_BKTH = x_BTKH.swapaxes(1, 2)
    T = x_BKTH.shape[2]
    if isinstance(side, tuple):
        return _replace(side, layer, side[layer].at[:, :, :T].set(x_BKTH))
    return side.at[layer, :, :, :T].set(x_BKTH)


def write_token(
    side: Side, layer: jax.Array | int, x_BKH: jax.Array, positions_B: jax.Array
) -> Side:
    """`side` with one position of every slot of one layer replaced; one past the end is dropped."""
    rows_B = jnp.arange(x_BKH.shape[0])
    options = {"mode": "drop", "unique_indices": True}
    if isinstance(side, tuple):
        updated = side[layer].at[rows_B, :, positions_B].set(x_BKH, **options)
        return _replace(side, layer, updated)
    return side.at[layer, rows_B, :, positions_B].set(x_BKH, **options)


def _replace(side: tuple[jax.Array, ...], layer: int, value: jax.Array) -> tuple[jax.Array, ...]:
    return (*side[:layer], value, *side[layer + 1 :])
