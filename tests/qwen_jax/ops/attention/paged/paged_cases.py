"""Keys and values on pages, for the tests of every implementation."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as ragged

from qwen_jax.ops.attention.paged import kv_pages
from qwen_jax.ops.attention.paged import tpu as paged_tpu

write = jax.jit(kv_pages.write)


def draw(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.dtype(dtype))


def paged(k_BSKH, v_BSKH, *, page_size: int, storage="plain"):
    """Pages and a table of these keys and values, scattered; all else is NaN."""
    B, S, K, H = k_BSKH.shape
    M = -(-S // page_size)
    order = np.random.default_rng(1).permutation(B * M + 3).astype(np.int32)
    table_BM = jnp.asarray(order[: B * M].reshape(B, M))
    shape, dtype = (B * M + 3, page_size, 2 * K, H), k_BSKH.dtype
    kv = jnp.full(shape, jnp.nan, dtype)
    if storage == "int8":
        scales = jnp.full(shape[:3], jnp.nan)
        kv = kv_pages.Quantised(jnp.full(shape, 127, jnp.int8), scales, dtype)
    positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    kv = write(
        kv,
        k_BSKH,
        v_BSKH,
        table_BM=table_BM,
        positions_BT=positions,
        valid_BT=np.ones((B, S), bool),
    )
    return kv, table_BM


def assert_close(got, want, tolerance):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)


class _Flat:
    """A reference that is reshaped where its value is: the interpreter cannot reshape it itself."""

    def __init__(self, ref, shape=None):
        self.ref, self.shape = ref, shape

    @property
    def dtype(self):
        return self.ref.dtype

    def reshape(self, *shape):
        return _Flat(self.ref, shape)

    def __getitem__(self, at):
        return self.ref[...].reshape(self.shape)[at]


class _Copy(ragged.MultiPageAsyncCopyDescriptor):
    def wait(self):
        return _Flat(super().wait())


@contextlib.contextmanager
def interpreted_tpu(monkeypatch):
    """Runs the TPU's kernel in Pallas's interpreter."""
    monkeypatch.setattr(ragged, "MultiPageAsyncCopyDescriptor", _Copy)
    # Its masked stores go wrong where there are more queries at a time than the 8 heads of a group.
    monkeypatch.setattr(paged_tpu, "EXTEND_QUERIES", 8)
    # More than one block of pages for a row.
    monkeypatch.setattr(paged_tpu, "BUFFER_BYTES", 2**17)
    with pltpu.force_tpu_interpret_mode():
        yield
