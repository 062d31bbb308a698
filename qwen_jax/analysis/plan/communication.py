"""Bytes that a device sends in one step, by mesh axes and reason.

Over axes of n devices, X bytes in all being gathered: all-gather and reduce-scatter send
X (n-1)/n, an all-reduce twice that, an all-to-all of X bytes a device X (n-1)/n, and a ring's hop
the whole of what moves (scaling book, "Sharded matrices"). Over which axes, the rules say
(`partitioning/rules.py`).
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from qwen_jax.analysis.plan import job as job_lib
from qwen_jax.analysis.plan import layer
from qwen_jax.analysis.plan.job import Job

FLOAT32 = 4


@dataclass(frozen=True)
class Transfer:
    """Bytes that a device sends in one step over the mesh axes `axes`, for one reason.

    overlapped: arithmetic that does not wait for the transfer runs beside it.
    links: a collective uses all that the axes have, a ring's hop the one to the next device.
    """

    axes: tuple[str, ...]  # of the mesh; ("dcn",) from slice to slice
    reason: str
    num_bytes: float
    overlapped: bool
    links: Literal["all", "one"] = "all"

    @property
    def over(self) -> str:
        """The axes as text: `fsdp*context`."""
        return "*".join(self.axes)


def transfers(job: Job) -> list[Transfer]:
    """The transfers of one step of training or evaluation, or of one decoded token."""
    itemsize = jnp.dtype(job.config.compute_dtype).itemsize
    found: list[Transfer] = []
    if job.purpose != "decode":
        found += _weights(job, itemsize) + _gradients(job, itemsize) + _embedding(job, itemsize)
    else:
        found.append(_logits(job))
    found += _tensor(job, itemsize) + _context(job, itemsize) + _experts(job, itemsize)
    return [transfer for transfer in found if transfer.num_bytes > 0]


def by_axes(found: list[Transfer]) -> dict[str, float]:
    """Bytes sent over each mesh axis, or group of axes."""
    total: dict[str, float] = {}
    for transfer in found:
        total[transfer.over] = total.get(transfer.over, 0.0) + transfer.num_bytes
    return total


def _mesh_axes(job: Job, logical: str) -> tuple[str, ...]:
    """Mesh axes of size 2 or more that split the logical axis `logical`."""
    mesh = job.config.mesh
    return tuple(a for a in job.layout.rules.mesh_axes(logical) if getattr(mesh, a) > 1)


def _sent_share(n: int) -> float:
    return (n - 1) / n


def _micro_batches(job: Job) -> int:
    return job.config.accumulate_steps if job.purpose == "train" else 1


def _passes(job: Job) -> int:
    """Passes in which a layer's weights and activations are sent: forward and backward."""
    return 2 if job.purpose == "train" else 1


def _gathered_elements(job: Job) -> dict[str, float]:
    """Elements of the layers' weights that a device gathers, by the logical axis that was split."""
    total: dict[str, float] = {}
    for leaf in job_lib.parameters(job):
        if leaf.stacked and leaf.gathered_over:
            total[leaf.gathered_over] = total.get(leaf.gathered_over, 0.0) + leaf.gathered_size
    return total


def _lm_head_elements(job: Job) -> float:
    """Elements of the LM head's kernel on one device, gathered along the embedding dimension."""
    return job.cfg.hidden_size * job.cfg.vocab_size / job.layout.size("vocab")


def _weights(job: Job, itemsize: int) -> list[Transfer]:
    found = [
        Transfer(
            _mesh_axes(job, logical),
            "gather weights of experts" if logical == "expert_embed" else "gather weights",
            _micro_batches(job)
            * _passes(job)
            * itemsize
            * elements
            * _sent_share(job.layout.size(logical)),
            True,
        )
        for logical, elements in _gathered_elements(job).items()
    ]
    count = (
        _micro_batches(job)
        * itemsize
        * _lm_head_elements(job)
        * _sent_share(job.layout.size("embed"))
    )
    return [*found, Transfer(_mesh_axes(job, "embed"), "gather output kernel", count, False)]


def _gradients(job: Job, itemsize: int) -> list[Transfer]:
    """Transfers of gradients: reduce-scatter over the axes of the weight, then all-reduce."""
    if job.purpose != "train":
        return []
    amounts = [
        (logical, itemsize * elements, "experts' gradients" if "expert" in logical else "gradients")
        for logical, elements in _gathered_elements(job).items()
    ]
    amounts.append(("embed", FLOAT32 * _lm_head_elements(job), "the output kernel's gradient"))
    found = []
    for logical, num_bytes, what in amounts:
        count = _micro_batches(job) * num_bytes * _sent_share(job.layout.size(logical))
        found.append(Transfer(_mesh_axes(job, logical), f"reduce-scatter {what}", count, False))
    leaves = job_lib.parameters(job)
    own = itemsize * sum(leaf.local_size for leaf in leaves if leaf.stacked)
    own = _micro_batches(job) * (own + FLOAT32 * _lm_head_elements(job) / job.layout.size("embed"))
    mesh = job.config.mesh
    for axes, n in ((("data",), mesh.data), (("dcn",), mesh.dcn_data)):
        found.append(Transfer(axes, "all-reduce gradients", 2 * own * _sent_share(n), False))
    return found


