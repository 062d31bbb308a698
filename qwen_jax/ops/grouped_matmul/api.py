"""The matrix product whose rows belong to groups, each with its own matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from partitioning import sharding
from qwen_jax.ops import registry
from qwen_jax.ops.grouped_matmul import hopper, megablox, reference

# Each module computes two products, which are also each other's derivatives:
#   rows(lhs_MK, rhs_EKN, sizes_E, rhs_order="EKN" or "ENK") -> out_MN
#   outer(lhs_MK, dout_MN, sizes_E) -> drhs_EKN
# By name, a kernel is also traced where its platform is not: a program is compiled for TPUs on
# machines that have none, and Pallas's interpreters run on CPUs.
GROUPED_MATMUL = registry.Operation(
    "grouped_matmul",
    (
        registry.Implementation(
            name="hopper",
            platforms=("gpu",),
            unsupported=hopper.unsupported,
            elsewhere="by name",
            compute=hopper,
        ),
        registry.Implementation(
            name="megablox",
            platforms=("tpu",),
            unsupported=megablox.unsupported,
            elsewhere="by name",
            compute=megablox,
        ),
        registry.Implementation(name="reference", compute=reference),
    ),
)


def grouped_matmul(
    lhs_MK: jax.Array,
    rhs_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: str | None = None,
    platform: str | None = None,
) -> jax.Array:
    """Products out[m] = lhs[m] rhs[e], [M, N], where e is the group of row m.

    The first group_sizes[0] rows are of group 0, and so on. Rows after sum(group_sizes) give zeros
    and have zero gradients; a group may be empty. The sum must not exceed M; it is data, so nothing
    checks it. Both operands have one dtype, which is also the result's; products are summed in
    float32 and rounded once, in the gradients too:

        dlhs[m] = dout[m] rhs[e]^T
        drhs[e] = sum over the rows m of group e of lhs[m]^T dout[m]

    Inside `shard_map` it multiplies this device's rows and experts.

    `implementation=None` chooses for `platform`, by default that of JAX's default backend. Raises
    `ValueError` for a named implementation that cannot run, and for shapes and dtypes that do not
    fit together.
    """
    _check(lhs_MK, rhs_EKN, group_sizes_E)
    platform = platform or sharding.platform(None)
    chosen = GROUPED_MATMUL.choose(lhs_MK, rhs_EKN, platform=platform, name=implementation)
    return _product(chosen.name, lhs_MK, rhs_EKN, group_sizes_E.astype(jnp.int32))


def _check(lhs_MK: jax.Array, rhs_EKN: jax.Array, group_sizes_E: jax.Array) -> None:
    """Raises `ValueError` for shapes and dtypes that do not fit together."""
    shapes = f"lhs {lhs_MK.shape}, rhs {rhs_EKN.shape}, group_sizes {group_sizes_E.shape}"
    if (lhs_MK.ndim, rhs_EKN.ndim, group_sizes_E.ndim) != (2, 3, 1):
        raise ValueError(f"lhs [M, K], rhs [E, K, N] and group_sizes [E] are wanted: {shapes}")
    if lhs_MK.shape[1] != rhs_EKN.shape[1] or rhs_EKN.shape[0] != group_sizes_E.shape[0]:
        raise ValueError(f"lhs [M, K], rhs [E, K, N] and group_sizes [E] do not agree: {shapes}")
    if lhs_MK.dtype != rhs_EKN.dtype:
        raise ValueError(f"lhs is {lhs_MK.dtype}, rhs {rhs_EKN.dtype}; cast one of them")
    if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(f"group_sizes is {group_sizes_E.dtype}, not an integer type")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(implementation, lhs_MK, rhs_EKN, sizes_E):
    """Products [M, N] by the named implementation; int32 group sizes."""
    products = GROUPED_MATMUL[implementation].compute
    return products.rows(lhs_MK, rhs_EKN, sizes_E, rhs_order="EKN")


def _forward(implementation, lhs_MK, rhs_EKN, sizes_E):
    return _product(implementation, lhs_MK, rhs_EKN, sizes_E), (lhs_MK, rhs_EKN, sizes_E)


def _backward(implementation, residuals, dout_MN):
    lhs_MK, rhs_EKN, sizes_E = residuals
    products = GROUPED_MATMUL[implementation].compute
    dlhs_MK = products.rows(dout_MN, rhs_EKN, sizes_E, rhs_order="ENK")
    drhs_EKN = products.outer(lhs_MK, dout_MN, sizes_E)
    return dlhs_MK, drhs_EKN, np.zeros(sizes_E.shape, jax.dtypes.float0)


_product.defvjp(_forward, _backward)
