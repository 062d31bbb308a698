"""Runs a model's layers one after the other: scanned in uniform groups, or unrolled.

Where all layers are alike, they are one stack and one scan. Where some have experts and others do
not, they are two stacks, and their order is cut into runs of a repeated pattern, each scanned: a
model with experts in every second layer is one scan over pairs.
"""

from collections.abc import Callable, Mapping
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
    """A `pattern` of stacks, by name, that repeats `repeats` times from layer `first` on."""

    first: int
    pattern: tuple[str, ...]
    repeats: int


def order(cfg: ModelConfig) -> tuple[str, ...]:
    """The name of the stack that holds each layer, first to last."""
    dense = cfg.dense_layers if cfg.sparse_layers else ()
    return tuple(
        "dense_layers" if index in dense else "layers" for index in range(cfg.num_hidden_layers)
    )


def runs(names: tuple[str, ...]) -> list[Run]:
    """`names` as a few repeated patterns: at each place the one that covers most layers."""
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
    """Every layer's parameters, first to last; `unstack` gives the layers of one stack."""
    apart = {name: iter(unstack(params[name])) for name in dict.fromkeys(order(cfg))}
    return [next(apart[name]) for name in order(cfg)]


def run(
    cfg: ModelConfig,
    params: dict,
    bodies: Mapping[str, Body],
    carry: Any,
    *,
    layer_loop: str = "scan",
) -> tuple[Any, Any]:
    """The last carry and the outputs of `carry, output = body(carry, layer, index)` over layers.

    bodies: by the name of the layer's stack. Outputs that are not None are stacked over layers; the
    result is None where all are.

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
        for one in runs(order(cfg)):
            carry, stacked = _scan(params, one, used, bodies, carry)
            outputs.append(stacked)
            for name in one.pattern:
                used[name] += one.repeats
    else:
        layers = in_order(cfg, params, module.unstack)
        for index, (name, layer) in enumerate(zip(order(cfg), layers, strict=True)):
            carry, output = bodies[name](carry, layer, index)
            outputs.append(jax.tree.map(lambda x: x[None], output))
    outputs = [output for output in outputs if output is not None]
    if not outputs:
        return carry, None
    return carry, jax.tree.map(lambda *runs: _joined(runs), *outputs)


def _scan(
    params: dict, run: Run, used: dict[str, int], bodies: Mapping[str, Body], carry: Any
) -> tuple[Any, Any]:
    """The carry after one run of a pattern, and its outputs that are not None, stacked."""
    pattern, repeats = run.pattern, run.repeats
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
            layer = layers[name] if layer is None else layer
            carry, output = bodies[name](carry, layer, index + offset)
            taken[name] += 1
            if output is not None:
                outputs.append(jax.tree.map(lambda x: x[None], output))
        return carry, jax.tree.map(lambda *x: _joined(x), *outputs) if outputs else None

    indices = run.first + len(pattern) * jnp.arange(repeats)
    carry, outputs = jax.lax.scan(step, carry, (indices, stacks))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)


def _cut(x: jax.Array, count: int) -> jax.Array:
    """[L, ...] -> [L / count, count, ...]; as it is where a step takes one layer."""
    return x if count == 1 else x.reshape(-1, count, *x.shape[1:])


def _joined(pieces: tuple[jax.Array, ...]) -> jax.Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
