"""Which rows a process reads, and batches ahead of the step with the state that belongs to them."""

import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from train.core import batches, interrupt


def placed(rows_of_devices, *, mine, monkeypatch):
    """A sharding in which device i, of process i // 2, holds the given rows."""
    monkeypatch.setattr(jax, "process_index", lambda: mine)
    devices = {
        Device(i // 2): (slice(*rows), slice(None)) for i, rows in enumerate(rows_of_devices)
    }
    mesh = SimpleNamespace(shape={"data": len(rows_of_devices)})
    return SimpleNamespace(mesh=mesh, devices_indices_map=lambda shape: devices)


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("rows", "mine", "index", "count"),
    [
        ([(0, 2), (2, 4), (4, 6), (6, 8)], 1, 1, 2),
        ([(0, 4), (0, 4), (4, 8), (4, 8)], 0, 0, 2),  # tensor parallel inside a process
        ([(0, 8), (0, 8), (0, 8), (0, 8)], 1, 0, 1),  # across processes: both read all
        ([(0, 4), (4, 8), (0, 4), (4, 8)], 1, 0, 1),
        ([(None, None)] * 2, 0, 0, 1),
    ],
)
def test_share(rows, mine, index, count, monkeypatch):
    where = placed(rows, mine=mine, monkeypatch=monkeypatch)
    assert batches.share(where, (8, 16)) == batches.Share(index=index, count=count)


def test_overlapping_shares_are_refused(monkeypatch):
    where = placed([(0, 2), (4, 6), (2, 4), (6, 8)], mine=0, monkeypatch=monkeypatch)
    with pytest.raises(ValueError, match="overlapping rows"):
        batches.share(where, (8, 16))


def test_each_batch_comes_with_the_state_behind_it(helpers):
    source = helpers.Numbers(2, end=7)
    ahead = batches.prefetch(source, lambda batch: batch, ahead=3)
    first, state = next(ahead)
    assert state == {"count": 1} and source.count == 4
    np.testing.assert_array_equal(first["tokens"], helpers.random_batch(1, 2)["tokens"])
    assert [state["count"] for _, state in ahead] == [2, 3, 4, 5, 6, 7]


@pytest.mark.races
def test_a_second_interrupt_is_one():
    with interrupt.catch() as asked:
        assert not asked(1)
        signal.raise_signal(signal.SIGINT)
        assert asked(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
