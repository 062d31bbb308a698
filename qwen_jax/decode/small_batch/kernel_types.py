"""Types that the phases of the layer kernel share: tuning, weights, rows and intermediate arrays.

Letters: R rows, W = K (G + 2) H, X splits of a row's positions; see also `row_products.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from qwen_jax.ops.attention.paged import triton_blocks


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes of the kernel's pieces of work; `benchmarks/decode_kernels.py` compares them.

    programs: at most one for each multiprocessor. launch: all phases as one kernel, or each as its
    own (for the interpreter). qkv, o, gate_up, down: outputs of a tile (gate_up: of either matrix).
    attention: see `triton_blocks`; warps, stages and programs of it are not used here.
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
    """One layer's weights, outputs before inputs; gate_up holds two matrices."""

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
    """Data of R rows that all layers share: RoPE, page table, and lengths with the new token."""

    cos_Rh: jax.Array
    sin_Rh: jax.Array
    table_RM: jax.Array
    lengths_R: jax.Array


jax.tree_util.register_dataclass(Rows, ["cos_Rh", "sin_Rh", "table_RM", "lengths_R"], [])


@dataclass(frozen=True)
class Intermediates:
    """Arrays that one phase writes and the next reads."""

    qkv_RW: jax.Array
    o_RXNH: jax.Array
    lse_RXN: jax.Array
    x_RD: jax.Array
    h_RF: jax.Array


_INTERMEDIATES = ["qkv_RW", "o_RXNH", "lse_RXN", "x_RD", "h_RF"]

jax.tree_util.register_dataclass(Intermediates, _INTERMEDIATES, [])


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Constants of the kernel's code, besides shapes."""

    group: int  # query heads of a key-value head
    head_dim: int
    eps: float
    splits: int


# Two functions: the first loads the first weights or keys, which depend on no other phase; the
# second does the phase's work, given what was loaded.
Phase = tuple[Callable[[], Any], Callable[[Any], None]]
