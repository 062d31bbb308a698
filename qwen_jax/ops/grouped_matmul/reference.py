"""The grouped product by `jax.lax.ragged_dot`: the definition the other implementations meet.

On a GPU it runs far below the hardware's rate: see `docs/experiments/moe.md`.
"""

import jax
import jax.numpy as jnp


def rows(lhs_MK: jax.Array, rhs_EKN: jax.Array, sizes_E: jax.Array, *, rhs_order: str) -> jax.Array:
    """Products [M, N] of each row with its group's matrix; zeros after the last group.

    `rhs_order="ENK"` takes the matrices transposed, [E, N, K].
    """
    contracted = {"EKN": 1, "ENK": 2}[rhs_order]
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (contracted,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    out_MN = jax.lax.ragged_dot_general(
        lhs_MK, rhs_EKN, sizes_E, numbers, preferred_element_type=jnp.float32
    )
    # ragged_dot does not specify rows after the last group.
    return jnp.where(_in_a_group(sizes_E, M=len(lhs_MK)), out_MN, 0).astype(lhs_MK.dtype)


def outer(lhs_MK: jax.Array, dout_MN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The sum over the rows m of group e of lhs[m]^T dout[m], [E, K, N]."""
    in_a_group_M1 = _in_a_group(sizes_E, M=len(lhs_MK))
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    drhs_EKN = jax.lax.ragged_dot_general(
        jnp.where(in_a_group_M1, lhs_MK, 0),
        jnp.where(in_a_group_M1, dout_MN, 0),
        sizes_E,
        numbers,
        preferred_element_type=jnp.float32,
    )
    return drhs_EKN.astype(lhs_MK.dtype)


def _in_a_group(sizes_E: jax.Array, *, M: int) -> jax.Array:
    """Booleans [M, 1]: the row belongs to a group."""
    return (jnp.arange(M) < jnp.sum(sizes_E))[:, None]
