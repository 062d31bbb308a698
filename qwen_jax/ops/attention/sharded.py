"""Attention by kernels that XLA cannot partition: each device runs its own heads and rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from partitioning import sharding
from partitioning.sharding import Layout


def attention(
    kernel: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask,
    layout: Layout,
) -> jax.Array:
    """`kernel(q, k, v, mask=mask)` under `shard_map`: rows over `batch`, heads over `act_heads`.

    Key-value heads that are on every device (`kv_heads=replicated`) are picked to suit the local
    query heads. Whole lengths only: nothing is communicated.
    """
    q_spec = sharding.spec(("batch", None, "act_heads", None), layout)
    kv_spec = sharding.spec(("batch", None, "act_kv_heads", None), layout)
    rows = sharding.spec(("batch", None), layout)
    of_mask = jax.tree.map(
        lambda x: rows if x.ndim == 2 else sharding.spec(("batch",), layout), mask
    )
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]

    def local(q_BTNH, k_BSKH, v_BSKH, mask):
        k_BSKH, v_BSKH = (own_kv_heads(x, N=N, K=K, layout=layout) for x in (k_BSKH, v_BSKH))
        return kernel(q_BTNH, k_BSKH, v_BSKH, mask=mask)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(q_spec, kv_spec, kv_spec, of_mask),
        out_specs=q_spec,
        check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )(q_BTNH, k_BSKH, v_BSKH, mask)


def own_kv_heads(local_BSKH: jax.Array, *, N: int, K: int, layout: Layout) -> jax.Array:
    """Inside `shard_map`: the key-value heads that this device's query heads read.

    Where heads are split and key-value heads are not, query head n reads head n // (N / K): one
    slice if the device's heads share one key-value head, otherwise one head a query head.
    """
    if layout.size("act_kv_heads") == layout.size("act_heads"):
        return local_BSKH
    axes = layout.rules.mesh_axes("act_heads")
    local_N = N // layout.size("act_heads")
    first = jax.lax.axis_index(axes) * local_N
    if (N // K) % local_N == 0:
        return jax.lax.dynamic_slice_in_dim(local_BSKH, first * K // N, 1, axis=2)
    heads = (first + jnp.arange(local_N)) * K // N
    return jnp.take(local_BSKH, heads, axis=2)
