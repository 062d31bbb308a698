"""What the phases of a layer for few rows share: how work is cut, weights, and what lies between.

Letters: R rows, W = K (G + 2) H, X splits of a row's positions; see also `products.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from qwen_jax.ops.attention.paged import triton_blocks


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the work is cut; `benchmarks/decode_kernels.py` compares.

    programs: at most one a multiprocessor. qkv, o, gate_up, down: outputs of a tile (of gate_up:
    of each of its two). attention: see `paged_blocks`, of which warps, stages and programs are not
    used here.
    """

    programs: int
    launch: Literal["layer", "phase"] = "layer"
    warps: int = 8
    qkv: int = 8
    o: int = 8
    gate_up: int = 8
    down: int = 8
    attention: triton_blocks.Tuning = triton_blocks.Tuning(block=128, min_keys=128)


@dataclass(frozen=True)
class Weights:
    """One layer's, output-major; gate_up holds both."""

    norm_D: jax.Array
    qkv_WD: jax.Array
    bias_W: jax.Array
    o_DC: jax.Array
    post_norm_D: jax.Array
    gate_up_2FD: jax.Array
    down_DF: jax.Array


_WEIGHTS = ["norm_D", "qkv_WD", "bias_W", "o_DC", "post_norm_D", "gate_up_2FD", "down_DF"]

jax.tree_util.register_dataclass(Weights, _WEIGHTS, [])


@dataclass(frozen=True)
class Rows:
    """What all layers share: rotation of each row's position, its pages and its length with it."""

    cos_Rh: jax.Array
    sin_Rh: jax.Array
    table_RM: jax.Array
    lengths_R: jax.Array


jax.tree_util.register_dataclass(Rows, ["cos_Rh", "sin_Rh", "table_RM", "lengths_R"], [])


@dataclass(frozen=True)
class Between:
    """What one phase leaves for the next."""

    qkv_RW: jax.Array
    o_RXNH: jax.Array
    lse_RXN: jax.Array
    x_RD: jax.Array
    h_RF: jax.Array


_BETWEEN = ["qkv_RW", "o_RXNH", "lse_RXN", "x_RD", "h_RF"]

jax.tree_util.register_dataclass(Between, _BETWEEN, [])


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the kernel's code depends on, besides shapes."""

    group: int  # query heads of a key-value head
    head_dim: int
    eps: float
    splits: int


# A phase is two functions: one reads the first weights, or keys, which depend on no other phase;
# the other works with them.
Phase = tuple[Callable[[], Any], Callable[[Any], None]]
