"""One name for attention, many implementations: what is masked, and who computes it."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from partitioning import ring
from partitioning.sharding import Layout
from qwen_jax.ops.attention import context_parallelism, cudnn, reference, sharded, splash


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: all that hold for (query t, key s).

    causal: s <= t, counted from the sequence's start.
    segment_ids_BT: equal segments only (packed documents; 0 is padding).
    lengths_B: s < length, for right-padded rows. What queries t >= length get is not specified:
        some implementations give zeros, others attend to the keys before the padding.
    """

    causal: bool = True
    segment_ids_BT: jax.Array | None = None
    lengths_B: jax.Array | None = None


jax.tree_util.register_dataclass(Mask, ["segment_ids_BT", "lengths_B"], ["causal"])

Implementation = Callable[..., jax.Array]

IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": reference.attention,
    "cudnn": cudnn.attention,
    "splash": splash.attention,
}

# The same, over blocks of keys, for `context_parallel`.
BLOCKS: dict[str, ring.Blocks] = {
    "reference": ring.Blocks(reference.block_forward, reference.block_backward),
    "cudnn": ring.Blocks(cudnn.block_forward, cudnn.block_backward),
    "splash": ring.Blocks(splash.block_forward, splash.block_backward),
}


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
    """softmax(q k^T / sqrt(H)) v with grouped query heads -> [B, T, N, H], in q's dtype.

    `context_parallel` is how rows that are spread over devices meet: a name of
    `qwen_jax/ops/attention/context_parallelism.py`, which says in which order their tokens are.

    `implementation=None` takes the best that can run on the layout's devices, or without a layout
    on JAX's default backend; a named one that cannot raises `ValueError`.
    """
    platform = jax.default_backend() if layout is None else layout.platform
    name = choose(q_BTNH, platform=platform) if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown attention implementation {name!r}; known: {', '.join(IMPLEMENTATIONS)}"
        )
    reason = why_not(name, q_BTNH, platform=platform)
    if reason is not None:
        raise ValueError(f"attention implementation {name!r} cannot run: {reason}")
    kernel = IMPLEMENTATIONS[name]
    if context_parallel is not None and layout is not None and layout.size("length") > 1:
        return context_parallelism.attention(
            context_parallel,
            q_BTNH,
            k_BSKH,
            v_BSKH,
            mask=mask,
            kernel=kernel,
            blocks=BLOCKS[name],
            layout=layout,
        )
    if name == "reference" or layout is None or layout.mesh.size == 1:
        return kernel(q_BTNH, k_BSKH, v_BSKH, mask=mask)
    return sharded.attention(kernel, q_BTNH, k_BSKH, v_BSKH, mask=mask, layout=layout)


def choose(q_BTNH: jax.Array, *, platform: str) -> str:
    """The best implementation on `platform`: splash on TPU, cuDNN on GPU where it fits."""
    return next(
        (name for name in ("splash", "cudnn") if why_not(name, q_BTNH, platform=platform) is None),
        "reference",
    )


def why_not(name: str, q_BTNH: jax.Array, *, platform: str) -> str | None:
    """Why the implementation cannot run this call on `platform`, or None if it can."""
    if name == "splash":
        return splash.why_not(platform)
    if name == "cudnn":
        wrong = None if platform == "gpu" else f"platform {platform!r} is not 'gpu'"
        return cudnn.why_not(q_BTNH) or wrong
    return None
