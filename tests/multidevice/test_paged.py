"""Pages over eight devices: each reads its own heads and rows, and nothing is sent."""

import functools

import jax
import numpy as np
import pytest

from partitioning import mesh, rules, sharding
from qwen_jax.ops.attention.paged import api as paged
from qwen_jax.ops.attention.paged import gpu as paged_gpu
from qwen_jax.ops.attention.paged import kv_pages
from tests.multidevice import hlo
from tests.qwen_jax.ops.attention.paged import paged_cases

B, T, S, M, H = 4, 8, 16, 4, 16
LENGTHS_B, STARTS_B = np.array([1, 60, 0, 33], np.int32), np.array([0, 20, 50, 7], np.int32)

# mesh, query heads, key-value heads
LAYOUTS = [
    ("tensor=4,data=2", 8, 4),
    # A device's two query heads read two heads.
    pytest.param("tensor=6,kv_heads=replicated", 12, 4, marks=pytest.mark.slow),
    # All query heads of a device read one.
    pytest.param("tensor=8,kv_heads=replicated", 16, 2, marks=pytest.mark.slow),
]


def _layout(text: str) -> sharding.Layout:
    """On as many devices as the mesh's axes say."""
    config = mesh.parse(text)
    made = mesh.make(config, devices=jax.devices()[: config.tensor * config.data])
    return sharding.Layout(made, rules.rule_set("engine", kv_heads=config.kv_heads))


def _inputs(N: int, K: int, storage: str = "plain"):
    k, v = (paged_cases.draw(B, S * M, K, H, seed=seed) for seed in (1, 2))
    kv, table = paged_cases.paged(k, v, page_size=S, storage=storage)
    return paged_cases.draw(B, T, N, H), k[:, :T], v[:, :T], kv, table


def _on(layout: sharding.Layout, **arrays):
    """The arrays where they lie on the layout, by the name of each."""
    axes = {
        "q": ("batch", None, "act_heads"),
        "k": ("batch", None, "act_kv_heads"),
        "v": ("batch", None, "act_kv_heads"),
        "kv": kv_pages.AXES,
    }
    return [
        jax.device_put(x, sharding.sharding(axes.get(name, ("batch",)), layout))
        for name, x in arrays.items()
    ]


def _sent(compiled: jax.stages.Compiled) -> set[str]:
    """The kinds of collectives in a program."""
    return {kind for kind in hlo.KINDS if f" {kind}" in compiled.as_text()}


@pytest.mark.parametrize(("text", "N", "K"), LAYOUTS)
def test_reading_equals_one_device_and_sends_nothing(text, N, K):
    q, k, v, kv, table = _inputs(N, K)
    layout = _layout(text)

    def read(q, k, v, kv, table, lengths, starts, *, layout):
        rows = {"table_BM": table, "lengths_B": lengths}
        one = paged.decode(q[:, 0], kv, **rows, layout=layout)
        return one, paged.extend(q, k, v, kv, **rows, starts_B=starts, layout=layout)

    want = jax.jit(functools.partial(read, layout=None))(q, k, v, kv, table, LENGTHS_B, STARTS_B)
    placed = _on(layout, q=q, k=k, v=v, kv=kv, table=table, lengths=LENGTHS_B, starts=STARTS_B)
    compiled = jax.jit(functools.partial(read, layout=layout)).lower(*placed).compile()
    assert not _sent(compiled)
    for ours, theirs in zip(compiled(*placed), want, strict=True):
        paged_cases.assert_close(ours, theirs, 1e-6)


@pytest.mark.slow
def test_the_gpus_kernel_reads_the_heads_that_are_its_devices():
    text, N, K = LAYOUTS[2].values
    q, _, _, kv, table = _inputs(N, K, "int8")
    layout = _layout(text)
    kernel = functools.partial(paged_gpu.decode, interpret=True)
    rows = {"table_BM": table, "lengths_B": LENGTHS_B}

    @jax.jit
    def read(q, kv, rows):
        return paged._on_own_heads(kernel, (q,), kv, rows, layout=layout)

    want = paged.decode(q[:, 0], kv, **rows, implementation="reference")
    paged_cases.assert_close(read(q[:, 0], kv, rows), want, 1e-6)


def test_the_gpus_kernel_writes_the_heads_that_are_its_devices():
    q, k, v, kv, table = _inputs(8, 4)
    layout = _layout("tensor=4")
    rows = {"table_BM": table, "lengths_B": LENGTHS_B}
    kernel = functools.partial(paged_gpu.append, interpret=True)

    @jax.jit
    def append(chunk, kv, rows):
        return paged._on_own_heads(kernel, chunk, kv, rows, results="o, pages", layout=layout)

    chunk = q[:, 0], k[:, 0], v[:, 0]
    got, after = append(chunk, kv, rows)
    want, written = paged.append(*chunk, kv, **rows, implementation="reference")
    paged_cases.assert_close(got, want, 1e-6)
    np.testing.assert_array_equal(after, written)


@pytest.mark.parametrize(("text", "K"), [("tensor=4", 4), ("tensor=8,kv_heads=replicated", 2)])
def test_writing_sends_nothing(text, K):
    _, k, v, kv, table = _inputs(4, K)
    layout = _layout(text)
    positions = STARTS_B[:, None] + np.arange(T)
    rows = {"table_BM": table, "positions_BT": positions, "valid_BT": positions < 50}
    want = paged_cases.write(kv, k, v, **rows)
    (k, v, kv) = _on(layout, k=k, v=v, kv=kv)

    def write(kv, k, v):
        pages = kv_pages.Pages((kv_pages.write(kv, k, v, **rows),))
        return kv_pages.constrain(pages, layout).layers[0]

    compiled = jax.jit(write, donate_argnums=0).lower(kv, k, v).compile()
    assert not _sent(compiled)
    np.testing.assert_array_equal(compiled(kv, k, v), want)
