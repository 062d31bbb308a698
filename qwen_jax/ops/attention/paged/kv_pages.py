"""The paged KV cache: memory that requests share, allocated a page at a time.

A page holds `page_size` positions of one layer's keys and values. A row's page table names its
pages in the order of positions: position p lies on the page of entry p // page_size. All layers use
the same page table. Entries beyond a row's positions never reach a result, but must name a page.

Pages may hold int8, with a float32 scale for each key and each value of a head. A token is
quantised once, when it is written, whatever else its page holds, so that results do not depend on
the chunks of a prompt. The scale adds 4 bytes to a head's H. The error of attention over random
keys and values is 0.8%; float8 e4m3 in the same bytes gave 3.2% and is therefore not offered.

Within a page, the key and the value of one head are neighbours (channels 2i and 2i + 1), as JAX's
kernel for TPU requires, and each position is contiguous. Letters beyond `qwen_jax/model/module.py`:
P pages, S positions of a page, C = 2 K, M pages of a row.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout

AXES = (None, None, "act_kv_heads", "head_dim")

LANES = 128  # a TPU's vector width, to which it pads an array's last dimension anyway

Storage = Literal["plain", "int8"]


@dataclass(frozen=True)
class Quantised:
    """One layer's int8 pages: they stand for values_PSCH * scales_PSC, computed with in `dtype`."""

    values_PSCH: jax.Array  # int8
    scales_PSC: jax.Array  # float32
    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values, [P, S, 2K, H]."""
        return self.values_PSCH.shape


jax.tree_util.register_dataclass(Quantised, ["values_PSCH", "scales_PSC"], ["dtype"])

Layer = jax.Array | Quantised


@dataclass(frozen=True)
class Pages:
    """The pages of all layers: an array [P, S, 2K, H] for each layer, or a `Quantised`."""

    layers: tuple[Layer, ...]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype in which keys and values are computed with."""
        return self.layers[0].dtype

    @property
    def num_pages(self) -> int:
        """Number of pages (P)."""
        return self.layers[0].shape[0]

    @property
    def page_size(self) -> int:
        """Number of positions of a page (S)."""
        return self.layers[0].shape[1]


jax.tree_util.register_dataclass(Pages, ["layers"], [])


def create(
    cfg: ModelConfig,
    *,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    storage: Storage = "plain",
    layout: Layout | None = None,
) -> Pages:
    """Pages of zeros, created on their devices; `dtype` is that of the arithmetic.

    Raises `ValueError` if kv heads do not divide by their mesh axes, or for int8 on a TPU.
    """
    platform = sharding.platform(layout)
    if storage not in ("plain", "int8"):
        raise ValueError(f"storage={storage!r} is unknown; known: plain, int8")
    if storage == "int8" and platform == "tpu":
        raise ValueError(
            "storage='int8': JAX's kernel for TPU takes no scale for each position; use "
            "storage='plain'"
        )
    K = cfg.num_key_value_heads
    if layout is not None:
        sharding.check_divisible((K,), ("act_kv_heads",), layout, what="pages")
    shape = (num_pages, page_size, 2 * K, width(cfg, platform))
    return _create(cfg.num_hidden_layers, shape, jnp.dtype(dtype), storage, layout)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _create(
    num_layers: int, shape: tuple[int, ...], dtype: jnp.dtype, storage: Storage, layout
) -> Pages:
    def layer() -> Layer:
        if storage == "plain":
            return jnp.zeros(shape, dtype)
        scales_PSC = jnp.zeros(shape[:3], jnp.float32)
        return Quantised(jnp.zeros(shape, jnp.int8), scales_PSC, dtype)

    return constrain(Pages(tuple(layer() for _ in range(num_layers))), layout)


