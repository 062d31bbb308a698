"""Bytes that one device needs, by kind, at the moment of a step when the sum is greatest.

Five moments compete, read off the buffer assignments of compiled steps (v5e, v5p, v6e). At all but
the last, all kept activations are there.

gather    the LM head's kernel is gathered. Where a device's share of it is no whole tile, the
          shares lie padded beside it. Greatest over 256 devices, whose shares are narrow.
loss      the output kernel, one chunk of float32 logits, and the kernel's gradient, whole in
          float32, or that of all logits. Greatest for short rows.
backward  the layers' gradients, the output kernel's, which waits, and one layer's weights and
          arrays. Greatest for long rows, and for experts.
scatter   the same a little later: fewer arrays, but the gradients of all matrices of the
          feed-forward network, whole. Greatest for short rows of wide models.
update    all gradients.

The sum is to be held against `peak_memory_in_bytes` of a compiled program: what is live at its
worst moment, tiles' padding included. Its `temp_size_in_bytes` is no such sum: it adds up what the
loops need one after the other.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from configs.engine import EngineConfig
from partitioning import gradients
from qwen_jax.analysis.plan import job as job_lib
from qwen_jax.analysis.plan import layer, tiles
from qwen_jax.analysis.plan.job import Job
from qwen_jax.ops.attention.paged import kv_pages

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
# Backward pass of a layer at its two moments: arrays [M, F] of the feed-forward network that live
# together (gate, up, and the gradients of their product and of one of them; then one less), and
# matrices whose gradients are whole.
_OF_A_LAYER = {"backward": (4, 2), "scatter": (3, 3)}
_ATTENTION_ARRAYS = 4  # [M, N H]: q, o and their gradients
# Rows sent to experts: gate, up and the gradient of their product, [R, F]; the rows, and what
# comes back to them by way of gate and of up, [R, D].
_EXPERT_ARRAYS = 3
# [M, D], or as wide: the layer's input, attention's output before and after its projection, what is
# added to the stream, and the gradient; with experts, also what the router read, what the shared
# expert gives back, and two that wait for the loss.
_RESIDUAL_ARRAYS = 5
_MORE_WITH_EXPERTS = 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a device by the names of `KINDS` at the moment `peak`, and bytes of host memory."""

    kinds: dict[str, float]
    peak: str
    moments: dict[str, float]  # the total at each moment
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.kinds.values())

    @property
    def state(self) -> float:
        """Bytes of a compiled program's arguments."""
        return sum(self.kinds.get(name, 0.0) for name in ("parameters", "optimizer", "batch"))


def estimate(job: Job) -> Memory:
    """The memory that a job needs of one device."""
    return {"train": _train, "eval": _evaluate, "decode": _decode}[job.purpose](job)


def _train(job: Job) -> Memory:
    itemsize = jnp.dtype(job.config.compute_dtype).itemsize
    moment = jnp.dtype(job.config.optimizer.moment_dtype).itemsize
    leaves = job_lib.parameters(job)
    num_held = sum(tiles.size(job, leaf.local) for leaf in leaves)
    stacked = [leaf.local for leaf in leaves if leaf.stacked]
    device, host = layer.saved_elements(job)
    layers = job.cfg.num_hidden_layers
    kept_bytes = job.tokens * layers * device * itemsize
    in_flight = 2 * job.tokens * host * itemsize  # two layers' worth comes back at one time
    accumulated = FLOAT32 * num_held if job.config.accumulate_steps > 1 else 0
    always = {
        "parameters": FLOAT32 * num_held,
        "optimizer": (moment + FLOAT32) * num_held,
        "batch": job.config.accumulate_steps * _batch(job),
        "copy": _copies(job, leaves, like_the_embedding=3),
    }
    kernel = itemsize * job.cfg.hidden_size * _vocab(job)
    kernel_gradient, left_of_it = _kernel_gradient(job)
    gradients_of_layers = itemsize * sum(tiles.stacked(job, shape) for shape in stacked)
    residual = job.tokens * job.cfg.hidden_size * itemsize
    others = num_held - sum(tiles.size(job, shape) for shape in stacked)
    moments = {
        "gather": {
            "kept": kept_bytes,
            "gradients": accumulated + kernel_gradient,
            "weights": kernel + _arriving_kernel(job) * itemsize,
            "working": 4 * residual,
        },
        "loss": {
            "kept": kept_bytes,
            "gradients": accumulated + kernel_gradient,
            "weights": kernel,
            "logits": _logits(job),
            "working": 3 * residual,
        },
        **{
            name: {
                "kept": kept_bytes,
                "gradients": accumulated + gradients_of_layers + left_of_it,
                "weights": _layer_weights(job, leaves, gradients=number) * itemsize,
                "working": _working(job, ffn_arrays=arrays) * itemsize + in_flight,
            }
            for name, (arrays, number) in _OF_A_LAYER.items()
        },
        "update": {
            "gradients": accumulated + gradients_of_layers + 2 * others * FLOAT32,
        },
    }
    return _at_the_peak(always, moments, host=job.tokens * layers * host * itemsize)


