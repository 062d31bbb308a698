"""Bytes that a device sends in one step, by mesh axis and reason.

Over an axis of n devices, X bytes in all being gathered: all-gather and reduce-scatter send
X (n-1)/n, an all-reduce twice that, an all-to-all of X bytes a device X (n-1)/n, and a ring's hop
the whole of what moves (scaling book, "Sharded matrices").
"""

from dataclasses import dataclass

import jax.numpy as jnp

from qwen_jax.plan import job as job_lib
from qwen_jax.plan import layer
from qwen_jax.plan.job import Job


@dataclass(frozen=True)
class Transfer:
    """`num_bytes` sent by a device in one step over `axis`.

    overlapped: there is arithmetic beside it that does not wait for it.
    """

    axis: str  # of the mesh, or "dcn"
    reason: str
    num_bytes: float
    overlapped: bool


def transfers(job: Job) -> list[Transfer]:
    """Everything that one step of training or evaluation sends; in decoding, that of a token."""
    itemsize = jnp.dtype(job.config.compute_dtype).itemsize
    found: list[Transfer] = []
    if job.purpose != "decode":
        found += _weights(job, itemsize) + _gradients(job, itemsize) + _embedding(job, itemsize)
    found += _tensor(job, itemsize) + _context(job, itemsize) + _experts(job, itemsize)
    return [transfer for transfer in found if transfer.num_bytes > 0]


def by_axis(found: list[Transfer]) -> dict[str, float]:
    """Bytes of each axis."""
    total: dict[str, float] = {}
    for transfer in found:
        total[transfer.axis] = total.get(transfer.axis, 0.0) + transfer.num_bytes
    return total


def spans_torus(job: Job) -> bool:
    """Whether `fsdp` takes a whole slice of TPUs: XLA then all-reduces gradients."""
    own = job.config.mesh.fsdp == job.where.devices_per_slice
    return job.where.chip.platform == "tpu" and own


def _others(n: int) -> float:
    return (n - 1) / n


def _parts(job: Job) -> int:
    return job.config.accumulate_steps if job.purpose == "train" else 1


def _passes(job: Job) -> int:
    """Times a layer's weights and activations cross: forward, and again in the backward pass."""
    return 2 if job.purpose == "train" else 1


def _weights(job: Job, itemsize: int) -> list[Transfer]:
    n = job.layout.size("embed")
    leaves = job_lib.parameters(job)
    stack = sum(leaf.gathered_size for leaf in leaves if leaf.stacked and "embed" in leaf.axes)
    kernel = job.cfg.hidden_size * job.cfg.vocab_size / job.layout.size("vocab")
    return [
        Transfer(
            "fsdp",
            "gather weights of layers",
            _parts(job) * _passes(job) * itemsize * stack * _others(n),
            True,
        ),
        Transfer(
            "fsdp", "gather output kernel", _parts(job) * itemsize * kernel * _others(n), False
        ),
    ]


def _gradients(job: Job, itemsize: int) -> list[Transfer]:
    if job.purpose != "train":
        return []
    mesh, n = job.config.mesh, job.layout.size("embed")
    leaves = job_lib.parameters(job)
    stack = itemsize * sum(leaf.gathered_size for leaf in leaves if leaf.stacked)
    kernel = 4 * job.cfg.hidden_size * job.cfg.vocab_size / job.layout.size("vocab")
    times = _parts(job) * (2 if spans_torus(job) else 1)
    name = "all-reduce" if spans_torus(job) else "reduce-scatter"
    own = _parts(job) * (stack + kernel) / n
    replicas, slices = mesh.data * mesh.expert, mesh.dcn_data
    return [
        Transfer("fsdp", f"{name} gradients", times * (stack + kernel) * _others(n), False),
        Transfer("data", "all-reduce gradients", 2 * own * _others(replicas), False),
        Transfer("dcn", "all-reduce gradients", 2 * own * _others(slices), False),
        Transfer("context", "all-reduce gradients", 2 * own * _others(mesh.context), False),
    ]


def _embedding(job: Job, itemsize: int) -> list[Transfer]:
    n = job.layout.size("embed")
    rows = itemsize * job.tokens * job.cfg.hidden_size
    count = _parts(job) * _passes(job) * rows
    return [Transfer("fsdp", "all-to-all embeddings", count * _others(n), False)]


def _tensor(job: Job, itemsize: int) -> list[Transfer]:
    n = job.layout.size("act_heads")
    tokens = job.rows if job.purpose == "decode" else job.tokens
    stream = itemsize * tokens * job.cfg.hidden_size
    # Forward: after o and after down. Backward: before q, k, v and before gate, up; and o again
    # where the policy does not keep what follows it.
    each = 2
    if job.purpose == "train":
        tensors = layer.kept(job.config.remat)
        each += 2 + ("attention_residual" not in (*tensors.save, *tensors.offload))
    count = _parts(job) * (each * job.cfg.num_hidden_layers + 2) * 2 * stream
    return [Transfer("tensor", "all-reduce activations", count * _others(n), False)]


def _context(job: Job, itemsize: int) -> list[Transfer]:
    variant = job.context_variant
    if variant is None:
        return []
    n, cfg = job.layout.size("length"), job.cfg
    heads = cfg.head_dim / job.layout.size("act_kv_heads")
    kv = 2 * itemsize * job.tokens * cfg.num_key_value_heads * heads
    out = itemsize * job.tokens * cfg.num_attention_heads * cfg.head_dim
    out /= job.layout.size("act_heads")
    if variant == "ulysses":
        once, back = (kv + 2 * out) * _others(n), (kv + 2 * out) * _others(n)
    else:
        # Keys and values go round; in the backward pass again, with float32 sums of gradients.
        once, back = kv * (n - 1), (kv + 4 / itemsize * kv) * (n - 1)
    tensors = layer.kept(job.config.remat)
    again = "attention_out" not in (*tensors.save, *tensors.offload)
    total = once if job.purpose == "eval" else once * (1 + again) + back
    count = _parts(job) * cfg.num_hidden_layers * total
    return [Transfer("context", f"{variant} keys and values", count, variant == "ring")]


def _experts(job: Job, itemsize: int) -> list[Transfer]:
    moe = job.cfg.moe
    if moe is None:
        return []
    n = job.layout.size("experts")
    tokens = job.rows if job.purpose == "decode" else job.tokens
    row = itemsize * tokens * job.cfg.hidden_size
    if moe.capacity_factor is None or job.purpose == "decode":
        # [M, D] -> all-gather -> [X M, D], and a reduce-scatter back.
        once, reason = 2 * row * (n - 1), "gather and scatter tokens"
    else:
        choices = moe.num_experts_per_tok * moe.capacity_factor
        once, reason = 2 * row * choices * _others(n), "all-to-all tokens"
    times = 3 if job.purpose == "train" else 1  # forward, repeated, backward
    count = _parts(job) * len(job.cfg.sparse_layers) * times * once
    return [Transfer("expert", reason, count, False)]
