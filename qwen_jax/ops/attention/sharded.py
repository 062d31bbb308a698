"""Attention on a mesh by kernels that XLA cannot partition: each device has its heads and rows."""

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
    """Outputs [B, T, N, H] of `kernel(q, k, v, mask=mask)` under `shard_map`.

    Rows are spread over `batch`, heads over `act_heads`.

    Of key-value heads that are on every device (`kv_heads=replicated`), each device takes those of
    its query heads. Sequences are whole on a device; nothing is communicated.
    """
    q_spec = sharding.spec(("batch", None, "act_heads", None), layout)
    kv_spec = sharding.spec(("batch", None, "act_kv_heads", None), layout)
    rows = sharding.spec(("batch", None), layout)
    mask_specs = jax.tree.map(
        lambda x: rows if x.ndim == 2 else sharding.spec(("batch",), layout), mask
    )
    N, K = q_BTNH.shape[2], k_BSKH.shape[2]

    def local(q_BTNH, k_BSKH, v_BSKH, mask):
        k_BSKH, v_BSKH = (own_kv_heads(x, N=N, K=K, layout=layout) for x in (k_BSKH, v_BSKH))
        return kernel(q_BTNH, k_BSKH, v_BSKH, mask=mask)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(q_spec, kv_spec, kv_spec, mask_specs),
        out_specs=q_spec,
        check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )(q_BTNH, k_BSKH, v_BSKH, mask)


def own_kv_heads(local_BSKH: jax.Array, *, N: int, K: int, layout: Layout) -> jax.Array:
    """The key-value heads that this device's query heads read; called inside `shard_map`.

    If query heads are spread and key-value heads are not, query head n reads head n // (N / K): one
    slice if the device's query heads share one key-value head, otherwise one head a query head.
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
