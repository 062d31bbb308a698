"""Attention over pages of keys and values (`kv_pages.py`), and the choice of its kernels."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.ops import registry
from qwen_jax.ops.attention.paged import gpu as paged_gpu
from qwen_jax.ops.attention.paged import kv_pages
from qwen_jax.ops.attention.paged import reference as paged_reference
from qwen_jax.ops.attention.paged import tpu as paged_tpu
from qwen_jax.ops.attention.paged.kv_pages import Layer

DECODE = registry.Operation(
    "paged attention",
    (
        registry.Implementation(
            name="tpu",
            platforms=("tpu",),
            unsupported=paged_tpu.unsupported,
            compute=paged_tpu.decode,
        ),
        registry.Implementation(
            name="gpu",
            platforms=("gpu",),
            unsupported=paged_gpu.unsupported_decode,
            compute=paged_gpu.decode,
        ),
        registry.Implementation(name="reference", compute=paged_reference.decode),
    ),
)
EXTEND = registry.Operation(
    "paged attention",
    (
        registry.Implementation(
            name="tpu",
            platforms=("tpu",),
            unsupported=paged_tpu.unsupported,
            compute=paged_tpu.extend,
        ),
        registry.Implementation(
            name="gpu",
            platforms=("gpu",),
            unsupported=paged_gpu.unsupported_extend,
            compute=paged_gpu.extend,
        ),
        registry.Implementation(name="reference", compute=paged_reference.extend),
    ),
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
    """Attention of one query a row over the row's first lengths_B positions, [B, N, H].

    softmax(q k^T / sqrt(H)) v in q's dtype. The query's own key and value must be on the pages
    already. A row of length 0 is not active: it costs little, and its output is zeros.

    `implementation=None` chooses for the layout's platform, or without a layout for JAX's default
    backend. Raises `ValueError` for a named implementation that cannot run.
    """
    platform = sharding.platform(layout)
    chosen = DECODE.choose(q_BNH, kv_PSCH, platform=platform, name=implementation)
    rows = {"table_BM": table_BM, "lengths_B": lengths_B}
    return _on_own_heads(chosen.compute, (q_BNH,), kv_PSCH, rows, layout=layout)


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
    """The outputs [B, N, H] of `decode`, and the pages with every row's key and value written.

    The key and value are written to position lengths_B - 1 first, as by `kv_pages.write`; donated
    pages are updated in place. The "gpu" kernel writes and reads in one call if each device has all
    rows and its own heads, and pages are not quantised.
    """
    platform = sharding.platform(layout)
    chosen = DECODE.choose(q_BNH, kv_PSCH, platform=platform, name=implementation)
    rows = {"table_BM": table_BM, "lengths_B": lengths_B}
    one_call = layout is None or (
        layout.size("batch") == 1 and layout.size("act_kv_heads") == layout.size("act_heads")
    )
    if chosen.name == "gpu" and one_call and not isinstance(kv_PSCH, kv_pages.Quantised):
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
    return _on_own_heads(chosen.compute, (q_BNH,), kv_PSCH, rows, layout=layout), kv_PSCH


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
    """Attention of a chunk of every row's prompt, [B, T, N, H] in q's dtype.

    Query t < lengths_B, at position starts_B + t, sees positions 0..starts_B + t. The chunk's keys
    and values must be on the pages already (`kv_pages.write`): implementations read them there or
    take the arguments, whichever is faster. Queries t >= lengths_B are padding; their outputs are
    finite and not specified.

    A page table with fewer entries, enough for positions up to the chunk's end, takes less time.
    prefix="none" promises that starts_B is 0 in every row, which some implementations make use of.
    For `implementation` see `decode`.
    """
    if prefix not in ("pages", "none"):
        raise ValueError(f"prefix={prefix!r} is unknown; known: pages, none")
    platform = sharding.platform(layout)
    chosen = EXTEND.choose(q_BTNH, kv_PSCH, platform=platform, name=implementation)
    rows = {"table_BM": table_BM, "starts_B": starts_B, "lengths_B": lengths_B}
    chunk = (q_BTNH, k_BTKH, v_BTKH)
    return _on_own_heads(chosen.compute, chunk, kv_PSCH, rows, prefix=prefix, layout=layout)


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
    """Results of `kernel` under `shard_map`: rows over `batch`, heads over `act_heads`.

    Nothing is communicated. Key-value heads that are on every device (`kv_heads=replicated`) are
    not moved: `heads_K` tells the kernel which of them the device's query heads read.
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

    row_specs = {name: sharding.spec(("batch", None)[: x.ndim], layout) for name, x in rows.items()}
    page_specs = kv_pages.specs(kv_PSCH, layout)
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(tuple(specs[: len(chunk)]), page_specs, row_specs),
        out_specs=specs[0] if results == "o" else (specs[0], page_specs),
        check_vma=False,  # Pallas kernels do not say over which axes their results vary
    )(chunk, kv_PSCH, rows)


def _own_heads(*, N: int, K: int, layout: Layout) -> jax.Array | None:
    """Indices of the pages' key-value heads that this device's query heads read.

    Called inside `shard_map`. None: all heads, in order. Otherwise the device's query heads are
    split evenly over the indices: one index if all query heads share a key-value head, else an
    index for each query head.
    """
    if layout.size("act_kv_heads") == layout.size("act_heads"):
        return None
    local_N = N // layout.size("act_heads")
    first = jax.lax.axis_index(layout.rules.mesh_axes("act_heads")) * local_N
    if (N // K) % local_N == 0:
        return (first * K // N)[None]
    return (first + jnp.arange(local_N)) * K // N
