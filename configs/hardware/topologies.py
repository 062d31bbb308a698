"""Slices: chips joined by a fast network, by the names that the clouds sell them under.

Names, N being what the cloud counts (`Chip.counts`):

    v4-N  v5p-N  tpu7x-N       TensorCores, two a chip: v5p-256 is 128 chips, a torus of 4x4x8
    v5e-N (v5litepod-N)  v6e-N chips: v5e-256 is 16x16
    h100-N  h200-N  a100-N     GPUs of one host, at most 8
    cpu-N                      N fake devices of one process
    v5p:4x4x8                  a TPU slice by its shape
    2xv5e-256  4xh100-8        several slices, or GPU hosts, joined by the data-centre network

Sources: the configuration tables of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; how
tpu7x-N counts, and which shape is the standard one of a number of cubes: xpk's
system_characteristics.py; rings: "How to Scale Your Model", jax-ml.github.io/scaling-book, TPUs.
"""

import math
import re

from configs import schema
from configs.hardware.chips import CHIPS, Chip


@schema.config()
class Slice:
    """`num_slices` equal slices: chips that share one fast network, each slice of `shape`."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of the torus; (N,) where there is none
    num_slices: int = 1

    @property
    def chips_per_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        return self.chips_per_slice * self.num_slices

    @property
    def devices_per_slice(self) -> int:
        return self.chips_per_slice * self.chip.devices

    @property
    def num_devices(self) -> int:
        """jax devices of all slices together."""
        return self.devices_per_slice * self.num_slices

    @property
    def chips_per_host(self) -> int:
        """Chips of one machine. A 2x4 of v5e or v6e is one machine of eight, no pair of fours."""
        if self.chip.torus_rank == 2 and self.chips_per_slice <= 8:
            return self.chips_per_slice
        return min(self.chips_per_slice, self.chip.chips_per_host)

    @property
    def hosts_per_slice(self) -> int:
        return self.chips_per_slice // self.chips_per_host

    @property
    def hosts(self) -> int:
        """Machines of all slices, which is jax processes."""
        return self.hosts_per_slice * self.num_slices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dimension closes into a ring.

        In three dimensions the optical switches close whole cubes of 4x4x4, all dimensions or
        none; in two only a full side of 16 is closed (scaling book, TPU networking).
        """
        if self.chip.torus_rank == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(self.chip.torus_rank == 2 and size == 16 for size in self.shape)

    @property
    def shape_name(self) -> str:
        """Shape as text, such as 4x4x8."""
        return "x".join(map(str, self.shape))

    @property
    def topology_name(self) -> str | None:
        """Name for `jax.experimental.topologies.get_topology_desc`; `None` unless a TPU."""
        return f"{self.chip.name}:{self.shape_name}" if self.chip.platform == "tpu" else None

    @property
    def topology_options(self) -> dict[str, object]:
        """The other arguments of `get_topology_desc`.

        Without `chip_config_name` libtpu would make two devices of a v4 chip; without
        `chips_per_host_bounds` it refuses slices of one chip and cuts 2x4 in two machines.
        """
        host = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}[self.chips_per_host]
        options: dict[str, object] = {
            "num_slices": self.num_slices,
            "chips_per_host_bounds": host,
            "wrap": (*self.wraps, False)[:3],
        }
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"
        return options

    @property
    def cloud_name(self) -> str:
        """One slice as gcloud's --accelerator-type has it, such as v5litepod-256."""
        factor = 2 if self.chip.counts == "cores" else 1
        return f"{self.chip.cloud_prefix or self.chip.name}-{factor * self.chips_per_slice}"


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_LESS_THAN_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LONGEST_SIDE = 256


def shapes(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """Every shape that one slice can have, by number of chips; the standard one of a number first.

    Three dimensions: parts of a cube, then whole cubes, sides ascending. The standard shape of a
    number of cubes is the most compact, which is also xpk's default.
    """
    if chip.torus_rank == 2:
        return _FLAT
    if chip.torus_rank == 0:
        sizes = (1, 2, 4, 8) if chip.platform == "gpu" else range(1, chip.max_chips + 1)
        return tuple((size,) for size in sizes)
    single = ((1, 1, 1),) if chip.name == "tpu7x" else ()
    sides = range(4, _LONGEST_SIDE + 1, 4)
    cubes = [
        (a, b, c)
        for a in sides
        if a**3 <= chip.max_chips
        for b in sides
        if a <= b and a * b * b <= chip.max_chips
        for c in sides
        if b <= c and a * b * c <= chip.max_chips
    ]
    return (
        *single,
        *_LESS_THAN_A_CUBE,
        *sorted(cubes, key=lambda shape: (math.prod(shape), sum(shape), shape)),
    )


_FORM = re.compile(r"(?:(\d+)x)?([a-z][a-z0-9]*)(?:-(\d+)|:(\d+(?:x\d+)*))")


def parse(name: str) -> Slice:
    """The slice of that name; see the head of this file for the form.

    Raises:
        ValueError: for another form, an unknown chip, and a size or shape that is not sold. It
            names the value, what would do, and the form.
    """
    match = _FORM.fullmatch(name)
    prefix = match and ("v5e" if match[2] == "v5litepod" else match[2])
    if not match or prefix not in CHIPS:
        raise ValueError(
            f"topology={name!r} is unknown; write CHIP-N, CHIP:SHAPE or SLICESxCHIP-N, such as "
            f"v5p-128, v5p:4x4x8, 2xv5e-256 or cpu-8, with CHIP one of {', '.join(CHIPS)}"
        )
    chip = CHIPS[prefix]
    num_slices = int(match[1] or 1)
    if num_slices < 1:
        raise ValueError(f"topology={name!r} has no slices; leave '{match[1]}x' out for one")
    if match[3]:
        shape = _standard_shape(chip, int(match[3]), name=name)
    else:
        shape = _explicit_shape(chip, match[4], name=name)
    return Slice(name=name, chip=chip, shape=shape, num_slices=num_slices)


def _standard_shape(chip: Chip, count: int, *, name: str) -> tuple[int, ...]:
    factor = 2 if chip.counts == "cores" else 1
    sold: dict[int, tuple[int, ...]] = {}
    for shape in shapes(chip):
        sold.setdefault(factor * math.prod(shape), shape)
    if count in sold:
        return sold[count]
    smaller = max((size for size in sold if size < count), default=None)
    larger = min((size for size in sold if size > count), default=None)
    nearest = " and ".join(f"{chip.name}-{size}" for size in (smaller, larger) if size)
    counts = "TensorCores, two a chip" if factor == 2 else "chips"
    raise ValueError(
        f"topology={name!r}: no slice of {count}; nearest: {nearest}. {chip.name}-N counts "
        f"{counts}; several slices are written as 2x{chip.name}-{max(sold)}"
    )


def _explicit_shape(chip: Chip, text: str, *, name: str) -> tuple[int, ...]:
    shape = tuple(map(int, text.split("x")))
    sold = shapes(chip)
    if shape in sold:
        return shape
    chips = math.prod(shape)
    nearest = sorted(sold, key=lambda other: abs(math.prod(other) - chips))[:3]
    listed = ", ".join("x".join(map(str, other)) for other in nearest)
    rule = {
        3: "three sides, ascending, each a multiple of 4, or a part of one cube (2x2x1 to 2x4x4)",
        2: "two sides, ascending, of 1x1 to 16x16",
        0: "one number",
    }[chip.torus_rank]
    raise ValueError(
        f"topology={name!r}: no {chip.name} slice has the shape {text}; nearest: {listed}. "
        f"A shape is {rule}, at most {chip.max_chips} chips"
    )
