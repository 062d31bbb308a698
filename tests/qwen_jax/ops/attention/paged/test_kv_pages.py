"""Pages hold what was written to them, where the table says, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import qwen2_5
from partitioning import rules, sharding
from qwen_jax.ops.attention.paged import kv_pages

P, S, K, H = 11, 4, 2, 8
TABLE_BM = np.array([[7, 2, 9], [0, 5, 1], [3, 10, 4]], np.int32)


def _drawn(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def test_what_is_written_is_gathered():
    positions_BT = np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [7, 8, 9, 10, 11]], np.int32)
    k_BTKH, v_BTKH = _drawn(3, 5, K, H), _drawn(3, 5, K, H) + 1
    before = _drawn(P, S, 2 * K, H)
    write = jax.jit(kv_pages.write, donate_argnums=0)
    after = write(
        before.copy(),
        k_BTKH,
        v_BTKH,
        table_BM=TABLE_BM,
        positions_BT=positions_BT,
        valid_BT=np.ones((3, 5), bool),
    )
    k_BSKH, v_BSKH = kv_pages.gather(after, TABLE_BM)
    rows = np.arange(3)[:, None]
    np.testing.assert_array_equal(k_BSKH[rows, positions_BT], k_BTKH)
    np.testing.assert_array_equal(v_BSKH[rows, positions_BT], v_BTKH)
    changed = np.any(np.asarray(after != before), axis=(2, 3))
    assert changed.sum() == positions_BT.size
    np.testing.assert_array_equal(
        changed[TABLE_BM[rows, positions_BT // S], positions_BT % S], True
    )


def test_positions_that_are_not_valid_or_past_the_pages_are_dropped():
    before = _drawn(P, S, 2 * K, H)
    after = kv_pages.write(
        before,
        _drawn(3, 2, K, H),
        _drawn(3, 2, K, H),
        table_BM=TABLE_BM,
        positions_BT=np.array([[0, 1], [3, 12], [500, 13]], np.int32),
        valid_BT=np.array([[False, False], [False, True], [True, True]]),
    )
    np.testing.assert_array_equal(after, before)


def test_pages_wider_than_a_head_give_the_head_back():
    k_BTKH, v_BTKH = _drawn(3, 1, K, H), _drawn(3, 1, K, H)
    after = kv_pages.write(
        jnp.ones((P, S, 2 * K, 16)),
        k_BTKH,
        v_BTKH,
        table_BM=TABLE_BM,
        positions_BT=np.zeros((3, 1), np.int32),
        valid_BT=np.ones((3, 1), bool),
    )
    k_BSKH, v_BSKH = kv_pages.gather(after, TABLE_BM, H=H)
    np.testing.assert_array_equal(k_BSKH[:, :1], k_BTKH)
    np.testing.assert_array_equal(v_BSKH[:, :1], v_BTKH)
    np.testing.assert_array_equal(after[TABLE_BM[:, 0], 0, :, H:], 0)


def test_int8_is_within_half_a_step_of_each_heads_largest_value():
    k_BTKH = _drawn(3, 5, K, H) * jnp.array([[1e-3], [40.0]])[None, None]
    v_BTKH = k_BTKH.at[0, 0].set(0)
    shape = (P, S, 2 * K, H)
    pages = kv_pages.Quantised(
        jnp.ones(shape, jnp.int8), jnp.full(shape[:3], jnp.nan), jnp.dtype("float32")
    )
    positions_BT = np.broadcast_to(np.arange(5, dtype=np.int32), (3, 5))
    rows = {"table_BM": TABLE_BM, "positions_BT": positions_BT, "valid_BT": positions_BT < 5}
    after = kv_pages.write(pages, k_BTKH, v_BTKH, **rows)
    for got, want in zip(kv_pages.gather(after, TABLE_BM), (k_BTKH, v_BTKH), strict=True):
        assert got.dtype == jnp.float32
        step = np.abs(want).max(axis=-1, keepdims=True) / 127
        assert (np.abs(got[:, :5] - want) <= step * 0.5001).all()


@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_create_says_its_bytes(storage):
    cfg = qwen2_5.tiny()
    sizes = {"num_pages": 3, "page_size": 16, "dtype": jnp.bfloat16, "storage": storage}
    pages = kv_pages.create(cfg, **sizes)
    assert (pages.num_pages, pages.page_size, pages.dtype) == (3, 16, jnp.bfloat16)
    assert len(pages.layers) == cfg.num_hidden_layers
    assert sum(x.nbytes for x in jax.tree.leaves(pages)) == kv_pages.num_bytes(cfg, **sizes)


def test_a_key_is_not_split_from_its_value():
    cfg = qwen2_5.tiny()
    size = 2 * cfg.num_key_value_heads
    abstract = jax.sharding.AbstractMesh(
        (1, 1, 1, 1, size), ("data", "fsdp", "expert", "context", "tensor")
    )
    layout = sharding.Layout(abstract, rules.rule_set("engine"))
    with pytest.raises(ValueError, match=f"not divisible by tensor={size}"):
        kv_pages.create(cfg, num_pages=3, page_size=16, dtype=jnp.float32, layout=layout)