def width(cfg: ModelConfig, platform: str) -> int:
    """Head size of the pages: a TPU's kernel takes multiples of 128 only."""
    return -(-cfg.head_dim // LANES) * LANES if platform == "tpu" else cfg.head_dim


def constrain(pages: Pages, layout: Layout | None) -> Pages:
    """The pages with their sharding constrained; unchanged without a layout."""
    if layout is None:
        return pages
    return jax.tree.map(lambda x: sharding.constrain(x, AXES[: x.ndim], layout), pages)


def specs(kv_PSCH: Layer, layout: Layout) -> Layer:
    """PartitionSpecs of one layer's arrays, for `shard_map`."""
    return jax.tree.map(lambda x: sharding.spec(AXES[: x.ndim], layout), kv_PSCH)


def num_bytes(
    cfg: ModelConfig,
    *,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    storage: Storage = "plain",
    layout: Layout | None = None,
) -> int:
    """Number of bytes of all layers' pages on one device."""
    num_shards = 1 if layout is None else layout.size("act_kv_heads")
    H = width(cfg, sharding.platform(layout))
    bytes_per_head = H * jnp.dtype(dtype).itemsize if storage == "plain" else H + 4
    heads = 2 * cfg.num_key_value_heads // num_shards
    return cfg.num_hidden_layers * num_pages * page_size * heads * bytes_per_head


def write(
    kv_PSCH: Layer,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    table_BM: jax.Array,
    positions_BT: jax.Array,
    valid_BT: jax.Array,
) -> Layer:
    """One layer's pages with these keys and values written to their rows' positions.

    Donated pages are updated in place. Positions that are not valid, or beyond the row's pages, are
    dropped. No two rows may write to one place of a page: rows do not write to a page they share.
    """
    P, S = kv_PSCH.shape[:2]
    valid_BT &= positions_BT < table_BM.shape[1] * S
    page_BT = jnp.take_along_axis(table_BM, positions_BT // S, axis=1, mode="clip")
    page_BT = jnp.where(valid_BT, page_BT, P)  # page P does not exist, so the write is dropped
    new_BTCH = _interleave(k_BTKH, v_BTKH, width=kv_PSCH.shape[3])
    if isinstance(kv_PSCH, Quantised):
        new = quantise(new_BTCH, dtype=kv_PSCH.dtype)
    else:
        new = new_BTCH.astype(kv_PSCH.dtype)
    return jax.tree.map(
        lambda old, x: old.at[page_BT, positions_BT % S].set(x, mode="drop", unique_indices=True),
        kv_PSCH,
        new,
    )


def quantise(x_BTCH: jax.Array, *, dtype: jnp.dtype) -> Quantised:
    """The array rounded to int8, with 127 for the largest of each head's H values."""
    x_BTCH = x_BTCH.astype(jnp.float32)
    scales_BTC = jnp.max(jnp.abs(x_BTCH), axis=-1) / 127
    whole_BTCH = jnp.round(x_BTCH / jnp.where(scales_BTC > 0, scales_BTC, 1)[..., None])
    return Quantised(whole_BTCH.astype(jnp.int8), scales_BTC, dtype)


def gather(
    kv_PSCH: Layer, table_BM: jax.Array, *, H: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Keys and values, [B, M S, K, H] each, of the page table's pages in its order.

    H: the model's head size, which drops the padding that `width` added.
    """
    B, M = table_BM.shape
    _, S, C, _ = kv_PSCH.shape
    kv = jax.tree.map(lambda x: jnp.take(x, table_BM, axis=0, mode="clip"), kv_PSCH)
    kv_BMSCH = _dequantise(kv) if isinstance(kv, Quantised) else kv
    kv_BSK2H = kv_BMSCH.reshape(B, M * S, C // 2, 2, -1)[..., :H]
    return kv_BSK2H[:, :, :, 0], kv_BSK2H[:, :, :, 1]


def _dequantise(kv: Quantised) -> jax.Array:
    """The values that the int8 values and scales stand for."""
    return (kv.values_PSCH.astype(jnp.float32) * kv.scales_PSC[..., None]).astype(kv.dtype)


def _interleave(k_BTKH: jax.Array, v_BTKH: jax.Array, *, width: int) -> jax.Array:
    """Each head's key and value, [B, T, 2K, width], padded with zeros to `width`."""
    B, T, K, H = k_BTKH.shape
    kv_BTK2H = jnp.stack([k_BTKH, v_BTKH], axis=3)
    padding = [(0, 0)] * 4 + [(0, width - H)]
    return jnp.pad(kv_BTK2H, padding).reshape(B, T, 2 * K, width)