def _evaluate(job: Job) -> Memory:
    itemsize = jnp.dtype(job.config.compute_dtype).itemsize
    leaves = job_lib.parameters(job)
    always = {
        "parameters": FLOAT32 * sum(tiles.size(job, leaf.local) for leaf in leaves),
        "batch": _batch(job),
    }
    moments = {
        "layers": {
            # Without a backward pass nothing needs it after the last layer.
            "copy": _copies(job, leaves, like_the_embedding=1),
            "weights": _layer_weights(job, leaves, gradients=0) * itemsize,
            "working": _working(job, ffn_arrays=4) * itemsize / 2,  # no gradients beside
        },
        "loss": {
            "weights": itemsize * job.cfg.hidden_size * _vocab(job),
            "logits": _logits(job),
            "working": 2 * job.tokens * job.cfg.hidden_size * itemsize,
        },
    }
    return _at_the_peak(always, moments)


def _decode(job: Job) -> Memory:
    """Memory of decoding: weights in the compute dtype, pages for every slot, one token a row."""
    dtype = jnp.dtype(job.config.compute_dtype)
    cfg, settings = job.cfg, EngineConfig()
    width = kv_pages.width(cfg, job.where.chip.platform)
    positions = job.rows * -(-job.length // settings.page_size) * settings.page_size
    heads = 2 * cfg.num_key_value_heads / job.layout.size("act_kv_heads")
    num_held = sum(leaf.local_size for leaf in job_lib.parameters(job))
    always = {
        "parameters": dtype.itemsize * num_held,
        "cache": cfg.num_hidden_layers * positions * heads * width * dtype.itemsize,
        # Per slot and token id: whether the prompt has it (a byte), and its count in the answer.
        "batch": job.rows * cfg.vocab_size * 5,
    }
    moments = {
        "token": {
            # Sampling needs whole rows: the gathered logits, and a copy in float32 with penalties.
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
    """Bytes of the batch: tokens, targets, segments and positions in int32, weights in float32."""
    return 5 * 4 * job.tokens


def _vocab(job: Job) -> int:
    return -(-job.cfg.vocab_size // job.layout.size("act_vocab"))


def _logits(job: Job) -> float:
    """Elements of one chunk of logits, of every row's part."""
    return FLOAT32 * job.rows * _output_gradient(job).chunk * _vocab(job)


def _output_gradient(job: Job) -> gradients.OutputGradient:
    return gradients.plan_output_gradient(
        rows=job.rows,
        length=job.length // job.layout.size("length"),
        hidden_size=job.cfg.hidden_size,
        chunk=job.config.loss_chunk,
        devices=job.layout.size("embed"),
        itemsize=jnp.dtype(job.config.compute_dtype).itemsize,
    )


def _copies(job: Job, leaves: tuple[job_lib.Leaf, ...], *, like_the_embedding: int) -> float:
    """Bytes of copies: the layers in the arithmetic's dtype, and arrays in another layout.

    The embedding is copied into rows that a lookup can read, and its moments into what its gradient
    arrives in. That adds up where a device's part of a row is no multiple of 128 lanes.
    """
    itemsize = jnp.dtype(job.config.compute_dtype).itemsize
    copies = itemsize * sum(tiles.size(job, leaf.local) for leaf in leaves if leaf.stacked)
    for leaf in leaves:
        rows, width = leaf.local[0], leaf.local[-1]
        if not leaf.stacked and leaf.axes[-1] == "embed" and tiles.lanes(job, width) != width:
            copies += like_the_embedding * rows * tiles.lanes(job, width) * FLOAT32
    return copies


def _kernel_gradient(job: Job) -> tuple[float, float]:
    """Bytes of the LM head's gradient at the loss, and of the rest of it in the backward pass.

    The compiler puts what is still to be done with it after the layers' backward pass: the product
    in pieces, for which the logits' gradient waits, or the scatter of the whole. Before it come, of
    a whole one, the first step of the scatter where the kernel is tied; and all, or that first
    step, where a context axis puts loops of transfers into the layers.
    """
    whole = FLOAT32 * job.cfg.hidden_size * _vocab(job)
    apart = job.layout.size("length") > 1
    if _output_gradient(job).piece is None:
        early = apart or job.cfg.tie_word_embeddings
        return whole, whole / (_first_step(job) if early else 1)
    logits_gradient = jnp.dtype(job.config.compute_dtype).itemsize * job.tokens * _vocab(job)
    return logits_gradient, whole / job.layout.size("embed") if apart else logits_gradient


def _first_step(job: Job) -> int:
    """Number of devices of the first reduce-scatter: all sides of the torus but the longest."""
    sides = job_lib.sides(job.config.mesh, job.where)
    for axis in job.layout.mesh_axes("embed"):
        if axis in sides:
            return math.prod(sides[axis]) // (max(sides[axis]) if len(sides[axis]) > 1 else 1)
    return 1


def _arriving_kernel(job: Job) -> float:
    """Elements of the LM head's kernel before the gather, each device's share padded to tiles.

    Shares of whole tiles arrive in place.
    """
    devices = job.layout.size("embed")
    share = -(-job.cfg.hidden_size // devices)
    if devices == 1 or tiles.is_whole(job, share):
        return 0.0
    return devices * tiles.size(job, (share, _vocab(job)))


def _layer_weights(job: Job, leaves: tuple[job_lib.Leaf, ...], *, gradients: int) -> float:
    """Elements of a layer's two largest matrices, gathered, and of `gradients` matrices' gradients.

    One matrix is at work while the next arrives. Gradients are whole until they are scattered;
    experts' come last, when the rows that their products took are gone. Shares that are no whole
    tiles arrive with the layer, of which there is one, in the place of sublanes: twice the bytes.
    """
    matrices = [leaf for leaf in leaves if leaf.stacked]
    matrices.sort(key=lambda leaf: leaf.gathered_size / leaf.shape[0])
    sizes = [leaf.gathered_size / leaf.shape[0] for leaf in matrices]
    if job.layout.size("embed") == 1:
        return sizes[-1]
    arriving = [
        size * (1 if _arrives_whole(job, leaf) else 2)
        for size, leaf in zip(sizes, matrices, strict=True)
    ]
    waiting = gradients if job.cfg.moe is None else 0
    return sum(arriving[-2:]) + sum(sizes[len(sizes) - waiting :])


def _arrives_whole(job: Job, leaf: job_lib.Leaf) -> bool:
    if leaf.gathered_over is None:
        return True
    return tiles.is_whole(job, leaf.local[leaf.axes.index(leaf.gathered_over)])


def _working(job: Job, *, ffn_arrays: int) -> float:
    """Elements of one layer's forward and backward pass, at the part that takes most."""
    cfg, size = job.cfg, job.layout.size
    feed_forward = ffn_arrays * _widest_ffn(job) / size("act_ffn")
    heads = cfg.num_attention_heads / size("act_heads") * tiles.lanes(job, cfg.head_dim)
    part = job.tokens * max(feed_forward, _ATTENTION_ARRAYS * heads)
    residual_arrays = _RESIDUAL_ARRAYS + (_MORE_WITH_EXPERTS if cfg.moe else 0)
    return max(part, _routed(job)) + job.tokens * residual_arrays * cfg.hidden_size


def _widest_ffn(job: Job) -> float:
    cfg = job.cfg
    shared = cfg.moe.shared_expert_intermediate_size if cfg.moe else 0
    has_dense = bool(cfg.dense_layers) or not cfg.sparse_layers
    return max(shared, cfg.intermediate_size if has_dense else 0)


def _routed(job: Job) -> float:
    """Elements of the tokens sent to experts, gathered over the expert axis, and of their rows."""
    moe = job.cfg.moe
    if moe is None:
        return 0.0
    X = job.layout.size("experts")
    rows = job.tokens * layer.routed_rows(job)
    F = moe.moe_intermediate_size / job.layout.size("ffn")
    gathered = 2 * job.tokens * X * job.cfg.hidden_size if X > 1 else 0
    return rows * _EXPERT_ARRAYS * (job.cfg.hidden_size + F) + gathered


def limit(job: Job, *, reserve: float) -> float | None:
    """Bytes of one device that a plan may fill: its memory less the reserve; None if unknown."""
    usable = job.where.chip.device_hbm_bytes
    return None if usable is None else usable * (1.0 - reserve)
