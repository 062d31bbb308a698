"""XLA's compiler flags for each chip, in one table, with the reason of each.

Two ways to pass them. A real run reads the environment when jax starts: `environment(chip)` gives
LIBTPU_INIT_ARGS or XLA_FLAGS, and `qwen-jax launch` writes it into its files. A compile ahead of
time takes them as arguments: `jax.jit(f).lower(...).compile(compiler_options=options(chip))`.

What a TPU flag does was read from programs that libtpu 0.0.42.1 compiled through jaxlib 0.10.2, not
timed on a TPU; docs/xla_flags.md keeps the figures. The GPU's were timed with FSDP on two H100 of a
host (docs/experiments/training.md); between hosts they were not. An unknown flag is refused by
name, so a libtpu that dropped one fails at once.
"""

from configs import schema
from configs.hardware.chips import Chip

Value = bool | int


@schema.config()
class Flag:
    """One flag: its value, the chips it is for, and why."""

    name: str
    value: Value
    chips: tuple[str, ...]
    reason: str


_GPUS = ("h100", "h100nvl", "h100pcie", "h200", "a100")

FLAGS = (
    Flag(
        name="xla_enable_async_all_gather",
        value=True,
        chips=("v4", "v5p", "v6e"),
        reason="lets a gather of weights start before it is needed; alone it changes nothing",
    ),
    Flag(
        name="xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        value=True,
        chips=("v4", "v5p", "v6e"),
        reason=(
            "runs the steps of a gather inside the matrix products around it: half to three "
            "quarters of FSDP's gathers overlap, none without it. v5e does it by default; tpu7x "
            "gathers on its SparseCores"
        ),
    ),
    Flag(
        name="xla_enable_async_all_reduce",
        value=True,
        chips=("v5p", "v6e"),
        reason="the same for the reduction of gradients; alone it changes nothing",
    ),
    Flag(
        name="xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
        value=True,
        chips=("v5p", "v6e"),
        reason="two thirds of the gradients' reductions overlap, none without it",
    ),
    Flag(
        name="xla_tpu_scoped_vmem_limit_kib",
        value=49152,
        chips=("v6e",),
        reason=(
            "bigger tiles for each operation, 48 of 128 MiB: a tenth fewer cycles in fusions. Not "
            "on v5p: of its 64 MiB the fused collectives need the rest, and 48 does not compile"
        ),
    ),
    Flag(
        name="xla_gpu_enable_latency_hiding_scheduler",
        value=True,
        chips=_GPUS,
        reason="orders NCCL calls so that products run meanwhile; without it 0.7% slower",
    ),
    Flag(
        name="xla_gpu_all_gather_combine_threshold_bytes",
        value=2**28,
        chips=_GPUS,
        reason=(
            "gathers one layer's weights in one call, not one call each; 256 MiB holds a layer. "
            "With the two below, 0.5 to 1.3% of a step"
        ),
    ),
    Flag(
        name="xla_gpu_reduce_scatter_combine_threshold_bytes",
        value=2**28,
        chips=_GPUS,
        reason="the same for one layer's gradients",
    ),
    Flag(
        name="xla_gpu_all_reduce_combine_threshold_bytes",
        value=2**28,
        chips=_GPUS,
        reason="the same where gradients are reduced whole",
    ),
)


# For libtpu as a compiler on a machine without TPUs; read when jax is imported.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes compile at one time
    # Without these, libtpu complains on stderr that it cannot find out which TPU this is.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}


def options(chip: Chip) -> dict[str, Value]:
    """`compiler_options` of a compile for `chip`; empty where XLA's defaults are the best known."""
    return {flag.name: flag.value for flag in FLAGS if chip.name in flag.chips}


def environment(chip: Chip) -> dict[str, str]:
    """The same flags as the variable that jax reads at start-up; empty where there are none."""
    words = [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in options(chip).items()
    ]
    variable = {"tpu": "LIBTPU_INIT_ARGS", "gpu": "XLA_FLAGS"}.get(chip.platform)
    return {variable: " ".join(words)} if variable and words else {}
