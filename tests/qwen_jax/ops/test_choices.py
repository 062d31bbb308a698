"""Every operation's choice, over platforms, shapes and dtypes, is the recorded one.

A row of `tests/golden/choices.txt` is an operation and its array; its columns are calls: the
implementation that is chosen, and those that refuse the call when they are named.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.ops import registry
from qwen_jax.ops.attention import api as attention
from qwen_jax.ops.attention.paged import api as paged
from qwen_jax.ops.attention.paged import kv_pages
from qwen_jax.ops.grouped_matmul import api as grouped_matmul
from qwen_jax.ops.quantized_matmul import api as quantized_matmul
from qwen_jax.ops.top_k_top_p import api as top_k_top_p
from qwen_jax.quant.array import QuantArray

GOLDEN = Path(__file__).parents[2] / "golden" / "choices.txt"
PLATFORMS = ("cpu", "gpu", "tpu")
DTYPES = ("bfloat16", "float16", "float32")
shape = jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Call:
    """The row and the column of a call, the implementation chosen, and those that refuse it."""

    row: str
    column: str
    chosen: str
    refused: tuple[str, ...]


def _attention(platform: str) -> Iterator[Call]:
    for dtype, H in itertools.product(DTYPES, (16, 20, 64, 128, 256)):
        q = shape((2, 48, 4, H), dtype)
        yield _call((f"head_dim {H}", dtype), attention.ATTENTION, platform, q)


def _paged(platform: str) -> Iterator[Call]:
    pages = itertools.product(("plain", "int8"), (24, 64), (16, 64, 96, 128))
    for (storage, S, H), dtype, pages_dtype in itertools.product(pages, DTYPES, DTYPES[::2]):
        kv = _pages(storage, (64, S, 4, H), pages_dtype)
        for kind, operation, T in (
            ("decode", paged.DECODE, 0), ("extend", paged.EXTEND, 16), ("extend", paged.EXTEND, 64)
        ):  # fmt: skip
            q = shape((3, T, 4, 64)[: 1 if T == 0 else 2] + (4, min(H, 64)), dtype)
            yield _call(
                (f"{kind} {T}, pages {storage} {S} x {H}", f"{dtype} on {pages_dtype}"),
                operation,
                platform,
                q,
                kv,
            )
    for P in (2**14, 2**15, 2**16):  # values of a layer: 2^30, 2^31 and 2^32
        kv, q = _pages("int8", (P, 64, 8, 128), "bfloat16"), shape((3, 4, 128), "bfloat16")
        yield _call(
            (f"decode 0, pages int8 {P} x 64 x 8 x 128", "bfloat16"), paged.DECODE, platform, q, kv
        )


def _pages(storage: str, dims: tuple[int, ...], dtype: str) -> kv_pages.Layer:
    if storage == "plain":
        return shape(dims, dtype)
    return kv_pages.Quantised(shape(dims, "int8"), shape(dims[:3], "float32"), jnp.dtype(dtype))


def _grouped(platform: str) -> Iterator[Call]:
    sizes = ((136, 128, 192), (132, 128, 128), (64, 128, 128), (128, 96, 128), (256, 256, 256))
    for dtype, (M, K, N) in itertools.product(DTYPES, sizes):
        lhs, rhs = shape((M, K), dtype), shape((2, K, N), dtype)
        yield _call((f"{M} x {K} x {N}", dtype), grouped_matmul.GROUPED_MATMUL, platform, lhs, rhs)


def _quantized(platform: str) -> Iterator[Call]:
    kinds = itertools.product(("int8", "int4", "fp8"), ("matrix", "words", "embedding"))
    for (format, kind), group, sizes in itertools.product(
        kinds, (None, 32, 64), ((128, 64), (128, 60), (96, 192))
    ):
        q = _quant_array(format, kind, group, *sizes)
        for rows, dtype, devices in (
            (1, "bfloat16", 0), (8, "bfloat16", 1), (9, "bfloat16", 0), (64, "bfloat16", 0),
            (65, "bfloat16", 0), (1, "float32", 0), (1, "bfloat16", 2),
        ):  # fmt: skip
            call = {"rows": rows, "dtype": jnp.dtype(dtype), "devices": max(1, devices)}
            yield _call(
                (f"{format} {kind} {sizes} group {group}", f"{rows} {dtype} on {devices}"),
                quantized_matmul.QUANTIZED_MATMUL,
                platform,
                q,
                **call,
            )


def _quant_array(format: str, kind: str, group: int | None, C: int, O: int) -> QuantArray:  # noqa: E741
    packed = 2 if format == "int4" else 1
    values_dtype = {"int8": "int8", "int4": "uint8", "fp8": "float8_e4m3fn"}[format]
    S = C // (group or C)
    if kind == "matrix":
        return QuantArray(
            shape((C // packed, O), values_dtype), shape((S, O), "float32"), format=format
        )
    values = shape((O, C // packed), values_dtype)
    if kind == "words":
        values = shape((O, C // packed // 4), "uint32")
    return QuantArray(values, shape((O, S), "float32"), format=format, axis=-1)


def _top_k_top_p(platform: str) -> Iterator[Call]:
    yield _call(("any", "any"), top_k_top_p.TOP_K_TOP_P, platform)


def _call(
    place: tuple[str, str], operation: registry.Operation, platform: str, *arguments, **options
) -> Call:
    chosen = operation.choose(*arguments, platform=platform, **options).name
    refused = []
    for name in sorted(operation.names):
        if operation.unsupported(name, *arguments, platform=platform, **options) is None:
            named = operation.choose(*arguments, platform=platform, name=name, **options)
            assert named is operation[name]
        else:
            refused.append(name)
            with pytest.raises(ValueError, match=f"{name!r} cannot run: .*; use "):
                operation.choose(*arguments, platform=platform, name=name, **options)
    assert chosen not in refused, (place, chosen)
    return Call(*place, chosen, tuple(refused))


CALLS = {
    "attention": _attention,
    "paged": _paged,
    "grouped_matmul": _grouped,
    "quantized_matmul": _quantized,
    "top_k_top_p": _top_k_top_p,
}


def table(operation: str, platform: str) -> list[str]:
    """The operation's rows of the golden file on this platform."""
    rows: dict[str, list[str]] = {}
    for call in CALLS[operation](platform):
        refused = f" (not {', '.join(call.refused)})" if call.refused else ""
        rows.setdefault(call.row, []).append(f"{call.column}: {call.chosen}{refused}")
    return [f"{operation} {platform} | {row} | {'; '.join(x)}" for row, x in rows.items()]


@pytest.fixture
def on(monkeypatch):
    """A function that makes a platform JAX's default backend; its GPU is of Hopper's kind."""

    def switch(platform: str) -> None:
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        device = SimpleNamespace(compute_capability="9.0", core_count=132)
        monkeypatch.setattr(jax, "devices", lambda *_: [device])

    return switch


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("operation", CALLS)
def test_choices_are_the_recorded_ones(operation, platform, on):
    on(platform)
    recorded = GOLDEN.read_text().splitlines()
    want = [row for row in recorded if row.startswith(f"{operation} {platform} |")]
    assert want and table(operation, platform) == want
