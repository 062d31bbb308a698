"""Attention over the mesh's `context` axis: rows whose tokens are spread over devices.

| variant | order of tokens | moves, per layer and device | whole on a device |
| --- | --- | --- | --- |
| ring | zigzag | keys and values, n - 1 hops, beside the blocks' arithmetic | - |
| all_gather | zigzag | keys and values, once, before the arithmetic | k, v of the sequence |
| ulysses | of the sequence | q, k, v and o, by all-to-all | q, k, v, o of 1/n of the heads |

The backward pass moves the same arrays again, and their gradients.
"""

import dataclasses

import jax

from partitioning import ring, sharding
from partitioning.sharding import Layout
from qwen_jax.ops.attention import sharded

VARIANTS = ("ring", "all_gather", "ulysses")
# With so many tokens a device or more, a hop is shorter than the arithmetic beside it, on v5p's and
# v6e's links and on NVLink: c tokens a chunk take 8 c K H bytes and 8 c^2 N H operations, so
# c > (FLOP/s / bytes/s) K / N.
RING_TOKENS = 2048


def choose(variant: str, *, length: int, layout: Layout) -> str | None:
    """The variant, with `auto` replaced; None if `length` is not spread over devices.

    auto: `ring` from 2,048 tokens a device on, else `all_gather`. `ulysses` is only taken by name:
    it needs heads that divide, and balances no better.
    Raises `ValueError` for an unknown variant, or if the length does not divide.
    """
    if variant not in ("auto", *VARIANTS):
        raise ValueError(
            f"unknown context_parallel {variant!r}; known: auto, {', '.join(VARIANTS)}"
        )
    n = layout.size("length")
    if n == 1:
        return None
    if variant == "auto":
        variant = "ring" if length // n >= RING_TOKENS else "all_gather"
    if is_zigzag(variant):
        ring.check_length(length, n)
    elif length % n:
        raise ValueError(
            f"sequence length {length} is not divisible by context={n}; use a multiple of {n}"
        )
    return variant


def is_zigzag(variant: str | None) -> bool:
    """Whether the variant takes tokens in zigzag order rather than in the sequence's order."""
    return variant in ("ring", "all_gather")


def arrange(x_BT: jax.Array, variant: str | None, *, layout: Layout | None) -> jax.Array:
    """The array [B, T], given in sequence order, in the order that the variant takes."""
    return ring.zigzag(x_BT, layout) if is_zigzag(variant) else x_BT


def attention(
    variant: str,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    mask,
    kernel,
    blocks,
    layout: Layout,
) -> jax.Array:
    """Attention as in `qwen_jax.ops.attention.api.attention`, over the `context` axis.

    `kernel` computes whole sequences (ulysses), `blocks` blocks of keys (ring, all_gather).

    Raises `ValueError` for masks other than causal (with segments), and for heads that ulysses
    cannot spread.
    """
    if not mask.causal or mask.lengths_B is not None:
        raise ValueError(
            f"context_parallel={variant} computes causal attention with segment ids, not "
            f"causal={mask.causal} with lengths; use a mesh with context=1"
        )
    N, K = q_BTNH.shape[2], k_BTKH.shape[2]
    (axis,) = layout.rules.mesh_axes("length")

    def local(q_BTNH, k_BTKH, v_BTKH, ids_BT):
        k_BTKH, v_BTKH = (
            sharded.own_kv_heads(x, N=N, K=K, layout=layout) for x in (k_BTKH, v_BTKH)
        )
        if variant == "ulysses":
            rows = dataclasses.replace(mask, segment_ids_BT=ids_BT)
            return _ulysses(kernel, axis, q_BTNH, k_BTKH, v_BTKH, mask=rows)
        return ring.attention(variant, blocks, axis, q_BTNH, k_BTKH, v_BTKH, ids_BT)

    q_spec = sharding.spec(("batch", "length", "act_heads", None), layout)
    kv_spec = sharding.spec(("batch", "length", "act_kv_heads", None), layout)
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(q_spec, kv_spec, kv_spec, sharding.spec(("batch", "length"), layout)),
        out_specs=q_spec,
        check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )(q_BTNH, k_BTKH, v_BTKH, mask.segment_ids_BT)


def _ulysses(kernel, axis: str, q_BTNH, k_BTKH, v_BTKH, *, mask) -> jax.Array:
    """Outputs [B, T_X, N, H]: [B, T_X, N, H] -> all-to-all -> [B, T, N_X, H], attention, and back.

    arXiv 2309.14509.

    Raises `ValueError` unless the device's heads spread over `context` too.
    """
    n = jax.lax.axis_size(axis)
    for name, heads in (("query", q_BTNH.shape[2]), ("key-value", k_BTKH.shape[2])):
        if heads % n:
            raise ValueError(
                f"context_parallel=ulysses spreads heads over context={n} devices, but each has "
                f"{heads} {name} heads; use context_parallel=ring, or a context axis that divides "
                f"{heads}"
            )

    def whole_rows(x_BTNH):
        return jax.lax.all_to_all(x_BTNH, axis, split_axis=2, concat_axis=1, tiled=True)

    if mask.segment_ids_BT is not None:
        ids_BT = jax.lax.all_gather(mask.segment_ids_BT, axis, axis=1, tiled=True)
        mask = dataclasses.replace(mask, segment_ids_BT=ids_BT)
    o_BTNH = kernel(*map(whole_rows, (q_BTNH, k_BTKH, v_BTKH)), mask=mask)
    return jax.lax.all_to_all(o_BTNH, axis, split_axis=1, concat_axis=2, tiled=True)
