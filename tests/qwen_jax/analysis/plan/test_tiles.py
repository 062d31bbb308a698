"""Padding by hand, against layouts that the TPU's compiler chose (docs/pods.jsonl's programs)."""

import pytest

from qwen_jax.analysis.plan import tiles
from tests.qwen_jax.analysis.plan.cases import planned


@pytest.mark.parametrize(
    ("shape", "elements"),
    [
        ((56, 152064), 56 * 152064),  # 7 tiles of 8 rows
        ((152064, 56), 152064 * 56),  # turned, so that the 56 are rows too
        ((14, 152064), 16 * 152064),
        ((28, 14, 18944), 28 * 16 * 18944),
        ((64, 20, 27648), 64 * 20 * 27648),  # the 64 layers become the rows of a tile
        ((24, 56, 14, 64), 24 * 56 * 14 * 128),  # neither is a multiple of 128
        ((28, 56, 4, 128), 28 * 56 * 4 * 128),  # tiles of 4 rows
        ((3, 128), 4 * 128),
        ((5120,), 5120),
        ((14,), 128),
    ],
)
def test_the_layout_that_wastes_least(shape, elements):
    assert tiles.size(planned("fsdp=1", "v5e-1"), shape) == elements


def test_an_array_written_layer_by_layer_keeps_the_layers_outside():
    job = planned("fsdp=1", "v5e-1")
    assert tiles.stacked(job, (64, 20, 27648)) == 64 * 24 * 27648


def test_only_tpus_have_tiles():
    job = planned("fsdp=1", "h100-1")
    assert tiles.size(job, (14, 100)) == 1400
    assert tiles.lanes(job, 100) == 100
    assert tiles.is_whole(job, 14)
    assert not tiles.is_whole(planned("fsdp=1", "v5e-1"), 14)
