"""Reads the collectives out of a program as XLA's partitioner wrote it.

That text is the same for every backend, up to what a backend's own passes make of it afterwards:
on TPU and GPU an all-reduce whose result is sliced becomes a reduce-scatter, sums of all-reduces
become all-reduces of sums, and neighbours are combined.
"""

import contextlib
import math
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from qwen_jax.analysis import ahead_of_time

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(rf"= (\w+)\[([\d,]*)\]\S* ({'|'.join(KINDS)})\(")
_ARRAY = re.compile(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]")


@dataclass(frozen=True)
class Collective:
    """One instruction: what it is, its result on one device, over which mesh axes, and where.

    `scope` is the `jax.named_scope` it stems from, with `'` for a backward pass; `looped` is
    whether it runs once an iteration of a loop.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    scope: str
    looped: bool


@dataclass(frozen=True)
class Program:
    """A compiled program, its collectives, the elements of its largest array, XLA's warnings."""

    run: jax.stages.Compiled
    collectives: tuple[Collective, ...]
    largest: int
    warnings: str

    def count(self) -> Counter:
        """(scope, once or looped, kind, axes) -> number of instructions."""
        return Counter(
            (c.scope, "looped" if c.looped else "once", c.kind, "+".join(c.axes))
            for c in self.collectives
        )


def compile_and_read(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> Program:
    """Compiles, and reads what the partitioner wrote."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        # A program that comes from the compilation cache is not dumped.
        with ahead_of_time.without_cache(), _stderr() as log:
            run = lowered.compile(compiler_options=options)
            log.seek(0)
            warnings = log.read()
        (dump,) = Path(folder).glob("*after_spmd-partitioning*.txt")
        text = dump.read_text()
    # The final text too: nothing that large may appear later either.
    sizes = [_elements(dims) for dims in _ARRAY.findall(text + run.as_text())]
    return Program(run, tuple(_collectives(text, mesh)), max(sizes), warnings)


@contextlib.contextmanager
def _stderr():
    """A file that gets what the process writes to descriptor 2, where XLA's C++ complains."""
    saved = os.dup(2)
    with tempfile.TemporaryFile("w+") as log:
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _collectives(text: str, mesh: jax.sharding.Mesh):
    looped_in = _looped(text)
    looped = False
    for line in text.splitlines():
        if heading := _COMPUTATION.match(line):
            looped = heading[2] in looped_in
        if found := _INSTRUCTION.search(line):
            dtype, dims, kind = found.groups()
            shape = tuple(int(d) for d in dims.split(",") if d)
            axes = _axes(line, mesh)
            if axes:  # a group of one moves nothing
                yield Collective(kind, dtype, shape, axes, _scope(line), looped)
        else:
            assert not re.search(rf"\s({'|'.join(KINDS)})(-start)?\(", line), f"not read: {line}"


def _looped(text: str) -> set[str]:
    """The computations that a loop's body is, calls or branches to."""
    called: dict[str, set[str]] = {}
    bodies, inside = set(), set()
    for line in text.splitlines():
        if heading := _COMPUTATION.match(line):
            inside = called.setdefault(heading[2], set())
        else:
            inside.update(re.findall(r"(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)", line))
            for names in re.findall(r"branch_computations=\{([^}]*)\}", line):
                inside.update(re.findall(r"[\w.\-]+", names))
            bodies.update(re.findall(r"body=%?([\w.\-]+)", line))
    reached, left = set(), list(bodies)
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left.extend(called.get(name, ()))
    return reached


def _elements(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(","))


def _scope(line: str) -> str:
    """`jit(f)/transpose(jvp(model))/...` -> `model'`; empty outside every named scope."""
    name = re.search(r'op_name="([^"]*)"', line)[1]
    inner = re.search(r"/(?:(transpose)\()?(?:jvp\()?(\w+)\)*/", name)
    return inner[2] + ("'" if inner[1] else "") if inner else ""


def _axes(line: str, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    positions = np.stack(np.unravel_index(_groups(line), tuple(mesh.shape.values())), axis=-1)
    differ = (positions != positions[:, :1]).any(axis=(0, 1))
    return tuple(name for name, d in zip(mesh.axis_names, differ, strict=True) if d)


def _groups(line: str) -> np.ndarray:
    """[groups, members] of partition numbers, from any of the three ways to write them."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        return np.array([_numbers(part) for part in re.findall(r"\{([\d,]+)\}", found[1])])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _iota(found[2]).reshape(_numbers(found[1]))
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", line
    )
    assert found, f"replica groups not read: {line}"
    named = re.findall(r"'(\w+)'=(\d+)", found[1])
    sizes = [int(size) for _, size in named]
    ids = _iota(found[2]) if found[2] else np.arange(math.prod(sizes))
    over = [[name for name, _ in named].index(name) for name in re.findall(r"'(\w+)'", found[3])]
    assert over and "(" not in found[3], f"replica groups not read: {line}"
    rest = [i for i in range(len(sizes)) if i not in over]
    members = math.prod(sizes[i] for i in over)
    return ids.reshape(sizes).transpose(*rest, *over).reshape(-1, members)


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0, 1, 2... in that shape, transposed, flattened."""
    dims, _, order = text.partition("T")
    numbers = np.arange(math.prod(_numbers(dims.strip("[]")))).reshape(_numbers(dims.strip("[]")))
    return (numbers.transpose(_numbers(order.strip("()"))) if order else numbers).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
