"""Attention over pages of keys and values (`kv_pages.py`): one name, many kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.ops.attention.paged import gpu as paged_gpu
from qwen_jax.ops.attention.paged import kv_pages
from qwen_jax.ops.attention.paged import reference as paged_reference
from qwen_jax.ops.attention.paged import tpu as paged_tpu
from qwen_jax.ops.attention.paged.kv_pages import Layer

Implementation = Callable[..., jax.Array]


@dataclass(frozen=True)
class Kind:
    """Implementations by name, best first, and why one cannot run a call (None: it can)."""

    implementations: dict[str, Implementation]
    why_not: dict[str, Callable[..., str | None]]


DECODE = Kind(
    {"tpu": paged_tpu.decode, "gpu": paged_gpu.decode, "reference": paged_reference.decode},
    {"tpu": paged_tpu.why_not, "gpu": paged_gpu.why_not_decode},
)
EXTEND = Kind(
    {"tpu": paged_tpu.extend, "gpu": paged_gpu.extend, "reference": paged_reference.extend},
    {"tpu": paged_tpu.why_not, "gpu": paged_gpu.why_not_extend},
)

Prefix = Literal["pages", "none"]


def decode(
    q_BNH: jax.Array,
    kv_PSCH: Layer,
    *,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """One query a row over its first `lengths_B` positions -> [B, N, H], in q's dtype.

    softmax(q k^T / sqrt(H)) v, with the row's own key and value among the pages already. A row of
    length 0 is not active: it costs little, and gives zeros.

    `implementation=None` takes the best on the layout's devices, or without a layout on JAX's
    default backend; a named one that cannot run raises `ValueError`.
    """
    kernel = DECODE.implementations[_name(DECODE, implementation, q_BNH, kv_PSCH, layout)]
    rows = {"table_BM": table_BM, "lengths_B": lengths_B}
    return _on_own_heads(kernel, (q_BNH,), kv_PSCH, rows, layout=layout)


def append(
    q_BNH: jax.Array,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    kv_PSCH: Layer,
    *,
    table_BM: jax.Array,
    lengths_B: jax.Array,
    implementation: str | None = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, Layer]:
    """`paged_cache.write` of every row's key and value at lengths_B - 1, then `decode`.

    -> ([B, N, H], the pages), which are updated in place where they are donated. The "gpu" kernel
    does both at once where a device has all rows and its own heads, and pages are not quantised.
    """
    name = _name(DECODE, implementation, q_BNH, kv_PSCH, layout)
    rows = {"table_BM": table_BM, "lengths_B": lengths_B}
    whole = layout is None or (
        layout.size("batch") == 1 and layout.size("act_kv_heads") == layout.size("act_heads")
    )
    if name == "gpu" and whole and not isinstance(kv_PSCH, kv_pages.Quantised):
        chunk = (q_BNH, k_BKH, v_BKH)
        return _on_own_heads(
            paged_gpu.append, chunk, kv_PSCH, rows, results="o, pages", layout=layout
        )
    kv_PSCH = kv_pages.write(
        kv_PSCH,
        k_BKH[:, None],
        v_BKH[:, None],
        table_BM=table_BM,
        positions_BT=jnp.maximum(lengths_B - 1, 0)[:, None],
        valid_BT=(lengths_B > 0)[:, None],
    )
    kernel = DECODE.implementations[name]
    return _on_own_heads(kernel, (q_BNH,), kv_PSCH, rows, layout=layout), kv_PSCH


def extend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    kv_PSCH: Layer,
    *,
    table_BM: jax.Array,
    starts_B: jax.Array,
    lengths_B: jax.Array,
    prefix: Prefix = "pages",
    implementation: str | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """A chunk of every row, behind what its pages hold -> [B, T, N, H], in q's dtype.

    Query t < lengths_B, at position starts_B + t, sees positions 0..starts_B + t. The chunk's keys
    and values must be among the pages already (`paged_cache.write` comes first): implementations
    read them there or take them as given, whichever is faster. Queries t >= lengths_B are padding;
    what they get is finite and not specified.

    A table of fewer pages, enough for positions up to the chunk's end, is read in less time.
    prefix="none" promises that starts_B is 0 everywhere, which some implementations make use of.
    For `implementation` see `decode`.
    """
    if prefix not in ("pages", "none"):
        raise ValueError(f"prefix={prefix!r} is unknown; known: pages, none")
    kernel = EXTEND.implementations[_name(EXTEND, implementation, q_BTNH, kv_PSCH, layout)]
    rows = {"table_BM": table_BM, "starts_B": starts_B, "lengths_B": lengths_B}
    chunk = (q_BTNH, k_BTKH, v_BTKH)
    return _on_own_heads(kernel, chunk, kv_PSCH, rows, prefix=prefix, layout=layout)


def choose(kind: Kind, q: jax.Array, kv_PSCH: Layer, *, platform: str) -> str:
    """The best implementation on `platform` that can run this call."""
    return next(
        name
        for name in kind.implementations
        if why_not(kind, name, q, kv_PSCH, platform=platform) is None
    )


def why_not(kind: Kind, name: str, q: jax.Array, kv_PSCH: Layer, *, platform: str) -> str | None:
    """Why the implementation cannot run this call on `platform`, or None if it can."""
    if name not in kind.why_not:
        return None
    return kind.why_not[name](q, kv_PSCH, platform=platform)


def _name(kind: Kind, name: str | None, q: jax.Array, kv_PSCH: Layer, layout: Layout | None) -> str:
    """The name asked for, if it can run, or the best."""
    platform = jax.default_backend() if layout is None else layout.platform
    if name is None:
        name = choose(kind, q, kv_PSCH, platform=platform)
    if name not in kind.implementations:
        known = ", ".join(kind.implementations)
        raise ValueError(f"unknown paged attention implementation {name!r}; known: {known}")
    reason = why_not(kind, name, q, kv_PSCH, platform=platform)
    if reason is not None:
        raise ValueError(f"paged attention implementation {name!r} cannot run: {reason}")
    return name


def _on_own_heads(
    kernel: Callable[..., jax.Array],
    chunk: tuple[jax.Array, ...],
    kv_PSCH: Layer,
    rows: dict[str, jax.Array],
    *,
    results: Literal["o", "o, pages"] = "o",
    layout: Layout | None,
    **static,
) -> jax.Array | tuple[jax.Array, Layer]:
    """`kernel` under `shard_map`: rows over `batch`, heads over `act_heads`; nothing is sent.

    Key-value heads that are on every device (`kv_heads=replicated`) stay where they are: the kernel
    is told which of them its query heads read.
    """
    if layout is None:
        return kernel(*chunk, kv_PSCH, **rows, **static)
    q, N, K = chunk[0], chunk[0].shape[-2], kv_PSCH.shape[2] // 2
    sharding.check_divisible(q.shape[:1], ("batch",), layout, what="rows of paged attention")
    middle = (None,) * (q.ndim - 3)
    specs = [
        sharding.spec(("batch", *middle, heads, None), layout)
        for heads in ("act_heads", "act_kv_heads", "act_kv_heads")
    ]

    def local(chunk, kv_PSCH, rows):
        heads_K = _own_heads(N=N, K=K, layout=layout)
        if heads_K is not None and len(chunk) > 1:
            q, *kv = chunk
            chunk = (q, *(jnp.take(x, heads_K, axis=2) for x in kv))
        if heads_K is not None:
            rows = {**rows, "heads_K": heads_K}
        return kernel(*chunk, kv_PSCH, **rows, **static)

    of_rows = {name: sharding.spec(("batch", None)[: x.ndim], layout) for name, x in rows.items()}
    of_pages = kv_pages.specs(kv_PSCH, layout)
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(tuple(specs[: len(chunk)]), of_pages, of_rows),
        out_specs=specs[0] if results == "o" else (specs[0], of_pages),
        check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )(chunk, kv_PSCH, rows)


def _own_heads(*, N: int, K: int, layout: Layout) -> jax.Array | None:
    """Inside `shard_map`: which of the pages' key-value heads this device's query heads read.

    None: all, in order. Otherwise the local query heads are split evenly over the heads named: one,
    if all of them share it, else one name a query head.
    """
    if layout.size("act_kv_heads") == layout.size("act_heads"):
        return None
    local_N = N // layout.size("act_heads")
    first = jax.lax.axis_index(layout.rules.mesh_axes("act_heads")) * local_N
    if (N // K) % local_N == 0:
        return (first * K // N)[None]
    return (first + jnp.arange(local_N)) * K // N
