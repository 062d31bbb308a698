"""Shortest time of a step: operations, memory traffic and transfers at the chip's peaks.

The model: arithmetic and HBM traffic run beside each other, and beside the transfers that have
arithmetic to hide behind (weights of the next layers, a ring's keys and values); every other
transfer stops the core. With times of one step,

    step = max(compute, HBM, hidden transfers) + exposed transfers

Every unit runs at its data sheet's peak, so a real step takes longer: published runs reach half to
three quarters of the peak in arithmetic.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from qwen_jax.analysis import flops
from qwen_jax.analysis.plan import communication, layer
from qwen_jax.analysis.plan import job as job_lib
from qwen_jax.analysis.plan.job import Job


@dataclass(frozen=True, kw_only=True)
class Step:
    """Time of one optimizer step, one evaluation batch, or one decoded token of every slot.

    flops: operations of a device, repeated ones included; `repeated` of them are a remat policy's.
    seconds: the time of each resource alone; empty where the device's peaks are unknown.
    """

    flops: float
    repeated: float
    hbm_bytes: float
    transfers: list[communication.Transfer]
    seconds: dict[str, float]
    step_seconds: float | None
    tokens: float  # of all devices in one step
    mfu_causal: float | None
    mfu_full: float | None
    binds: str

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.step_seconds is None else self.tokens / self.step_seconds


def estimate(job: Job) -> Step:
    """The roofline of one step."""
    devices, chip = job.where.num_devices, job.where.chip
    tokens = _tokens(job)
    useful, full = (_useful(job, tokens, kind) / devices for kind in ("causal", "full"))
    repeated = 0.0
    if job.purpose == "train":
        repeated = layer.repeated_per_token(job) * tokens / devices
    total = useful + repeated
    traffic = hbm_bytes(job)
    found = communication.transfers(job)
    seconds, step_seconds, binds = {}, None, "not known: the device has no data sheet"
    if chip.device_flops is not None:
        hidden = _transfer_seconds(job, [t for t in found if t.overlapped])
        exposed = _transfer_seconds(job, [t for t in found if not t.overlapped])
        seconds = {
            "compute": total / chip.device_flops,
            "HBM": traffic / chip.device_hbm_bytes_per_second,
            "hidden transfers": hidden,
            "exposed transfers": exposed,
        }
        first = max(("compute", "HBM", "hidden transfers"), key=seconds.get)
        step_seconds = seconds[first] + exposed
        binds = first if seconds[first] >= exposed else "exposed transfers"
    peak = step_seconds and chip.device_flops * step_seconds
    return Step(
        flops=total,
        repeated=repeated,
        hbm_bytes=traffic,
        transfers=found,
        seconds=seconds,
        step_seconds=step_seconds,
        tokens=tokens,
        mfu_causal=useful / peak if peak else None,
        mfu_full=full / peak if peak else None,
        binds=binds,
    )


def _tokens(job: Job) -> float:
    rows = job.config.batch_size if job.purpose == "train" else (job.rows * job.replicas)
    return float(rows * (1 if job.purpose == "decode" else job.length))


def _useful(job: Job, tokens: float, attention: flops.Attention) -> float:
    """Model operations of one step, all devices together."""
    if job.purpose == "train":
        return tokens * flops.train_per_token(job.cfg, length=job.length, attention=attention)
    # A decoded token attends to the whole cache: no causal mask halves the products.
    kind = "full" if job.purpose == "decode" else attention
    seen = flops.attention_per_token(job.cfg, length=job.length, attention=kind)
    return tokens * (2.0 * flops.matmul_parameters(job.cfg) + seen)


def hbm_bytes(job: Job) -> float:
    """Bytes of HBM that a device reads and writes in one step, at least.

    State read and written once, gathered weights written and read in every pass, kept activations
    written and read, logits of the loss written once and read three times.
    """
    itemsize = jnp.dtype(job.config.compute_dtype).itemsize
    leaves = job_lib.parameters(job)
    held = sum(leaf.local_size for leaf in leaves)
    gathered = sum(leaf.gathered_size for leaf in leaves)
    if job.purpose == "decode":
        kv_heads = job.cfg.num_key_value_heads / job.layout.size("act_kv_heads")
        cache = 2 * job.cfg.num_hidden_layers * job.rows * job.length * kv_heads
        return itemsize * (held + cache * job.cfg.head_dim)
    device, host = layer.saved_elements(job)
    kept = job.tokens * job.cfg.num_hidden_layers * (device + host) * itemsize
    logits = 4 * 4 * job.tokens * job.cfg.vocab_size / job.layout.size("act_vocab")
    if job.purpose == "eval":
        return 4 * held + 2 * itemsize * gathered + logits
    moment = jnp.dtype(job.config.optimizer.moment_dtype).itemsize
    state = 2 * (4 + 4 + moment) * held + (4 + itemsize) * held
    each = 2 * itemsize * gathered + 2 * itemsize * gathered + 2 * kept + logits
    return state + job.config.accumulate_steps * each


def _transfer_seconds(job: Job, found: list[communication.Transfer]) -> float:
    return sum(t.num_bytes / bandwidth(job, t.axes, links=t.links) for t in found)


def bandwidth(job: Job, axes: tuple[str, ...], *, links: Literal["all", "one"] = "all") -> float:
    """Bytes per second that a device sends over mesh axes, in a collective or in a ring's hop.

    Every side of the torus that an axis takes has one link, and a second one the other way round
    where it closes into a ring; a hop uses one. What a TPU slice's machines share of the
    data-centre network, and what GPUs of several hosts share, is divided by the devices of a
    machine.
    """
    chip, where = job.where.chip, job.where
    flat = chip.torus_rank == 0
    if axes == ("dcn",) or (flat and job_lib.spans_hosts(job.config.mesh, where, axes)):
        return chip.dcn_bytes_per_second / (where.chips_per_host * chip.devices)
    if flat:
        return chip.ici_bytes_per_second * chip.ici_links
    sides = job_lib.sides(job.config.mesh, where) or {}
    taken = [side for axis in axes for side in sides.get(axis, ())]
    rings = dict(zip(where.shape, where.wraps, strict=True))
    # Sides of 1 or 2 have one link each way; the two devices of a tpu7x chip are nearer than that.
    count = sum(2 if rings.get(side) and side > 2 else 1 for side in taken)
    return chip.ici_bytes_per_second * (1 if links == "one" else max(count, 1)) / chip.devices
