"""JAX's kernel for TPU over our pages: in the interpreter, and compiled ahead of time."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.hardware import xla_flags
from qwen_jax.ops.attention.paged import api as paged
from qwen_jax.ops.attention.paged import reference as paged_reference
from qwen_jax.ops.attention.paged import tpu as paged_tpu
from tests.qwen_jax.ops.attention.paged import paged_cases as cases

N, K, H, T = 16, 2, 64, 16
STARTS_B, LENGTHS_B = np.array([0, 40, 3], np.int32), np.array([16, 9, 0], np.int32)


@pytest.fixture
def interpreted(monkeypatch):
    with cases.interpreted_tpu(monkeypatch):
        yield


def _inputs():
    q, k, v = (cases.draw(3, 70, n, H, seed=seed) for seed, n in enumerate((N, K, K)))
    kv, table_BM = cases.paged(k, v, page_size=16)
    # As on a TPU: heads of 128, and nothing on a page that was never written but zeros.
    kv = jnp.pad(jnp.nan_to_num(kv), ((0, 0), (0, 0), (0, 0), (0, 128 - H)))
    return q[np.arange(3)[:, None], STARTS_B[:, None] + np.arange(T)], kv, table_BM


@pytest.mark.slow
def test_query_heads_that_share_some_of_the_pages_heads(interpreted):
    q_BTNH, kv, table_BM = _inputs()
    heads_K, q_BNH = np.array([1], np.int32), q_BTNH[:, 0, : N // K]
    rows = {"table_BM": table_BM, "lengths_B": jnp.array([70, 0, 5], jnp.int32), "heads_K": heads_K}
    got = jax.jit(paged_tpu.decode)(q_BNH, kv, **rows)
    cases.assert_close(got, paged_reference.decode(q_BNH, kv, **rows), 1e-6)
    np.testing.assert_array_equal(got[1], 0)


@pytest.mark.slow
def test_extend_in_the_interpreter_equals_the_reference(interpreted):
    q_BTNH, kv, table_BM = _inputs()
    rows = {"table_BM": table_BM, "starts_B": STARTS_B, "lengths_B": LENGTHS_B, "prefix": "pages"}
    extend = functools.partial(paged_tpu.extend, q_BTNH, None, None, **rows)
    got = np.asarray(jax.jit(extend)(kv))
    want = np.asarray(paged_reference.extend(q_BTNH, None, None, kv, **rows))
    real_BT = np.arange(T) < LENGTHS_B[:, None]
    cases.assert_close(got[real_BT], want[real_BT], 1e-6)


def test_pages_that_the_kernel_cannot_take_are_refused():
    q, narrow = jnp.zeros((1, 4, 64)), jnp.zeros((2, 16, 4, 64))
    reason = paged.DECODE.unsupported("tpu", q, narrow, platform="tpu")
    assert reason.startswith("pages have heads of 64, not a multiple of 128")
    chosen = paged.DECODE.choose(q, jnp.zeros((2, 16, 4, 128)), platform="tpu")
    assert chosen.name == "tpu"


PROGRAM = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from partitioning import mesh as mesh_lib, rules, sharding
from qwen_jax.ops.attention.paged import api as paged

topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
# query heads, kv heads, rows, queries of a row (0: decode), tensor
CASES = [(28, 4, 256, 0, 1), (14, 2, 64, 0, 1), (28, 4, 4, 1024, 1), (28, 4, 64, 0, 4)]
for N, K, B, T, tensor in CASES:
    config = mesh_lib.parse(f"tensor={tensor}")
    mesh = mesh_lib.make(config, devices=topology.devices[:tensor])
    layout = sharding.Layout(mesh, rules.rule_set("engine"))
    at = lambda *axes: sharding.sharding(axes, layout)
    bf16 = jnp.bfloat16
    shape = functools.partial(jax.ShapeDtypeStruct)
    H, S, M = (64 if N == 14 else 128), 64, 32
    kv = shape((4096, S, 2 * K, 128), bf16, sharding=at(None, None, "act_kv_heads"))
    rows = shape((B,), jnp.int32, sharding=at("batch"))
    table = shape((B, M), jnp.int32, sharding=at("batch"))
    middle = (T,) if T else ()
    q = shape((B, *middle, N, H), bf16, sharding=at("batch", *(None,) * len(middle), "act_heads"))
    k = shape((B, T, K, H), bf16, sharding=at("batch", None, "act_kv_heads"))
    if T:
        lowered = jax.jit(functools.partial(paged.extend, layout=layout)).lower(
            q, k, k, kv, table_BM=table, starts_B=rows, lengths_B=rows
        )
    else:
        lowered = jax.jit(functools.partial(paged.decode, layout=layout)).lower(
            q, kv, table_BM=table, lengths_B=rows
        )
    compiled = lowered.compile()
    text = compiled.as_text()
    assert "ragged_paged_attention_kernel" in text
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all")), text
    # The pages are read where they are.
    assert compiled.memory_analysis().temp_size_in_bytes < kv.size * 2 / tensor / 4
    print("ok", N, K, B, T, tensor)
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_kernel_compiles_for_a_tpu(topology):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, topology],
        env=os.environ | xla_flags.WITHOUT_TPU,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == 4
