"""All legal settings for a model on a slice, the best of them, and the slices to rent."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from configs import mesh as mesh_config
from configs.hardware import chips, topologies
from configs.hardware.topologies import Slice
from configs.mesh import MeshConfig
from configs.models import remat
from configs.models.architecture import ModelConfig
from configs.train import TrainConfig
from qwen_jax.analysis.plan import job as job_lib
from qwen_jax.analysis.plan import layer, memory, roofline
from qwen_jax.analysis.plan.job import Job, Purpose

# Share of a device's memory kept free for fragmentation, the program's code and estimation error.
RESERVE = 0.1
ROWS = (1, 2, 4, 8, 16)
DECODE_ROWS = (1, 4, 16, 64, 256)
_RENTED = ("v5e", "v6e", "v4", "v5p", "tpu7x", "a100", "h100", "h200")
_MOST_CHIPS = 256  # of a slice that is proposed
_HOSTS = (1, 2, 4, 8, 16, 32)  # GPU hosts of eight that are proposed


@dataclass(frozen=True)
class Candidate:
    """A job with the memory that it needs and the time that it takes."""

    job: Job
    memory: memory.Memory

    @functools.cached_property
    def step(self) -> roofline.Step:
        """The time of a step, computed only for candidates that fit or are shown."""
        return roofline.estimate(self.job)

    @property
    def policy(self) -> str:
        return self.job.config.remat

    def fits(self) -> bool:
        """Whether the job leaves the reserve free; true where the device's memory is unknown."""
        limit = memory.limit(self.job, reserve=RESERVE)
        return limit is None or self.memory.total <= limit

    @property
    def speed(self) -> float:
        """Tokens per second and chip; tokens per operation where the peaks are unknown."""
        rate = self.step.tokens_per_second
        if rate is None:
            return self.step.tokens / self.step.flops
        return rate / self.job.where.num_chips


def evaluate(job: Job) -> Candidate:
    """The job with its estimates."""
    return Candidate(job, memory.estimate(job))


def meshes(cfg: ModelConfig, where: Slice) -> list[MeshConfig]:
    """The meshes that fit the slice's torus, whether or not the model divides over them.

    TPU slices are replicas over `data`. GPU hosts may be too, or axes may span them.
    """
    free = [side for side in job_lib.torus(where) if side > 1]
    if where.chip.torus_rank == 0:
        free = _prime_factors(where.devices_per_slice)
    axes = [axis for axis in mesh_config.MESH_AXES if axis != "expert" or cfg.moe is not None]
    found = [MeshConfig(**sizes, dcn_data=where.num_slices) for sizes in _owners(tuple(free), axes)]
    if where.chip.torus_rank == 0 and where.num_slices > 1:
        found += [MeshConfig(**sizes) for sizes in _owners(_prime_factors(where.num_devices), axes)]
    return found


def _owners(sides: Sequence[int], axes: list[str]) -> list[dict[str, int]]:
    """All assignments of the sides to the axes, as sizes of the axes."""
    assignments = {tuple(1 for _ in axes)}
    for side in sides:
        assignments = {
            tuple(size * side if i == owner else size for i, size in enumerate(sizes))
            for sizes in assignments
            for owner in range(len(axes))
        }
    others = dict.fromkeys(mesh_config.MESH_AXES, 1)
    return [others | dict(zip(axes, sizes, strict=True)) for sizes in sorted(assignments)]


def _prime_factors(n: int) -> list[int]:
    found = []
    for p in range(2, n + 1):
        while n % p == 0:
            found.append(p)
            n //= p
    return found


