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
    """`num_bytes` sent by a device in one step over `axes`.

    overlapped: there is arithmetic beside it that does not wait for it.
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
    """Everything that one step of training or evaluation sends; in decoding, that of a token."""
    itemsize = jnp.dtype(job.config.compute_dtype).itemsize
    found: list[Transfer] = []
    if job.purpose != "decode":
        found += _weights(job, itemsize) + _gradients(job, itemsize) + _embedding(job, itemsize)
    else:
        found.append(_logits(job))
    found += _tensor(job, itemsize) + _context(job, itemsize) + _experts(job, itemsize)
    return [transfer for transfer in found if transfer.num_bytes > 0]


def by_axes(found: list[Transfer]) -> dict[str, float]:
    """Bytes over each axis, or axes taken together."""
    total: dict[str, float] = {}
    for transfer in found:
        total[transfer.over] = total.get(transfer.over, 0.0) + transfer.num_bytes
    return total


def _over(job: Job, logical: str) -> tuple[str, ...]:
    """The mesh axes that split `logical`, those of size 1 left out."""
    mesh = job.config.mesh
    return tuple(a for a in job.layout.rules.mesh_axes(logical) if getattr(mesh, a) > 1)


def _others(n: int) -> float:
    return (n - 1) / n


def _parts(job: Job) -> int:
    return job.config.accumulate_steps if job.purpose == "train" else 1


def _passes(job: Job) -> int:
    """Times a layer's weights and activations cross: forward, and again in the backward pass."""
    return 2 if job.purpose == "train" else 1


def _gathered(job: Job) -> dict[str, float]:
    """Elements of the layers' weights that a device puts together, by the axis they were apart."""
    total: dict[str, float] = {}
    for leaf in job_lib.parameters(job):
        if leaf.stacked and leaf.gathered_over:
            total[leaf.gathered_over] = total.get(leaf.gathered_over, 0.0) + leaf.gathered_size
    return total


def _kernel(job: Job) -> float:
    """Elements of the output kernel, whole along its width."""
    return job.cfg.hidden_size * job.cfg.vocab_size / job.layout.size("vocab")


def _weights(job: Job, itemsize: int) -> list[Transfer]:
    found = [
        Transfer(
            _over(job, logical),
            "gather weights of experts" if logical == "expert_embed" else "gather weights",
            _parts(job) * _passes(job) * itemsize * elements * _others(job.layout.size(logical)),
            True,
        )
        for logical, elements in _gathered(job).items()
    ]
    count = _parts(job) * itemsize * _kernel(job) * _others(job.layout.size("embed"))
    return [*found, Transfer(_over(job, "embed"), "gather output kernel", count, False)]


def _gradients(job: Job, itemsize: int) -> list[Transfer]:
    """Reduce-scattered over the axes that split the weight, then summed over those left."""
    if job.purpose != "train":
        return []
    amounts = [
        (logical, itemsize * elements, "experts' gradients" if "expert" in logical else "gradients")
        for logical, elements in _gathered(job).items()
    ]
    amounts.append(("embed", FLOAT32 * _kernel(job), "the output kernel's gradient"))
    found = []
    for logical, num_bytes, what in amounts:
        count = _parts(job) * num_bytes * _others(job.layout.size(logical))
        found.append(Transfer(_over(job, logical), f"reduce-scatter {what}", count, False))
    leaves = job_lib.parameters(job)
    own = itemsize * sum(leaf.local_size for leaf in leaves if leaf.stacked)
    own = _parts(job) * (own + FLOAT32 * _kernel(job) / job.layout.size("embed"))
    mesh = job.config.mesh
    for axes, n in ((("data",), mesh.data), (("dcn",), mesh.dcn_data)):
        found.append(Transfer(axes, "all-reduce gradients", 2 * own * _others(n), False))
    return found


def _embedding(job: Job, itemsize: int) -> list[Transfer]:
    """[B, T, D_XY] -> all-to-all -> [B, T_Y, D_X] -> all-to-all -> [B_X, T_Y, D]."""
    rows = _parts(job) * _passes(job) * itemsize * job.tokens * job.cfg.hidden_size
    reason = "all-to-all embeddings"
    return [
        Transfer(_over(job, logical), reason, rows * _others(job.layout.size(logical)), False)
        for logical in ("length", "outer_embed")
    ]


def _logits(job: Job) -> Transfer:
    """In decoding a device draws from all of a row's logits: [B, V_X] -> all-gather -> [B, V]."""
    elements = job.rows * job.cfg.vocab_size * _others(job.layout.size("act_vocab"))
    return Transfer(_over(job, "act_vocab"), "gather logits", FLOAT32 * elements, False)


def _tensor(job: Job, itemsize: int) -> list[Transfer]:
    n = job.layout.size("act_heads")
    tokens = job.rows if job.purpose == "decode" else job.tokens
    stream = itemsize * tokens * job.cfg.hidden_size
    # Forward: after o and after down. Backward: before q, k, v and before gate, up; and o again
    # where the policy does not keep what follows it.
    each = 2
    if job.purpose == "train":
        each += 2 + ("attention_residual" not in layer.found_again(job.config.remat))
    count = _parts(job) * (each * job.cfg.num_hidden_layers + 2) * 2 * stream
    return [Transfer(_over(job, "act_heads"), "all-reduce activations", count * _others(n), False)]


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
        once, back = (kv + 2 * out) * _others(n), (kv + 2 * out) * _others(n)
    else:
        # Keys and values go round; in the backward pass again, with float32 sums of gradients.
        once, back = kv * (n - 1), (kv + FLOAT32 / itemsize * kv) * (n - 1)
    again = "attention_out" not in layer.found_again(job.config.remat)
    total = once if job.purpose == "eval" else once * (1 + again) + back
    count = _parts(job) * cfg.num_hidden_layers * total
    ring = variant == "ring"
    reason = "all-to-all heads" if variant == "ulysses" else f"{variant} of keys and values"
    return [Transfer(_over(job, "length"), reason, count, ring, "one" if ring else "all")]


def _experts(job: Job, itemsize: int) -> list[Transfer]:
    """Tokens to their experts and back; the way there again where a policy does not keep them."""
    moe = job.cfg.moe
    if moe is None:
        return []
    n = job.layout.size("experts")
    tokens = job.rows if job.purpose == "decode" else job.tokens
    row = itemsize * tokens * job.cfg.hidden_size
    if job.purpose == "decode":
        # Every device has all tokens, and gives what its own experts make of them.
        count = len(job.cfg.sparse_layers) * 2 * row * _others(n)
        return [Transfer(_over(job, "experts"), "all-reduce experts' outputs", count, False)]
    if moe.capacity_factor is None:
        # [M, D] -> all-gather -> [X M, D], and a reduce-scatter back.
        way, reason = row * (n - 1), "gather and scatter tokens"
    else:
        choices = moe.num_experts_per_tok * moe.capacity_factor
        way, reason = row * choices * _others(n), "all-to-all tokens"
    ways = 2
    if job.purpose == "train":
        ways += 2 + ("expert_rows" not in layer.found_again(job.config.remat))
    count = _parts(job) * len(job.cfg.sparse_layers) * ways * way
    return [Transfer(_over(job, "experts"), reason, count, False)]
