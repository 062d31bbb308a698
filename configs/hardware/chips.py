"""Chips: one table of hardware facts, for times, memory and launch files.

Sources: [cloud] docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, system architecture;
[gke] the machine types of GKE's TPU page and of xpk's system_characteristics.py; [book] "How to
Scale Your Model", jax-ml.github.io/scaling-book, TPUs, which puts what a link carries at nine
tenths of [cloud]'s figure; [libtpu] the limit that libtpu 0.0.42.1 itself names when a program
does not fit; [nvidia] the data sheets of A100, H100, H200 and of the DGX.
"""

from typing import Literal

from configs import schema

GiB = 2**30


@schema.config()
class Chip:
    """One kind of accelerator. Every figure is for a chip; `devices` says how many jax sees of it.

    `None` where the figure is not known, or means nothing: a fake CPU device has no peak.
    """

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    # How `jax.Device.device_kind` begins; among all chips the longest match wins.
    device_kinds: tuple[str, ...]
    # jax devices a chip: 2 on tpu7x, whose two chiplets each own half of the memory. On v4 and v5p
    # the two TensorCores act as one device ("megacore").
    devices: int = 1
    counts: Literal["chips", "cores"] = "chips"  # what N of the cloud's name counts
    peak_flops: float | None  # dense bfloat16 operations a second
    hbm_bytes: int | None  # as sold
    usable_hbm_bytes: int | None  # what a program may use of it
    hbm_bytes_per_second: float | None
    # Neighbours in the torus: two links per dimension. A GPU has one link, to the host's switch.
    ici_links: int
    ici_bytes_per_second: float | None  # one link, one direction
    torus_rank: int  # 2 or 3; 0 where there is no torus
    chips_per_host: int  # of a machine of a slice that spans machines
    host_memory_bytes: int | None  # of that machine
    dcn_bytes_per_second: float | None  # of that machine, each direction
    max_chips: int  # of one slice
    machine_type: str | None = None  # on Compute Engine and GKE, slices that span machines
    gke_accelerator: str | None = None  # the node label cloud.google.com/gke-tpu-accelerator
    cloud_prefix: str | None = None  # of gcloud's --accelerator-type, before "-N"

    @property
    def device_flops(self) -> float | None:
        """Peak bfloat16 operations a second of one jax device."""
        return None if self.peak_flops is None else self.peak_flops / self.devices

    @property
    def device_hbm_bytes(self) -> int | None:
        """Bytes of one JAX device's memory that a program may use."""
        return None if self.usable_hbm_bytes is None else self.usable_hbm_bytes // self.devices

    @property
    def device_hbm_bytes_per_second(self) -> float | None:
        """Memory bandwidth of one jax device."""
        rate = self.hbm_bytes_per_second
        return None if rate is None else rate / self.devices


_TPUS = (
    Chip(
        name="v4",
        platform="tpu",
        device_kinds=("TPU v4",),
        counts="cores",
        peak_flops=275e12,  # [cloud]
        hbm_bytes=32 * GiB,  # [cloud]
        usable_hbm_bytes=int(30.75 * GiB),  # [libtpu], with chip_config_name="megacore"
        hbm_bytes_per_second=1200e9,  # [cloud]
        ici_links=6,
        ici_bytes_per_second=45e9,  # [book]
        torus_rank=3,
        chips_per_host=4,
        host_memory_bytes=407 * GiB,  # [gke] ct4p-hightpu-4t
        dcn_bytes_per_second=25e9,  # [book] "typically"
        max_chips=4096,
        machine_type="ct4p-hightpu-4t",
        gke_accelerator="tpu-v4-podslice",
        cloud_prefix="v4",
    ),
    Chip(
        name="v5e",
        platform="tpu",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        peak_flops=197e12,  # [cloud]
        hbm_bytes=16 * GiB,  # [cloud]
        usable_hbm_bytes=int(15.75 * GiB),  # [libtpu]
        hbm_bytes_per_second=819e9,  # [cloud]
        ici_links=4,
        ici_bytes_per_second=45e9,  # [book]
        torus_rank=2,
        chips_per_host=4,
        host_memory_bytes=192 * GiB,  # [gke] ct5lp-hightpu-4t
        dcn_bytes_per_second=12.5e9,  # [cloud] 6.4 Tb/s a pod of 64 machines
        max_chips=256,
        machine_type="ct5lp-hightpu-4t",
        gke_accelerator="tpu-v5-lite-podslice",
        cloud_prefix="v5litepod",
    ),
    Chip(
        name="v5p",
        platform="tpu",
        device_kinds=("TPU v5", "TPU v5p"),
        counts="cores",
        peak_flops=459e12,  # [cloud]
        hbm_bytes=95 * GiB,  # [cloud]
        usable_hbm_bytes=int(95.74 * GiB),  # [libtpu]; the chip has 96 and is sold as 95
        hbm_bytes_per_second=2765e9,  # [cloud]
        ici_links=6,
        ici_bytes_per_second=90e9,  # [book]; [cloud] 1200 GB/s a chip, both directions
        torus_rank=3,
        chips_per_host=4,
        host_memory_bytes=448 * GiB,  # [cloud]
        dcn_bytes_per_second=25e9,  # [cloud] 50 Gb/s a chip
        max_chips=6144,  # [cloud]: the largest job is 96 cubes of a pod's 140
        machine_type="ct5p-hightpu-4t",
        gke_accelerator="tpu-v5p-slice",
        cloud_prefix="v5p",
    ),
    Chip(
        name="v6e",
        platform="tpu",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        peak_flops=918e12,  # [cloud]
        hbm_bytes=32 * GiB,  # [cloud]
        usable_hbm_bytes=int(31.25 * GiB),  # [libtpu]
        hbm_bytes_per_second=1638e9,  # [cloud]
        ici_links=4,
        ici_bytes_per_second=90e9,  # [book]; [cloud] 800 GB/s a chip, both directions
        torus_rank=2,
        chips_per_host=4,
        host_memory_bytes=720 * GiB,  # [cloud]
        dcn_bytes_per_second=50e9,  # [cloud] 100 Gb/s a chip
        max_chips=256,
        machine_type="ct6e-standard-4t",
        gke_accelerator="tpu-v6e-slice",
        cloud_prefix="v6e",
    ),
    Chip(
        name="tpu7x",
        platform="tpu",
        device_kinds=("TPU7x",),
        devices=2,
        counts="cores",
        peak_flops=2307e12,  # [cloud]
        hbm_bytes=192 * GiB,  # [cloud]
        usable_hbm_bytes=int(189.5 * GiB),  # [libtpu] 94.75 GiB a device
        hbm_bytes_per_second=7380e9,  # [cloud]
        ici_links=6,
        ici_bytes_per_second=90e9,  # nine tenths of [cloud]'s 1200 GB/s over 6 links, both ways
        torus_rank=3,
        chips_per_host=4,
        host_memory_bytes=960 * GiB,  # [cloud]
        dcn_bytes_per_second=50e9,  # [cloud] 100 Gb/s a chip
        max_chips=9216,
        machine_type="tpu7x-standard-4t",
        gke_accelerator="tpu7x",
        cloud_prefix="tpu7x",
    ),
)


