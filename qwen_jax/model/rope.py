"""Rotary position embedding (arXiv 2104.09864) with an adjusted base (ABF) and YaRN."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from configs.models.architecture import ModelConfig, YarnConfig


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines [B, T, H/2] in float32, YaRN's attention factor included."""

    cos_BTh: jax.Array
    sin_BTh: jax.Array


jax.tree_util.register_dataclass(Rotation, ["cos_BTh", "sin_BTh"], [])


def frequencies(cfg: ModelConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies [H/2] in float32, and the factor on cos and sin (1 without YaRN).

    f_i = theta^(-2i/d). YaRN (arXiv 2309.00071, section 3.2) divides by `factor` the frequencies
    of fewer than beta_slow rotations within the original length, keeps those of more than beta_fast
    rotations, and blends in between. Rounding follows transformers' `modeling_rope_utils.py`
    step by step: beyond 100,000 tokens one unit in the last place of f is a visible angle.
    """
    d = cfg.head_dim
    exponent = np.arange(0, d, 2, dtype=np.int64).astype(np.float32) / np.float32(d)
    # float64 island: rounded once, so correctly; numpy's own float32 power is an ulp off in places.
    power = np.power(np.float64(cfg.rope_theta), exponent.astype(np.float64)).astype(np.float32)
    base = np.float32(1.0) / power
    yarn = cfg.rope_scaling
    if yarn is None:
        return base, 1.0

    def dim_of(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return d * math.log(turns) / (2 * math.log(cfg.rope_theta))

    low, high = dim_of(yarn.beta_fast), dim_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001  # as the paper's code: no division by zero
    ramp = np.clip(
        (np.arange(d // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1
    )
    keep = np.float32(1.0) - ramp
    stretched = np.float32(1.0) / (np.float32(yarn.factor) * power)
    blended = stretched * (np.float32(1.0) - keep) + base * keep
    return blended.astype(np.float32), attention_factor(yarn)


def attention_factor(yarn: YarnConfig) -> float:
    """YaRN's factor on cos and sin, so that logits gain its square (section 3.4)."""

    def get_mscale(factor: float, mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return get_mscale(yarn.factor, yarn.mscale) / get_mscale(yarn.factor, yarn.mscale_all_dim)
    return get_mscale(yarn.factor)


def rotation(cfg: ModelConfig, positions_BT: jax.Array) -> Rotation:
    """Cosines and sines at these positions, the same for every layer."""
    inverse, factor = frequencies(cfg)
    # float32 island: bfloat16 cannot tell position 257 from 256.
    angles = positions_BT.astype(jnp.float32)[:, :, None] * jnp.asarray(inverse)[None, None, :]
    return Rotation(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Heads after RoPE, in Hugging Face's half-split convention: pairs are (i, i + H/2)."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation.cos_BTh[:, :, None, :], rotation.sin_BTh[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
