"""Bytes that one device needs, by kind, at the moment of a step when it needs most.

Three moments compete, read off the buffer assignments of compiled steps (v5e, v5p, v6e):

loss      all kept activations, the gathered output kernel and one chunk of float32 logits; its
          gradient, whole in float32, or that of all logits. The greatest for short rows.
backward  all kept activations, the layers' gradients, one layer's gathered weights and its working
          set; and the place that the output kernel's gradient has left, which the compiler fills
          with those weights at most. The greatest for long rows, and for experts.
update    all gradients, and nothing kept.

The sum is to be held against `peak_memory_in_bytes` of a compiled program. Its
`temp_size_in_bytes` is no such sum: it adds up what the loops need one after the other.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from configs import schema
from partitioning import gradients
from qwen_jax import paged_cache
from qwen_jax.plan import job as job_lib
from qwen_jax.plan import layer
from qwen_jax.plan.job import Job

FLOAT32 = 4
KINDS = {
    "parameters": "parameters",
    "optimizer": "optimizer moments",
    "batch": "batch",
    "copy": "layers in the arithmetic's dtype",
    "kept": "activations kept",
    "gradients": "gradients",
    "weights": "gathered weights",
    "working": "working set",
    "logits": "logits",
    "cache": "key-value cache",
}
# Arrays of a layer's working set that live together in its backward pass, each [M, F] or [M, N H]:
# gate, up, their product and their gradients; q, o and their gradients.
_FFN_ARRAYS = 5
_ATTENTION_ARRAYS = 4
# Of rows sent to experts: gate, up and the gradient of their product, [R, F]; the rows, and what
# comes back to them by way of gate and of up, [R, D].
_EXPERT_ARRAYS = 3
_RESIDUAL_ARRAYS = 4  # [M, D]: the stream, its gradient, and a norm's input and output


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes a device, by the names of `KINDS`, at the moment `peak`; and in host memory."""

    kinds: dict[str, float]
    peak: str
    moments: dict[str, float]  # the total at each moment
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.kinds.values())

    @property
    def state(self) -> float:
        """What the program is given: a compiled program's arguments."""
        return sum(self.kinds.get(name, 0.0) for name in ("parameters", "optimizer", "batch"))


def estimate(job: Job) -> Memory:
    """The memory of one device."""
    return {"train": _train, "eval": _evaluate, "decode": _decode}[job.purpose](job)


def _train(job: Job) -> Memory:
    itemsize = jnp.dtype(job.config.compute_dtype).itemsize
    moment = jnp.dtype(job.config.optimizer.moment_dtype).itemsize
    leaves = job_lib.parameters(job)
    held = sum(leaf.local_size for leaf in leaves)
    stacked = sum(leaf.local_size for leaf in leaves if leaf.stacked)
    device, host = layer.kept_elements(job)
    layers = job.cfg.num_hidden_layers
    kept = job.tokens * layers * device * itemsize
    in_flight = 2 * job.tokens * host * itemsize  # two layers' worth comes back at one time
    accumulated = FLOAT32 * held if job.config.accumulate_steps > 1 else 0
    always = {
        "parameters": FLOAT32 * held,
        "optimizer": (moment + FLOAT32) * held,
        "batch": job.config.accumulate_steps * _batch(job),
        "copy": itemsize * stacked + _padded_copies(job, leaves),
    }
    way = _loss_way(job)
    kernel_gradient = FLOAT32 * job.cfg.hidden_size * _vocab(job)
    if way.piece is not None:
        kernel_gradient = itemsize * job.tokens * _vocab(job)
    kernel = itemsize * job.cfg.hidden_size * _vocab(job)
    stack_gradients = itemsize * stacked
    residual = job.tokens * job.cfg.hidden_size * itemsize
    weights = _layer_weights(job, leaves) * itemsize
    moments = {
        "loss": {
            "kept": kept,
            "gradients": accumulated + kernel_gradient,
            "weights": kernel,
            "logits": _logits(job),
            "working": 3 * residual,
        },
        "backward": {
            "kept": kept,
            "gradients": accumulated + stack_gradients + max(0, kernel_gradient - weights),
            "weights": weights,
            "working": _working(job) * itemsize + in_flight,
        },
        "update": {
            "gradients": accumulated + stack_gradients + 2 * (held - stacked) * FLOAT32,
        },
    }
    return _at_the_peak(always, moments, host=job.tokens * layers * host * itemsize)


def _evaluate(job: Job) -> Memory:
    itemsize = jnp.dtype(job.config.compute_dtype).itemsize
    leaves = job_lib.parameters(job)
    stacked = sum(leaf.local_size for leaf in leaves if leaf.stacked)
    always = {
        "parameters": FLOAT32 * sum(leaf.local_size for leaf in leaves),
        "batch": _batch(job),
    }
    moments = {
        "layers": {
            # Without a backward pass nothing needs it after the last layer.
            "copy": itemsize * stacked + _padded_copies(job, leaves),
            "weights": _layer_weights(job, leaves) * itemsize,
            "working": _working(job) * itemsize / 2,  # no gradients beside
        },
        "loss": {
            "weights": itemsize * job.cfg.hidden_size * _vocab(job),
            "logits": _logits(job),
            "working": 2 * job.tokens * job.cfg.hidden_size * itemsize,
        },
    }
    return _at_the_peak(always, moments)


