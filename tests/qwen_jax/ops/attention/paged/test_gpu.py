"""The GPU's decode kernel in the interpreter, and its chunks with cuDNN played by the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partitioning import ring
from qwen_jax.ops.attention import cudnn, reference
from qwen_jax.ops.attention.paged import api as paged
from qwen_jax.ops.attention.paged import gpu as paged_gpu
from qwen_jax.ops.attention.paged import kv_pages
from qwen_jax.ops.attention.paged import reference as paged_reference
from tests.qwen_jax.ops.attention.paged import paged_cases as cases

# One split and several, a last block that is full and one that is not, a row that is not active.
LENGTHS_B = np.array([1, 320, 0, 77], np.int32)


def _inputs(N: int, K: int, H: int, page_size: int, dtype: str, storage: str = "plain"):
    k, v = (cases.draw(4, 320, K, H, dtype=dtype, seed=seed) for seed in (1, 2))
    kv, table = cases.paged(k, v, page_size=page_size, storage=storage)
    return cases.draw(4, N, H, dtype=dtype), kv, table


def _decode(tuning: paged_gpu.Tuning):
    return jax.jit(functools.partial(paged_gpu.decode, tuning=tuning, interpret=True))


@pytest.mark.parametrize(
    ("heads", "page_size", "dtype", "storage", "tolerance"),
    [
        pytest.param((14, 2, 64), 64, "float32", "plain", 1e-6, marks=pytest.mark.slow),
        ((14, 2, 64), 16, "bfloat16", "int8", 1e-2),
        pytest.param((28, 4, 128), 64, "bfloat16", "plain", 1e-2, marks=pytest.mark.slow),
        pytest.param((4, 4, 16), 128, "float32", "int8", 1e-6, marks=pytest.mark.slow),
        pytest.param((40, 2, 16), 32, "float32", "plain", 1e-6, marks=pytest.mark.slow),
    ],
)
def test_decode_equals_the_reference(heads, page_size, dtype, storage, tolerance):
    q, kv, table = _inputs(*heads, page_size, dtype, storage)
    got = _decode(paged_gpu.Tuning(min_keys=64))(q, kv, table_BM=table, lengths_B=LENGTHS_B)
    want = paged_reference.decode(q, kv, table_BM=table, lengths_B=LENGTHS_B)
    assert got.dtype == q.dtype
    cases.assert_close(got, want, tolerance)
    np.testing.assert_array_equal(got[2], 0)


@pytest.mark.slow
def test_a_row_is_bitwise_its_own():
    """A row's splits follow from its own length: in bfloat16 too, neighbours change nothing."""
    q, kv, table = _inputs(4, 2, 16, 32, "bfloat16")
    decode = _decode(paged_gpu.Tuning(min_keys=64, block=32))
    one = decode(q, kv, table_BM=table, lengths_B=jnp.array([9, 300, 0, 1]))
    two = decode(q, kv, table_BM=table, lengths_B=jnp.array([320, 300, 31, 0]))
    np.testing.assert_array_equal(one[1], two[1])