def _gpu(
    name: str,
    kinds: tuple[str, ...],
    *,
    peak_flops: float,
    hbm_bytes: float,
    usable_gib: float,
    hbm_bytes_per_second: float,
    nvlink: float,
    network: float,
) -> Chip:
    """A GPU in hosts of 8. `usable_gib` is what the driver and CUDA leave, before XLA's own limit

    (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 of it unless set).
    """
    return Chip(
        name=name,
        platform="gpu",
        device_kinds=kinds,
        peak_flops=peak_flops,
        hbm_bytes=int(hbm_bytes),
        usable_hbm_bytes=int(usable_gib * GiB),
        hbm_bytes_per_second=hbm_bytes_per_second,
        ici_links=1,
        ici_bytes_per_second=nvlink,
        torus_rank=0,
        chips_per_host=8,
        host_memory_bytes=2 * 10**12,  # [nvidia] DGX
        dcn_bytes_per_second=network,
        max_chips=8,
    )


# [nvidia] throughout. NVLink 4: 900 GB/s a GPU, both directions; NVLink 3: 600. The DGX H100 and
# H200 have eight network ports of 400 Gb/s, the DGX A100 eight of 200. The PCIe cards are here for
# what `device_kind` says of one card; their hosts differ, and the link is PCIe 5 x16.
_GPUS = (
    _gpu(
        "h100",
        ("NVIDIA H100",),
        peak_flops=989e12,
        hbm_bytes=80e9,
        usable_gib=78,
        hbm_bytes_per_second=3350e9,
        nvlink=450e9,
        network=400e9,
    ),
    _gpu(
        "h100pcie",
        ("NVIDIA H100 PCIe",),
        peak_flops=756e12,
        hbm_bytes=80e9,
        usable_gib=78,
        hbm_bytes_per_second=2000e9,
        nvlink=64e9,
        network=50e9,
    ),
    _gpu(
        "h100nvl",
        ("NVIDIA H100 NVL",),
        peak_flops=835e12,
        hbm_bytes=94e9,
        usable_gib=92,
        hbm_bytes_per_second=3900e9,
        nvlink=64e9,
        network=50e9,
    ),
    _gpu(
        "h200",
        ("NVIDIA H200",),
        peak_flops=989e12,
        hbm_bytes=141e9,
        usable_gib=139,
        hbm_bytes_per_second=4800e9,
        nvlink=450e9,
        network=400e9,
    ),
    _gpu(
        "a100",
        ("NVIDIA A100",),
        peak_flops=312e12,
        hbm_bytes=80e9,
        usable_gib=78,
        hbm_bytes_per_second=2039e9,
        nvlink=300e9,
        network=200e9,
    ),
)

_CPU = Chip(
    name="cpu",
    platform="cpu",
    device_kinds=("cpu",),
    peak_flops=None,
    hbm_bytes=None,
    usable_hbm_bytes=None,
    hbm_bytes_per_second=None,
    ici_links=0,
    ici_bytes_per_second=None,
    torus_rank=0,
    chips_per_host=512,  # XLA_FLAGS=--xla_force_host_platform_device_count
    host_memory_bytes=None,
    dcn_bytes_per_second=None,
    max_chips=512,
)

CHIPS = {chip.name: chip for chip in (*_TPUS, *_GPUS, _CPU)}


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose `device_kinds` is the longest beginning of `device_kind`, if there is one."""
    fits = [
        (len(kind), chip.name)
        for chip in CHIPS.values()
        for kind in chip.device_kinds
        if device_kind.startswith(kind)
    ]
    return CHIPS[max(fits)[1]] if fits else None
