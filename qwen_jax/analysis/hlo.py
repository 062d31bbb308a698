"""The collectives of one execution of a compiled program, read from XLA's text, loops multiplied
out.

XLA's own `cost_analysis` counts the body of a loop once, so that a step of 80 scanned layers costs
what one layer does. Here every instruction counts as often as it runs. A loop's number of rounds is
the constant that its condition compares a counter with; jax's scans count from 0 by 1.

XLA:TPU writes a reduce-scatter as a fusion around an all-reduce, in a computation of the name
all-reduce-scatter, and a collective that runs beside other work either as a pair of start and done
or as clones in several fusions that share one chain_id. Each is one collective here.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "c64": 64}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|c64|f8\w*|[fsu]\d+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|\w*_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclass
class Moved:
    """Collectives of a kind that one execution runs, on one device.

    num_bytes: size of the results. overlapped: bytes of those that run beside other work.
    """

    count: int = 0
    num_bytes: int = 0
    overlapped: int = 0


@dataclass(frozen=True)
class Program:
    """Collectives of a program by kind (`moved`), and XLA:TPU's estimated cycles of its fusions."""

    moved: dict[str, Moved] = field(default_factory=dict)
    cycles: int = 0


@dataclass(frozen=True)
class _Instruction:
    result: str
    operation: str
    line: str

    def called(self) -> Iterator[tuple[str, str]]:
        """Pairs (attribute, computation) for every computation that the instruction names."""
        for attribute, several, one in _CALLED.findall(self.line):
            for name in re.findall(r"[\w.\-]+", several or one):
                yield attribute, name


def read(text: str) -> Program:
    """Collectives and cycles of the program `text`, which `compiled.as_text()` returns."""
    computations, entry = _parse(text)
    runs, results = _runs(computations, entry)
    moved: defaultdict[str, Moved] = defaultdict(Moved)
    cycles, chains = 0, set()
    for name, times in runs.items():
        for instruction in computations[name]:
            if instruction.operation == "fusion":
                found = re.search(r'"estimated_cycles":"(\d+)"', instruction.line)
                estimate = int(found[1]) if found else 0
                cycles += times * estimate if estimate < 2**50 else 0  # more is "not known"
            kind = instruction.operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            chain = re.search(r'chain_id="(\d+)"', instruction.line)
            if chain and (kind, chain[1]) in chains:
                continue
            chains.add((kind, chain and chain[1]))
            result = instruction.result
            if instruction.operation.endswith("-start") and kind != "all-reduce":
                result = _second(result)
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind, result = "reduce-scatter", results[name]
            of_kind = moved[kind]
            of_kind.count += times
            of_kind.num_bytes += times * _bytes(result)
            if chain or instruction.operation.endswith("-start"):
                of_kind.overlapped += times
    return Program({kind: moved[kind] for kind in KINDS if kind in moved}, cycles)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, inside = "", []
    for line in text.splitlines():
        if heading := _COMPUTATION.match(line):
            inside = computations.setdefault(heading[2], [])
            entry = heading[2] if heading[1] else entry
        elif found := _INSTRUCTION.match(line):
            inside.append(_Instruction(found[1], found[2], line))
    return computations, entry


def _runs(computations: dict, entry: str) -> tuple[Counter, dict[str, str]]:
    """Number of executions of each computation, and the result of the fusion that calls it."""
    runs: Counter = Counter()
    results: dict[str, str] = {}

    def walk(name: str, times: int) -> None:
        runs[name] += times
        for instruction in computations[name]:
            if instruction.operation in ("async-done", "async-update"):
                continue  # the start named the same computation
            rounds = 1
            if instruction.operation == "while":
                (condition,) = (n for at, n in instruction.called() if at == "condition")
                rounds = _rounds(computations, condition)
            for attribute, called in instruction.called():
                # Reductions name the scalar function that they apply: no work of its own.
                if attribute == "to_apply" and instruction.operation != "call":
                    continue
                if called in computations:
                    results[called] = instruction.result
                    walk(called, times * rounds)

    walk(entry, 1)
    return runs, results


def _rounds(computations: dict, condition: str) -> int:
    """Number of rounds of a loop: the one positive constant of its condition, else 1."""

    def constants(name: str) -> Iterator[int]:
        for instruction in computations[name]:
            if instruction.operation == "constant" and instruction.result.startswith("s32[]"):
                yield int(re.search(r"constant\((-?\d+)\)", instruction.line)[1])
            for attribute, called in instruction.called():
                if attribute == "calls":
                    yield from constants(called)

    found = {value for value in constants(condition) if value > 0}
    return found.pop() if len(found) == 1 else 1


def _second(result: str) -> str:
    """The second member of an async start's result (operands, results, ...)."""
    parts, depth, start = [], 0, 1
    for at, character in enumerate(result):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            parts.append(result[start:at])
            start = at + 1
    return parts[1] if len(parts) > 1 else result


def _bytes(result: str) -> int:
    bits = 0
    for dtype, dims in _ARRAY.findall(result):
        width = _BITS.get(dtype) or (8 if dtype.startswith("f8") else int(dtype[1:]))
        bits += width * math.prod(int(d) for d in dims.split(",") if d)
    return bits // 8
