"""Declarations of parameters, and pure functions from NNX modules: the one user of Flax's API.

NNX is used as definition syntax. A module class declares its parameters in `__init__` and applies
them in `__call__`; everything outside sees plain nested dicts of arrays.

Shape suffixes used throughout the project: B batch, T query length, S key length, D embed, N query
heads, K kv heads, G = N / K, H head dim, F ffn, E experts, V vocabulary, L layers.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from partitioning import rules
from partitioning.sharding import Axes

_AXES = "logical_axes"  # our own metadata key: Flax's sharding machinery is not used

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def param(
    key: jax.Array, shape: tuple[int, ...], *, axes: Axes, init: Initializer
) -> nnx.Param[jax.Array]:
    """A float32 parameter with one logical axis name per dimension (None: never sharded).

    Raises `ValueError` if a name is not in the closed set or their number is not the rank.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for a parameter of shape {shape}")
    for axis in filter(None, axes):
        rules.check_axis(axis)
    return nnx.Param(init(key, shape, jnp.float32), **{_AXES: axes})


@dataclass(frozen=True)
class Definition:
    """A module's definition without its values; with a `count`, that many layers of it, stacked."""

    make: Callable[[jax.Array], nnx.Module]
    count: int | None = None

    def init(self, key: jax.Array) -> dict:
        """Fresh parameters; stacked ones get a leading dimension of `count`."""
        if self.count is None:
            return self._values(key)
        return jax.vmap(self._values)(jax.random.split(key, self.count))

    def axes(self) -> dict:
        """The tree of logical axes, one tuple for each parameter."""
        prefix = () if self.count is None else ("layers",)
        _, state = _split_abstract(self.make)
        named = jax.tree.map(
            lambda variable: variable.replace((*prefix, *variable.get_metadata(_AXES))),
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        return nnx.to_pure_dict(named)

    def bind(self, params: dict) -> nnx.Module:
        """The module with these values; of a stack, with one layer's values."""
        graph, _ = _split_abstract(self.make)
        return nnx.merge(graph, params)

    def _values(self, key: jax.Array) -> dict:
        return nnx.to_pure_dict(nnx.state(self.make(key)))


@jax.custom_vjp
def unstack(stacked: dict) -> list[dict]:
    """One tree for each layer, from a tree of [L, ...] arrays.

    The gradient is one concatenation; differentiating the slices would add up L padded arrays.
    """
    count = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(operator.itemgetter(index), stacked) for index in range(count)]


unstack.defvjp(
    lambda stacked: (unstack(stacked), None),
    lambda _, layers: (jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers),),
)


@functools.lru_cache(maxsize=256)
def _split_abstract(make: Callable[[jax.Array], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
    """The graph definition, and the state as shapes; it is traced, and nothing is allocated."""
    graphs = []

    def trace(key: jax.Array) -> nnx.State:
        graph, state = nnx.split(make(key))
        graphs.append(graph)
        return state

    state = jax.eval_shape(trace, jax.random.key(0))
    return graphs[-1], state