def _embedding(job: Job, itemsize: int) -> list[Transfer]:
    """[B, T, D_XY] -> all-to-all -> [B, T_Y, D_X] -> all-to-all -> [B_X, T_Y, D]."""
    rows = _micro_batches(job) * _passes(job) * itemsize * job.tokens * job.cfg.hidden_size
    reason = "all-to-all embeddings"
    return [
        Transfer(
            _mesh_axes(job, logical), reason, rows * _sent_share(job.layout.size(logical)), False
        )
        for logical in ("length", "outer_embed")
    ]


def _logits(job: Job) -> Transfer:
    """The gather of the logits before sampling: [B, V_X] -> all-gather -> [B, V]."""
    elements = job.rows * job.cfg.vocab_size * _sent_share(job.layout.size("act_vocab"))
    return Transfer(_mesh_axes(job, "act_vocab"), "gather logits", FLOAT32 * elements, False)


def _tensor(job: Job, itemsize: int) -> list[Transfer]:
    n = job.layout.size("act_heads")
    tokens = job.rows if job.purpose == "decode" else job.tokens
    stream = itemsize * tokens * job.cfg.hidden_size
    # Forward: after o and after down. Backward: before q, k, v and before gate, up; and o again
    # where the policy does not keep what follows it.
    each = 2
    if job.purpose == "train":
        each += 2 + ("attention_residual" not in layer.available_in_backward(job.config.remat))
    count = _micro_batches(job) * (each * job.cfg.num_hidden_layers + 2) * 2 * stream
    return [
        Transfer(
            _mesh_axes(job, "act_heads"), "all-reduce activations", count * _sent_share(n), False
        )
    ]


def _context(job: Job, itemsize: int) -> list[Transfer]:
    variant = job.context_variant
    if variant is None:
        return []
    n, cfg = job.layout.size("length"), job.cfg
    kv_heads = cfg.num_key_value_heads / job.layout.size("act_kv_heads")
    kv = 2 * itemsize * job.tokens * kv_heads * cfg.head_dim
    heads = cfg.num_attention_heads / job.layout.size("act_heads")
    out = itemsize * job.tokens * heads * cfg.head_dim
    if variant == "ulysses":
        once, back = (kv + 2 * out) * _sent_share(n), (kv + 2 * out) * _sent_share(n)
    else:
        # Keys and values go round the ring, in the backward pass with float32 gradients.
        once, back = kv * (n - 1), (kv + FLOAT32 / itemsize * kv) * (n - 1)
    again = "attention_out" not in layer.available_in_backward(job.config.remat)
    total = once if job.purpose == "eval" else once * (1 + again) + back
    count = _micro_batches(job) * cfg.num_hidden_layers * total
    ring = variant == "ring"
    reason = "all-to-all heads" if variant == "ulysses" else f"{variant} of keys and values"
    return [Transfer(_mesh_axes(job, "length"), reason, count, ring, "one" if ring else "all")]


def _experts(job: Job, itemsize: int) -> list[Transfer]:
    """Transfers of tokens to their experts and back, repeated where a policy does not keep them."""
    moe = job.cfg.moe
    if moe is None:
        return []
    n = job.layout.size("experts")
    tokens = job.rows if job.purpose == "decode" else job.tokens
    row = itemsize * tokens * job.cfg.hidden_size
    if job.purpose == "decode":
        # Every device has all tokens, and adds the outputs of its own experts.
        count = len(job.cfg.sparse_layers) * 2 * row * _sent_share(n)
        return [Transfer(_mesh_axes(job, "experts"), "all-reduce experts' outputs", count, False)]
    if moe.capacity_factor is None:
        # [M, D] -> all-gather -> [X M, D], and a reduce-scatter back.
        crossing_bytes, reason = row * (n - 1), "gather and scatter tokens"
    else:
        choices = moe.num_experts_per_tok * moe.capacity_factor
        crossing_bytes, reason = row * choices * _sent_share(n), "all-to-all tokens"
    crossings = 2
    if job.purpose == "train":
        crossings += 2 + ("expert_rows" not in layer.available_in_backward(job.config.remat))
    count = _micro_batches(job) * len(job.cfg.sparse_layers) * crossings * crossing_bytes
    return [Transfer(_mesh_axes(job, "experts"), reason, count, False)]
