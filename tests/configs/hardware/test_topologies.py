"""Names of slices against the clouds' own tables, and what is said to one who gets them wrong."""

import json
import math
import os
import subprocess
import sys

import pytest

from configs.hardware import chips, topologies

# Name, shape, chips, jax devices, machines: rows of the clouds' configuration tables.
ROWS = [
    ("v4-8", (2, 2, 1), 4, 4, 1),
    ("v4-64", (2, 4, 4), 32, 32, 8),
    ("v4-4096", (8, 16, 16), 2048, 2048, 512),
    ("v5e-1", (1, 1), 1, 1, 1),
    ("v5e-8", (2, 4), 8, 8, 1),
    ("v5e-16", (4, 4), 16, 16, 4),
    ("v5litepod-256", (16, 16), 256, 256, 64),
    ("v5p-8", (2, 2, 1), 4, 4, 1),
    ("v5p-128", (4, 4, 4), 64, 64, 16),
    ("v5p-256", (4, 4, 8), 128, 128, 32),
    ("v5p-384", (4, 4, 12), 192, 192, 48),
    ("v5p-12288", (16, 16, 24), 6144, 6144, 1536),
    ("v6e-8", (2, 4), 8, 8, 1),
    ("v6e-256", (16, 16), 256, 256, 64),
    ("tpu7x-2", (1, 1, 1), 1, 2, 1),
    ("tpu7x-128", (4, 4, 4), 64, 128, 16),
    ("tpu7x-18432", (16, 24, 24), 9216, 18432, 2304),
    ("v5p:4x4x4", (4, 4, 4), 64, 64, 16),
    ("v5p:4x4x16", (4, 4, 16), 256, 256, 64),  # v5p-512 would be 4x8x8
    ("2xv5e-256", (16, 16), 512, 512, 128),
    ("4xv5p:4x4x8", (4, 4, 8), 512, 512, 128),
    ("h100-8", (8,), 8, 8, 1),
    ("2xh100-8", (8,), 16, 16, 2),
    ("a100-1", (1,), 1, 1, 1),
    ("cpu-8", (8,), 8, 8, 1),
    ("2xcpu-4", (4,), 8, 8, 2),
]


@pytest.mark.parametrize(("name", "shape", "chips", "devices", "hosts"), ROWS)
def test_a_name_is_the_slice_of_the_clouds_table(name, shape, chips, devices, hosts):
    found = topologies.parse(name)
    assert (found.shape, found.num_chips, found.num_devices, found.hosts) == (
        shape,
        chips,
        devices,
        hosts,
    )


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5p-128", (True, True, True)),
        ("v5p-64", (False, False, False)),
        ("v5e-256", (True, True)),
        ("v5e-128", (False, True)),
        ("v6e-64", (False, False)),
        ("h100-8", (False,)),
    ],
)
def test_only_whole_cubes_and_full_sides_of_sixteen_close_into_rings(name, wraps):
    assert topologies.parse(name).wraps == wraps


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p-100", r"'v5p-100'.*v5p-64 and v5p-128.*TensorCores"),
        ("v5e-512", r"'v5e-512'.*nearest: v5e-256\..*2xv5e-256"),
        ("v6e-2", r"v6e-1 and v6e-4"),
        ("h100-16", r"nearest: h100-8.*2xh100-8"),
        ("v5p:4x4x6", r"no v5p slice has the shape 4x4x6; nearest: 4x4x4.*multiple of 4"),
        ("v5p:8x4x4", r"nearest: 4x4x8"),
        ("v5e:4x2", r"nearest: 2x4"),
        ("v9-8", r"'v9-8' is unknown.*v5p:4x4x8.*tpu7x"),
        ("v5p", r"is unknown; write CHIP-N"),
        ("0xv5e-8", r"no slices"),
        ("v5p-", r"is unknown"),
        ("cpu-0", r"nearest: cpu-1"),
    ],
)
def test_a_wrong_name_is_told_what_would_do(name, says):
    with pytest.raises(ValueError, match=says):
        topologies.parse(name)


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_every_shape_that_is_sold_can_be_written_and_counts_right(chip):
    factor = 2 if chip.counts == "cores" else 1
    shapes = topologies.shapes(chip)
    assert len(set(shapes)) == len(shapes)
    by_count = {}
    for shape in shapes:
        text = "x".join(map(str, shape))
        found = topologies.parse(f"{chip.name}:{text}")
        assert found.hosts * found.chips_per_host == found.num_chips == math.prod(shape)
        by_count.setdefault(math.prod(shape), shape)
    for count, shape in by_count.items():
        found = topologies.parse(f"{chip.name}-{factor * count}")
        assert found.shape == shape
        assert topologies.parse(found.cloud_name).shape == shape


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_a_chip_is_found_by_each_of_its_device_kinds(chip):
    for kind in chip.device_kinds:
        assert chips.chip_of(kind) is chip
        assert chips.chip_of(f"{kind} 80GB HBM3") is not None


def test_a_program_may_use_no_more_than_the_chip_has():
    for chip in chips.CHIPS.values():
        if chip.hbm_bytes is not None:
            assert 0.9 * chip.hbm_bytes < chip.usable_hbm_bytes < 1.06 * chip.hbm_bytes


def test_a_device_of_tpu7x_is_half_a_chip():
    chip = chips.CHIPS["tpu7x"]
    assert chip.device_hbm_bytes * 2 == chip.usable_hbm_bytes
    assert chip.device_flops * 2 == chip.peak_flops


_DESCRIBE = """
import json, sys
from jax.experimental import topologies as ahead
from configs.hardware import topologies
for name in sys.argv[1:]:
    found = topologies.parse(name)
    devices = ahead.get_topology_desc(
        platform="tpu", topology_name=found.topology_name, **found.topology_options
    ).devices
    hosts = len({(getattr(d, "slice_index", 0), d.process_index) for d in devices})
    print(json.dumps([name, len(devices), hosts, devices[0].device_kind]))
"""


def test_libtpu_knows_each_slice_by_the_same_numbers():
    """The TPU's own compiler, in a process of its own: it reads its environment at start-up."""
    names = [row[0] for row in ROWS if topologies.parse(row[0]).chip.platform == "tpu"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _DESCRIBE, *names],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == names
    for name, devices, hosts, kind in lines:
        expected = topologies.parse(name)
        assert (devices, hosts) == (expected.num_devices, expected.hosts), name
        assert chips.chip_of(kind) is expected.chip
