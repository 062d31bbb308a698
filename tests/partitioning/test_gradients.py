"""How devices of a torus are grouped; sums are checked in tests/multidevice."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from configs import mesh as mesh_config
from partitioning import gradients, rules, sharding


@dataclass(frozen=True)
class Chip:
    coords: tuple[int, ...]


@dataclass(frozen=True)
class FakeMesh:
    """What `_stages` reads of a mesh."""

    devices: np.ndarray
    axis_names = mesh_config.MESH_AXES

    @property
    def shape(self):
        return dict(zip(self.axis_names, self.devices.shape, strict=True))

    def __hash__(self):
        return id(self)


def layout(*, torus, fsdp):
    chips = np.empty(np.prod(torus), dtype=object)
    chips[:] = [Chip(tuple(map(int, at))) for at in np.ndindex(*torus)]
    shape = [fsdp if axis == "fsdp" else 1 for axis in mesh_config.MESH_AXES]
    shape[mesh_config.MESH_AXES.index("data")] = chips.size // fsdp
    return sharding.Layout(FakeMesh(chips.reshape(shape)), rules.TRAIN)


@pytest.mark.parametrize(
    ("torus", "fsdp", "sizes"),
    [
        ((4, 4, 8), 128, (16, 8)),
        ((16, 16, 1), 256, (16, 16)),
        ((4, 4, 4), 64, (16, 4)),
        ((4, 4, 4), 16, None),  # a side is left to another axis
        ((4, 4, 4), 4, None),  # a side alone
        ((1, 1, 8), 8, None),
    ],
)
def test_an_axis_that_is_the_torus_is_split_before_its_last_side(torus, fsdp, sizes):
    stages = gradients._stages("fsdp", layout(torus=torus, fsdp=fsdp))
    if sizes is None:
        assert stages == (None,)
        return
    assert tuple(len(groups[0]) for groups in stages) == sizes
    for groups in stages:
        assert sorted(sum(groups, [])) == list(range(fsdp))
    # The first groups hold what differs in all sides but the last, in order; then it comes.
    across, along = stages
    assert across[0] == list(range(0, fsdp, sizes[1]))
    assert along[0] == list(range(sizes[1]))


def test_devices_without_coordinates_are_one_group():
    mesh = jax.make_mesh((1,) * 5, mesh_config.MESH_AXES)
    assert gradients._stages("fsdp", sharding.Layout(mesh, rules.TRAIN)) == (None,)