def candidates(
    cfg: ModelConfig,
    config: TrainConfig,
    where: Slice,
    *,
    purpose: Purpose = "train",
    mesh: MeshConfig | None = None,
    policy: str | None = None,
    rows: int | None = None,
    batch: int | None = None,
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """The candidates that divide, best first, and (mesh, reason) of the meshes that do not.

    Given settings are fixed; those that are None are searched. `batch` counts the sequences of a
    whole step, in as many micro-batches as it takes; None: one micro-batch, as large as pays.
    Candidates that fit come first, fastest first; then those that do not, smallest first.
    """
    found, refused = [], []
    for each in meshes(cfg, where) if mesh is None else [mesh]:
        try:
            found += _candidates_on_mesh(cfg, config, where, purpose, each, policy, rows, batch)
        except ValueError as error:
            if mesh is not None:
                raise
            refused.append((job_lib.mesh_text(each), str(error)))
    found.sort(key=_rank)
    return found, refused


def _rank(one: Candidate) -> tuple:
    if not one.fits():
        return (1, one.memory.total)
    # Equally fast candidates are ranked by memory.
    return (0, -round(one.speed, 3), one.memory.total)


def _candidates_on_mesh(cfg, config, where, purpose, mesh, policy, rows, batch) -> list[Candidate]:
    """The candidates on one mesh: every policy, with more rows up to the first that do not fit."""
    config = dataclasses.replace(config, mesh=mesh, accumulate_steps=1)
    counts = [rows] if rows else (DECODE_ROWS if purpose == "decode" else ROWS)
    first = job_lib.make(cfg, config, where, rows=counts[0], purpose=purpose)
    jobs = [_with_rows(first, count, batch) for count in counts if _divides(first, count, batch)]
    if not jobs:
        shards = first.replicas
        raise ValueError(
            f"a batch of {batch} rows does not spread over {shards} part(s) of {counts[0]} row(s); "
            f"use a multiple of {shards * counts[0]}, or axes that share rows (context, tensor)"
        )
    found = []
    for name in [policy] if policy else _policies(purpose):
        for job in jobs:
            config = dataclasses.replace(job.config, remat=name)
            found.append(evaluate(dataclasses.replace(job, config=config)))
            if not found[-1].fits():
                break
    return found


def _divides(job: Job, rows: int, batch: int | None) -> bool:
    return batch is None or batch % (rows * job.replicas) == 0


def _with_rows(job: Job, rows: int, batch: int | None) -> Job:
    """`job` with `rows` sequences per device and micro-batch, and the batch in micro-batches."""
    at_once = rows * job.replicas
    batch = batch or at_once
    config = dataclasses.replace(job.config, batch_size=batch, accumulate_steps=batch // at_once)
    return dataclasses.replace(job, config=config)


def _policies(purpose: Purpose) -> tuple[str, ...]:
    """The remat policies that are searched: `dots` keeps as much as `minimal`."""
    if purpose != "train":
        return ("full",)
    # Host memory is slower than HBM by an order, and this model of time does not know it: offloaded
    # policies are planned when they are asked for.
    return tuple(n for n in remat.POLICIES if n != "dots" and not layer.saved_tensors(n).offload)


def recommend(found: list[Candidate], refused: list[tuple[str, str]]) -> Candidate:
    """The best candidate that fits.

    Raises `ValueError` if nothing does: it names the smallest need, the limit, and what would fit.
    """
    if not found:
        mesh, reason = refused[-1]
        raise ValueError(f"no mesh divides; the last tried, {mesh}: {reason}")
    if found[0].fits():
        return found[0]
    least = found[0]
    job = least.job
    limit = memory.limit(job, reserve=RESERVE)
    larger = larger_slice(least)
    remedy = f"{larger.where.name} fits" if larger else "no larger slice of this chip fits either"
    raise ValueError(
        f"{job.cfg.name} at {job.length:,} tokens a row does not fit {job.where.name}: the least "
        f"need is {memory_text(least.memory.total)} a device (mesh {job.mesh_text}, remat "
        f"{least.policy}, {job.rows} row(s)), the limit is {memory_text(limit)} "
        f"({RESERVE:.0%} of the memory kept free); {remedy}" + _shorter(job)
    )


def memory_text(num_bytes: float) -> str:
    """Memory as text in GiB, three digits."""
    return f"{num_bytes / 2**30:.3g} GiB"


def _shorter(job: Job) -> str:
    """The advice to shorten rows, if the same mesh takes shorter ones; empty otherwise."""
    length = job.length // 2
    while length >= 512:
        data = dataclasses.replace(job.config.data, sequence_length=length)
        config = dataclasses.replace(job.config, data=data, remat="full")
        try:
            one = evaluate(dataclasses.replace(job, config=config))
        except ValueError:
            return ""
        if one.fits():
            return f"; or rows of at most {length:,} tokens here (--length {length})"
        length //= 2
    return ""


def larger_slice(least: Candidate) -> Job | None:
    """The job on the nearest larger slice of the same chip on which it fits."""
    job = least.job
    for where in slices(job.where.chip):
        if where.num_chips <= job.where.num_chips:
            continue
        plain = dataclasses.replace(job.config, mesh=MeshConfig())
        found, _ = candidates(job.cfg, plain, where, purpose=job.purpose, rows=1, policy="full")
        if found and found[0].fits():
            return found[0].job
    return None


def slices(chip: chips.Chip) -> list[Slice]:
    """The slices that are proposed, smallest first: standard shapes of 2^n chips; GPU hosts."""
    if chip.platform == "gpu":
        small = [f"{chip.name}-{n}" for n in (1, 2, 4)]
        whole = [f"{chip.name}-8", *(f"{n}x{chip.name}-8" for n in _HOSTS[1:])]
        return [topologies.parse(name) for name in (*small, *whole)]
    factor = 2 if chip.counts == "cores" else 1
    sizes = sorted({math.prod(shape) for shape in topologies.shapes(chip)})
    names = [
        f"{chip.name}-{factor * size}"
        for size in sizes
        if size <= min(_MOST_CHIPS, chip.max_chips) and size & (size - 1) == 0
    ]
    return [topologies.parse(name) for name in names]


@dataclass(frozen=True)
class SliceRanking:
    """Slices that fit, best first, and chips without one, with the reason.

    too_small: by chip, the largest slice that does not fit, with its least memory.
    """

    ranked: list[Candidate]
    skipped: dict[str, str]
    too_small: dict[str, Candidate]


def rank_slices(cfg: ModelConfig, config: TrainConfig, *, purpose: Purpose, **held) -> SliceRanking:
    """Ranking of the smallest slice that fits and the next larger one, for each chip.

    Slices are ranked by tokens per second and chip; within 5% the smaller one comes first.
    """
    ranked, skipped, too_small = [], {}, {}
    for name in _RENTED:
        fitting, least = 0, None
        for where in slices(chips.CHIPS[name]):
            found, refused = candidates(cfg, config, where, purpose=purpose, **held)
            if found and found[0].fits():
                ranked.append(found[0])
                fitting += 1
            else:
                least = found[0] if found else least
            if fitting == 2:
                break
        if not fitting:
            skipped[name] = _why_no_slice(where, least, refused)
        elif least is not None:
            too_small[name] = least
    ranked.sort(key=lambda one: (-round(math.log(one.speed) / 0.05), one.job.where.num_chips))
    return SliceRanking(ranked, skipped, too_small)


def _why_no_slice(where: Slice, least: Candidate | None, refused: list) -> str:
    if least is None:
        return f"no slice up to {where.name} divides; {refused[-1][1]}" if refused else "none"
    limit = memory.limit(least.job, reserve=RESERVE)
    return (
        f"no slice up to {where.name} fits: at least {memory_text(least.memory.total)} a device, "
        f"the limit is {memory_text(limit)}"
    )
