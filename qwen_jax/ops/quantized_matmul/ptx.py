"""PTX with several results, and 16-byte loads, inside a Pallas kernel that Triton lowers.

JAX's own `triton.elementwise_inline_asm` takes several result shapes, but lowers only one result
(0.10.2 and 0.11.2): its lowering returns them as a list in a list, which is unpacked here. Triton
itself reads 16 bytes a thread only for neighbouring elements of one thread's registers.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton
from jax.extend import core
from jaxlib.mlir import ir

# Private: JAX has no public function that registers a lowering for Pallas's Triton backend, and no
# public effect of reading a reference.
try:
    from jax._src.pallas.triton import lowering, primitives
    from jax._src.state import types as state
except ImportError:  # a JAX that has moved them: `unsupported` says so
    lowering = primitives = None


def unsupported() -> str | None:
    """The reason why this JAX cannot lower kernels with such PTX; None: it can."""
    found = hasattr(primitives, "_elementwise_inline_asm_lowering")
    if found:
        return None
    return f"JAX {jax.__version__} has no lowering of PTX as in 0.10.2 and 0.11.2; use one of them"


def call(
    text: str, arguments: Sequence[jax.Array], *, constraints: str, like: Sequence[jax.Array]
) -> list[jax.Array]:
    """Results of the PTX `text`, which each thread runs on its elements; arrays like `like`.

    constraints: LLVM's operand constraints, those of the results first.
    """
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like)
    return _several_p.bind(
        *arguments, asm=text, constraints=constraints, pack=1, result_shape_dtypes=results
    )


def load_four(words, at: jax.Array, mask: jax.Array, *, interpret: bool) -> list[jax.Array]:
    """Four arrays: each thread's uint32 words at, ..., at + 3 of a reference; 0 without the mask.

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
