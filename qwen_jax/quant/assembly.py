"""PTX with several results inside a Pallas kernel that Triton lowers.

JAX's own `triton.elementwise_inline_asm` takes several results but lowers only one (0.10.2 and
0.11.2): it gives them as a list in a list. Here they are taken out of it.
"""

from collections.abc import Sequence

import jax
from jax.extend import core

try:
    from jax._src.pallas.triton import lowering, primitives
except ImportError:  # a JAX that has moved them: `why_not` says so
    lowering = primitives = None


def why_not() -> str | None:
    """Why kernels with such PTX cannot be lowered by this JAX; None if they can."""
    found = hasattr(primitives, "_elementwise_inline_asm_lowering")
    return None if found else f"JAX {jax.__version__} lowers PTX in kernels in a way of its own"


def call(
    text: str, arguments: Sequence[jax.Array], *, constraints: str, like: Sequence[jax.Array]
) -> list[jax.Array]:
    """What each thread makes of its elements of the arguments: arrays like `like`.

    constraints: LLVM's, the results' first.
    """
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like)
    return _several_p.bind(
        *arguments, asm=text, constraints=constraints, pack=1, result_shape_dtypes=results
    )


_several_p = core.Primitive("several_results_of_assembly")
_several_p.multiple_results = True


@_several_p.def_abstract_eval
def _(*_, result_shape_dtypes, **__):
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in result_shape_dtypes]


if why_not() is None:

    @lowering.register_lowering(_several_p)
    def _(ctx, *arguments, **options):
        results = primitives._elementwise_inline_asm_lowering(ctx, *arguments, **options)
        return results if len(results) == len(ctx.avals_out) else list(results[0])
