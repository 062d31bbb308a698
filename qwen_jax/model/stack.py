"""Runs a model's layers one after the other: scanned in uniform groups, or unrolled.

Where all layers are alike, they are one stack and one scan. Where some have experts and others do
not, they are two stacks, and their order is cut into runs of a repeated pattern, each scanned: a
model with experts in every second layer is one scan over pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from qwen_jax.model import module

# (carry, one layer's parameters, its index) -> carry, and an output or None.
Body = Callable[[Any, dict, jax.Array | int], tuple[Any, Any]]


@dataclass(frozen=True)
class Run:
    """`pattern` of stacks, by name, `repeats` times, from layer `first` on."""

    first: int
    pattern: tuple[str, ...]
    repeats: int


def order(cfg: ModelConfig) -> tuple[str, ...]:
    """The stack that each layer is of."""
    dense = cfg.dense_layers if cfg.sparse_layers else ()
    return tuple(
        "dense_layers" if index in dense else "layers" for index in range(cfg.num_hidden_layers)
    )


def runs(names: tuple[str, ...]) -> list[Run]:
    """`names` as few repeated patterns: at each place the one that covers most, or the shorter."""
    found, first = [], 0
    while first < len(names):
        rest = names[first:]
        candidates = [Run(first, rest[:1], 1)]
        for size in range(1, len(rest) // 2 + 1):
            repeats = 1
            while rest[repeats * size : (repeats + 1) * size] == rest[:size]:
                repeats += 1
            if repeats > 1:
                candidates.append(Run(first, rest[:size], repeats))
        found.append(max(candidates, key=lambda run: len(run.pattern) * run.repeats))
        first += len(found[-1].pattern) * found[-1].repeats
    return found


def in_order(cfg: ModelConfig, params: dict, unstack: Callable[[dict], list]) -> list[dict]:
    """Every layer's parameters, first to last, by taking each stack of `params` apart."""
    apart = {name: iter(unstack(params[name])) for name in dict.fromkeys(order(cfg))}
    return [next(apart[name]) for name in order(cfg)]


def run(
    cfg: ModelConfig, params: dict, body: Body, carry: Any, *, layer_loop: str = "scan"
) -> tuple[Any, Any]:
    """`carry, output = body(carry, layer, index)` for every layer of `params` -> carry, outputs.

    Outputs of the layers that give one are stacked; None where none does.

    scan: compiles as fast for 80 layers as for 8; the index is traced. unrolled: one copy of the
    code a layer, minutes to compile for large models, but nothing is copied into and out of stacked
    arrays (on one H100, 1.5B: 488 TFLOP/s against 453; docs/experiments/training.md).
    Raises `ValueError` for another name.
    """
    if layer_loop not in ("scan", "unrolled"):
        raise ValueError(f"unknown layer_loop {layer_loop!r}; known: scan, unrolled")
    outputs = []
    if layer_loop == "scan":
        used = dict.fromkeys(order(cfg), 0)  # layers taken of each stack so far
        for part in runs(order(cfg)):
            carry, given = _scan(params, part, used, body, carry)
            outputs.append(given)
            for name in part.pattern:
                used[name] += part.repeats
    else:
        for index, layer in enumerate(in_order(cfg, params, module.unstack)):
            carry, output = body(carry, layer, index)
            outputs.append(jax.tree.map(lambda x: x[None], output))
    outputs = [output for output in outputs if output is not None]
    if not outputs:
        return carry, None
    return carry, jax.tree.map(lambda *parts: _joined(parts), *outputs)


def _scan(params: dict, part: Run, used: dict[str, int], body: Body, carry: Any):
    """One run of a pattern -> carry, outputs stacked over its layers that give one."""
    pattern, repeats = part.pattern, part.repeats
    stacks = {}
    for name in dict.fromkeys(pattern):
        count = pattern.count(name)
        first, last = used[name], used[name] + count * repeats
        stacks[name] = jax.tree.map(
            lambda x, first=first, last=last, count=count: _cut(x[first:last], count),
            params[name],
        )

    def step(carry, xs):
        index, layers = xs
        outputs, taken = [], dict.fromkeys(layers, 0)
        for offset, name in enumerate(pattern):
            nth, several = taken[name], pattern.count(name) > 1
            layer = jax.tree.map(lambda x, nth=nth: x[nth], layers[name]) if several else None
            carry, output = body(carry, layers[name] if layer is None else layer, index + offset)
            taken[name] += 1
            if output is not None:
                outputs.append(jax.tree.map(lambda x: x[None], output))
        return carry, jax.tree.map(lambda *x: _joined(x), *outputs) if outputs else None

    indices = part.first + len(pattern) * jnp.arange(repeats)
    carry, outputs = jax.lax.scan(step, carry, (indices, stacks))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)


def _cut(x: jax.Array, count: int) -> jax.Array:
    """[L, ...] -> [L / count, count, ...]; as it is where a step takes one layer."""
    return x if count == 1 else x.reshape(-1, count, *x.shape[1:])


def _joined(parts: tuple[jax.Array, ...]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
