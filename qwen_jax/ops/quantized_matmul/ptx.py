"""PTX with several results inside a Pallas kernel that Triton lowers.

JAX's own `triton.elementwise_inline_asm` takes several results but lowers only one (0.10.2 and
0.11.2): it gives them as a list in a list. Here they are taken out of it. And a read of 16 bytes by
each thread, which Triton makes only of what lies in one thread's registers side by side.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton
from jax.extend import core

try:
    from jax._src.lib.mlir import ir
    from jax._src.pallas.triton import lowering, primitives
    from jax._src.state import types as state
except ImportError:  # a JAX that has moved them: `unsupported` says so
    lowering = primitives = None


def unsupported() -> str | None:
    """The reason why this JAX cannot lower kernels with such PTX; None: it can."""
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


def load_four(words, at: jax.Array, mask: jax.Array, *, interpret: bool) -> list[jax.Array]:
    """Words at, ..., at + 3 of a ref of uint32 [...] for each thread; zeros where mask is not set.

    at: multiples of 4. The words must not change while the kernel runs.
    """
    if interpret:
        return [triton.load(words.at[at + k], mask=mask, other=0) for k in range(4)]
    return _load_four_p.bind(words, at, mask.astype(jnp.int32))


_several_p = core.Primitive("several_results_of_assembly")
_several_p.multiple_results = True


@_several_p.def_abstract_eval
def _(*_, result_shape_dtypes, **__):
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in result_shape_dtypes]


_load_four_p = core.Primitive("load_of_four_words")
_load_four_p.multiple_results = True
_LOAD = (
    "{ .reg .pred p; setp.ne.b32 p, $5, 0;"
    " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
    " @p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)


@_load_four_p.def_effectful_abstract_eval
def _(words, at, mask):
    return [jax.core.ShapedArray(at.shape, jnp.uint32)] * 4, {state.ReadEffect(0)}


if unsupported() is None:

    @lowering.register_lowering(_load_four_p)
    def _(ctx, words, at, mask):
        shape = ctx.avals_in[1].shape
        places = lowering._add(lowering._bcast_to(words, shape), at)
        long = ir.RankedTensorType.get(shape, ir.IntegerType.get_signless(64))
        found = primitives.tt_dialect.elementwise_inline_asm(
            [ir.RankedTensorType.get(shape, ir.IntegerType.get_signless(32))] * 4,
            _LOAD,
            constraints="=&r,=&r,=&r,=&r,l,r",
            pure=True,
            packed_element=1,
            args=[primitives.tt_dialect.ptr_to_int(long, places), mask],
        )
        return list(found)

    @lowering.register_lowering(_several_p)
    def _(ctx, *arguments, **options):
        results = primitives._elementwise_inline_asm_lowering(ctx, *arguments, **options)
        return results if len(results) == len(ctx.avals_out) else list(results[0])
