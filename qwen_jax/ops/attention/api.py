"""Attention over whole sequences: its mask, its implementations and the choice among them."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from partitioning import ring, sharding
from partitioning.sharding import Layout
from qwen_jax.ops import registry
from qwen_jax.ops.attention import context_parallelism, cudnn, reference, sharded, splash


@dataclass(frozen=True)
class Mask:
    """The conditions under which query t sees key s; all that are given must hold.

    causal: s <= t, counted from the sequence's start.
    segment_ids_BT: equal ids (packed documents; 0 is padding).
    lengths_B: s < length, for right-padded rows. The outputs of queries t >= length are not
        specified: some implementations give zeros, others attend to the keys before the padding.
    """

    causal: bool = True
    segment_ids_BT: jax.Array | None = None
    lengths_B: jax.Array | None = None


jax.tree_util.register_dataclass(Mask, ["segment_ids_BT", "lengths_B"], ["causal"])


@dataclass(frozen=True)
class Kernels:
    """One implementation's function over whole sequences, and its blocks for `context_parallel`."""

    whole: Callable[..., jax.Array]
    blocks: ring.Blocks


ATTENTION = registry.Operation(
    "attention",
    (
        registry.Implementation(
            name="splash",
            platforms=("tpu",),
            compute=Kernels(
                splash.attention, ring.Blocks(splash.block_forward, splash.block_backward)
            ),
        ),
        registry.Implementation(
            name="cudnn",
            platforms=("gpu",),
            unsupported=cudnn.unsupported,
            compute=Kernels(
                cudnn.attention, ring.Blocks(cudnn.block_forward, cudnn.block_backward)
            ),
        ),
        registry.Implementation(
            name="reference",
            compute=Kernels(
                reference.attention, ring.Blocks(reference.block_forward, reference.block_backward)
            ),
        ),
    ),
)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask,
    implementation: str | None = None,
    context_parallel: str | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """Attention outputs softmax(q k^T / sqrt(H)) v, [B, T, N, H] in q's dtype.

    N query heads share K key-value heads, N / K each.

    `context_parallel` is a variant of `context_parallelism.py`, for sequences that are spread over
    devices; the variant says in which order their tokens are.

    `implementation=None` chooses for the layout's platform, or without a layout for JAX's default
    backend. Raises `ValueError` for a named implementation that cannot run.
    """
    platform = sharding.platform(layout)
    chosen = ATTENTION.choose(q_BTNH, platform=platform, name=implementation)
    kernel = chosen.compute.whole
    if context_parallel is not None and layout is not None and layout.size("length") > 1:
        return context_parallelism.attention(
            context_parallel,
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask=mask,
            kernel=kernel,
            blocks=chosen.compute.blocks,
            layout=layout,
        )
    if chosen.name == "reference" or layout is None or layout.mesh.size == 1:
        return kernel(q_BTNH, k_BSKH, v_BSKH, mask=mask)
    return sharded.attention(kernel, q_BTNH, k_BSKH, v_BSKH, mask=mask, layout=layout)