def _decode(job: Job) -> Memory:
    """Weights in the arithmetic's dtype, pages for every slot of an engine, one token a row."""
    dtype = jnp.dtype(job.config.compute_dtype)
    cfg, settings = job.cfg, schema.Engine()
    width = paged_cache.width(cfg, job.where.chip.platform)
    positions = job.rows * -(-job.length // settings.page_size) * settings.page_size
    heads = 2 * cfg.num_key_value_heads / job.layout.size("act_kv_heads")
    held = sum(leaf.local_size for leaf in job_lib.parameters(job))
    always = {
        "parameters": dtype.itemsize * held,
        "cache": cfg.num_hidden_layers * positions * heads * width * dtype.itemsize,
        # Of a slot, for every token: whether the prompt has it (a byte), how often the answer.
        "batch": job.rows * cfg.vocab_size * 5,
    }
    moments = {
        "token": {
            # Rows are drawn from whole: the logits gathered, and a copy in float32 with penalties.
            "logits": 2 * FLOAT32 * job.rows * cfg.vocab_size,
            "working": FLOAT32 * job.rows * job.cfg.hidden_size * _RESIDUAL_ARRAYS,
        }
    }
    return _at_the_peak(always, moments)


def _at_the_peak(always: dict, moments: dict, *, host: float = 0.0) -> Memory:
    totals = {name: sum(always.values()) + sum(kinds.values()) for name, kinds in moments.items()}
    peak = max(totals, key=totals.get)
    kinds = {**always, **moments[peak]}
    ordered = {name: float(kinds[name]) for name in KINDS if name in kinds}
    return Memory(kinds=ordered, peak=peak, moments=totals, host=host)


def _batch(job: Job) -> float:
    """Tokens, targets, segments and positions in int32, weights in float32."""
    return 5 * 4 * job.tokens


def _vocab(job: Job) -> int:
    return -(-job.cfg.vocab_size // job.layout.size("act_vocab"))


def _logits(job: Job) -> float:
    """One chunk of every row's part in float32."""
    return FLOAT32 * job.rows * _loss_way(job).chunk * _vocab(job)


def _loss_way(job: Job) -> gradients.Way:
    return gradients.pick_way(
        rows=job.rows,
        length=job.length // job.layout.size("length"),
        hidden_size=job.cfg.hidden_size,
        chunk=job.config.loss_chunk,
        devices=job.layout.size("embed"),
        itemsize=jnp.dtype(job.config.compute_dtype).itemsize,
    )


def _padded_copies(job: Job, leaves: tuple[job_lib.Leaf, ...]) -> float:
    """What a TPU's tiles add where `embed` is a minor dimension of less than 128 lanes.

    The embedding is copied into rows that a lookup can read; with tied embeddings, so are its
    moments, whose gradient arrives that way.
    """
    if job.where.chip.platform != "tpu":
        return 0.0
    added = 0.0
    for leaf in leaves:
        if leaf.axes[-1] != "embed" or leaf.local[-1] % layer.LANES == 0:
            continue
        rows, width = math.prod(leaf.local[:-1]), leaf.local[-1]
        if leaf.stacked:
            added += rows * (layer.padded(job, width) - width) * 2
        else:
            copies = 3 if job.cfg.tie_word_embeddings else 1
            added += copies * rows * layer.padded(job, width) * FLOAT32
    return added


def _layer_weights(job: Job, leaves: tuple[job_lib.Leaf, ...]) -> float:
    """Elements of gathered weights at one time: the two largest matrices of a layer.

    One is at work while the next arrives, or while its gradient, as large, leaves.
    """
    sizes = [leaf.gathered_size / leaf.shape[0] for leaf in leaves if leaf.stacked]
    if job.layout.size("embed") == 1:
        return max(sizes)
    return sum(sorted(sizes)[-2:])


def _working(job: Job) -> float:
    """Elements of one layer's forward and backward pass, of whichever part takes most."""
    cfg, size = job.cfg, job.layout.size
    feed_forward = _FFN_ARRAYS * _widest_ffn(job) / size("act_ffn")
    heads = cfg.num_attention_heads / size("act_heads") * layer.padded(job, cfg.head_dim)
    part = job.tokens * max(feed_forward, _ATTENTION_ARRAYS * heads)
    return max(part, _routed(job)) + job.tokens * _RESIDUAL_ARRAYS * cfg.hidden_size


def _widest_ffn(job: Job) -> float:
    cfg = job.cfg
    shared = cfg.moe.shared_expert_intermediate_size if cfg.moe else 0
    has_dense = bool(cfg.dense_layers) or not cfg.sparse_layers
    return max(shared, cfg.intermediate_size if has_dense else 0)


def _routed(job: Job) -> float:
    """Elements of tokens on their way through the experts, gathered over their axis, and rows."""
    moe = job.cfg.moe
    if moe is None:
        return 0.0
    X = job.layout.size("experts")
    rows = job.tokens * layer.routed_rows(job)
    F = moe.moe_intermediate_size / job.layout.size("ffn")
    gathered = 2 * job.tokens * X * job.cfg.hidden_size if X > 1 else 0
    return rows * _EXPERT_ARRAYS * (job.cfg.hidden_size + F) + gathered


def limit(job: Job, *, reserve: float) -> float | None:
    """Bytes that a plan may fill of one device: its memory less the reserve; None: not known."""
    usable = job.where.chip.device_hbm_bytes
    return None if usable is None else usable * (1.0 - reserve)