def test_a_few_queries_a_row_are_read_for_like_one():
    """As a draft is verified: rows of different lengths, one beginning, one that is not active."""
    T, starts_B, lengths_B = 5, np.array([0, 300, 9, 126]), np.array([5, 3, 0, 5])
    _, kv, table = _inputs(4, 2, 16, 64, "float32")
    q = cases.draw(4, T, 4, 16)
    rows = {"table_BM": table, "starts_B": starts_B, "lengths_B": lengths_B, "prefix": "pages"}
    # The chunk's own keys are read from the pages.
    extend = functools.partial(paged_gpu.extend, q, None, None, interpret=True, **rows)
    got = np.asarray(jax.jit(extend)(kv))
    want = np.asarray(paged_reference.extend(q, None, None, kv, **rows))
    real_BT = np.arange(T) < lengths_B[:, None]
    cases.assert_close(got[real_BT], want[real_BT], 1e-6)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("page_size", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_append_equals_writing_and_decoding(page_size):
    """Rows whose last key begins a page, ends one, is the only one; one that is not active."""
    lengths_B = np.array([65, 320, 0, 1], np.int32)
    q, before, table = _inputs(4, 2, 16, page_size, "float32")
    new = [cases.draw(4, 2, 16, seed=seed) for seed in (7, 8)]
    rows = {"table_BM": table, "lengths_B": lengths_B}
    append = functools.partial(
        paged_gpu.append, tuning=paged_gpu.Tuning(min_keys=64), interpret=True
    )
    got, after = jax.jit(append)(q, *new, before, **rows)
    want, written = paged.append(q, *new, before, **rows, implementation="reference")
    cases.assert_close(got, want, 1e-6)
    np.testing.assert_array_equal(after, written)
    # Three rows, two heads, a key and a value.
    changed = ~((after == before) | np.isnan(before) & np.isnan(after))
    assert changed.any(axis=-1).sum() == 3 * 2 * 2


@pytest.mark.slow
def test_query_heads_that_share_some_of_the_pages_heads():
    q, kv, table = _inputs(4, 4, 16, 64, "float32")
    heads_K = jnp.array([2, 1], jnp.int32)
    rows = {"table_BM": table, "lengths_B": LENGTHS_B, "heads_K": heads_K}
    got = _decode(paged_gpu.TUNING)(q, kv, **rows)
    cases.assert_close(got, paged_reference.decode(q, kv, **rows), 1e-6)


def test_splits_occupy_the_gpu_and_are_worth_their_while():
    tuning = paged_gpu.Tuning(programs=2048, min_keys=256)
    assert paged_gpu.num_splits(4, 32768, tuning=tuning) == 128
    assert paged_gpu.num_splits(4, 1024, tuning=tuning) == 4
    assert paged_gpu.num_splits(1024, 32768, tuning=tuning) == 2
    assert paged_gpu.num_splits(4096, 32768, tuning=tuning) == 1


def _forward(q, k, v, mask, *lengths, scale):
    """cuDNN's call, played by the reference, with NaN where it may leave anything."""
    if lengths:
        of_keys = jnp.arange(k.shape[1])[None] < lengths[1][:, None]
        mask = ring.BlockMask(False, jnp.ones(q.shape[:2]), of_keys.astype(jnp.float32))
        k, v = (jnp.where(of_keys[..., None, None], x, 0) for x in (k, v))
    return reference.block_forward(q * scale, k, v, mask=mask)


@pytest.mark.parametrize(
    "heads_K", [None, pytest.param(np.array([1, 0], np.int32), marks=pytest.mark.slow)]
)
def test_a_chunk_is_merged_with_what_came_before(heads_K, monkeypatch):
    monkeypatch.setattr(cudnn, "_forward", _forward)
    N, K, H, T = 4, 2, 16, 40
    starts_B, lengths_B = np.array([0, 45, 130], np.int32), np.array([37, 40, 3], np.int32)
    q, k, v = (cases.draw(3, 170, n, H, seed=seed) for seed, n in enumerate((N, K, K)))
    kv, table = cases.paged(k, v, page_size=16)
    place = np.arange(3)[:, None], starts_B[:, None] + np.arange(T)
    q, k, v = (x[place] for x in (q, k, v))
    if heads_K is not None:
        k, v = k[:, :, heads_K], v[:, :, heads_K]
    rows = {"table_BM": table, "starts_B": starts_B, "lengths_B": lengths_B, "heads_K": heads_K}
    got = jax.jit(functools.partial(paged_gpu.extend, prefix="pages"))(q, k, v, kv, **rows)
    want = paged_reference.extend(q, k, v, kv, **rows, prefix="pages")
    real = (np.arange(T) < lengths_B[:, None])[:, :, None, None]
    cases.assert_close(np.where(real, got, 0), np.where(real, want, 0), 1e-6)


def test_without_a_gpu_the_reference_is_chosen_and_the_kernel_refused():
    q, kv, table = _inputs(4, 2, 16, 64, "float32")
    assert paged.DECODE.choose(q, kv, platform="cpu").name == "reference"
    assert paged.DECODE.choose(q, kv, platform="gpu").name == "gpu"
    # cuDNN knows no float32; a few queries are the kernel's.
    assert paged.EXTEND.choose(jnp.zeros((4, 32, 4, 16)), kv, platform="gpu").name == "gpu"
    assert paged.EXTEND.choose(jnp.zeros((4, 64, 4, 16)), kv, platform="gpu").name == "reference"
    odd = jnp.zeros((2, 24, 4, 16))
    reason = paged.DECODE.unsupported("gpu", q, odd, platform="gpu")
    assert reason == "page_size 24 is not a power of two from 16"
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="'gpu' cannot run: platform 'cpu' is not 'gpu'"):
            paged.decode(q, kv, table_BM=table, lengths_B=LENGTHS_B, implementation="gpu")


def test_the_kernels_lower_to_triton():
    """Where there is no GPU, the kernels' own program is made all the same."""
    rows = {"table_BM": jnp.zeros((4, 20), jnp.int32), "lengths_B": jnp.zeros(4, jnp.int32)}
    q, plain = (jnp.zeros(x, jnp.bfloat16) for x in ((4, 28, 128), (9, 64, 8, 128)))
    small_int8 = kv_pages.quantise(plain[:, :16], dtype=plain.dtype)
    for kv in (plain, small_int8):
        traced = jax.jit(paged_gpu.decode).trace(q, kv, **rows)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == 2
    few = jnp.zeros((4, 9, 28, 128), jnp.bfloat16)
    traced = jax.jit(functools.partial(paged_gpu.extend, prefix="pages")).trace(
        few, None, None, plain, **rows, starts_B=jnp.zeros(4, jnp.int32)
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2
    new = jnp.zeros((4, 4, 128), jnp.bfloat16)
    traced = jax.jit(paged_gpu.append).trace(q, new, new, plain, **rows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert (
        text.count("#stablehlo.output_operand_alias<") == 1
    )  # the pages are written where they are
