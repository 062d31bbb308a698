"""The models and devices that the kernels of this folder serve."""

import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from partitioning.sharding import Layout

MOST_INPUTS = 1024  # hidden size: larger models were not measured


def unsupported(
    cfg: ModelConfig, *, dtype: jnp.dtype, layout: Layout | None, platform: str
) -> str | None:
    """The reason why the kernels can never run for this model; None where they can."""
    if platform != "gpu":
        return f"platform {platform!r} is not 'gpu'"
    if layout is not None:
        return "there is a mesh"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"arithmetic is {jnp.dtype(dtype).name}, not bfloat16"
    if cfg.moe is not None or cfg.dual_chunk_attention is not None:
        return "only dense models with plain attention"
    if cfg.hidden_size > MOST_INPUTS:
        return f"hidden_size {cfg.hidden_size} is above {MOST_INPUTS}"
    return None
