"""Next-token cross-entropy, a chunk of tokens at a time: no logits of a whole batch exist."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from partitioning import gradients, sharding
from partitioning.sharding import Layout


@dataclass(frozen=True)
class LossSums:
    """Sums over weighted tokens; divide by `weight` for means. Scalars in float32.

    loss: cross-entropy in nats, plus z_loss times the z term. cross_entropy: without it.
    """

    loss: jax.Array
    cross_entropy: jax.Array
    num_correct: jax.Array
    weight: jax.Array


jax.tree_util.register_dataclass(LossSums, ["loss", "cross_entropy", "num_correct", "weight"], [])


def cross_entropy(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk: int = 1024,
    layout: Layout | None = None,
) -> LossSums:
    """Weighted sums of the next-token loss over a batch, without logits of the whole batch.

    loss = sum_t w_t (logsumexp(z_t) - z_t[target_t] + z_loss logsumexp(z_t)^2), z = hidden kernel.

    The z term is PaLM's (arXiv 2204.02311, section 5). At most `chunk` tokens of every sequence
    have logits at one time; where the length is spread, of each part of it. Gradients run through
    `loss` alone, to hidden and kernel; they are computed in the forward pass, where the logits are
    at hand, so that no logits are computed twice.
    """
    length = targets_BT.shape[1] // _parts("length", layout)
    plan = gradients.plan_output_gradient(
        rows=targets_BT.shape[0] // _parts("batch", layout),
        length=length,
        hidden_size=kernel_DV.shape[0],
        chunk=chunk,
        devices=_parts("embed", layout),
        itemsize=hidden_BTD.dtype.itemsize,
    )
    loss, others = _sums(hidden_BTD, kernel_DV, targets_BT, weights_BT, z_loss, plan, layout)
    return LossSums(loss, *others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(hidden_BTD, kernel_DV, targets_BT, weights_BT, z_loss, plan, layout):
    kernel_DV = _gathered(kernel_DV, hidden_BTD.dtype, layout)

    def step(sums_BX, inputs):
        hidden_BCD, targets_BC, weights_BC = inputs
        logits_BCV = _logits(hidden_BCD, kernel_DV, layout)
        terms_BX, _ = _chunk_sums(logits_BCV, targets_BC, weights_BC, z_loss, layout)
        return jax.tree.map(jnp.add, sums_BX, terms_BX), None

    inputs = [_split(x, plan.chunk, layout) for x in (hidden_BTD, targets_BT, weights_BT)]
    sums_BX, _ = jax.lax.scan(step, _zero_sums(hidden_BTD, layout), inputs)
    loss, *parts = map(jnp.sum, sums_BX)
    return loss, tuple(parts)


def _sums_forward(hidden_BTD, kernel_DV, targets_BT, weights_BT, z_loss, plan, layout):
    gathered_DV = _gathered(kernel_DV, hidden_BTD.dtype, layout)
    inputs = [_split(x, plan.chunk, layout) for x in (hidden_BTD, targets_BT, weights_BT)]

    def step(carry, inputs):
        sums_BX, gradient_ZXDV = carry
        hidden_BCD, targets_BC, weights_BC = inputs
        logits_BCV = _logits(hidden_BCD, gathered_DV, layout)
        terms_BX, log_z_BC = _chunk_sums(logits_BCV, targets_BC, weights_BC, z_loss, layout)
        # d loss / d logits = w (softmax (1 + 2 z_loss log Z) - one hot)
        scale_BC = weights_BC * (1.0 + 2.0 * z_loss * log_z_BC)
        dlogits_BCV = jnp.exp(logits_BCV - log_z_BC[..., None]) * scale_BC[..., None]
        columns = jax.lax.broadcasted_iota(jnp.int32, (1, 1, kernel_DV.shape[1]), 2)
        hit_BCV = columns == targets_BC[..., None]
        dlogits_BCV = dlogits_BCV - jnp.where(hit_BCV, weights_BC[..., None], 0.0)
        dlogits_BCV = dlogits_BCV.astype(hidden_BTD.dtype)
        dhidden_BCD = jnp.einsum("bcv,dv->bcd", dlogits_BCV, gathered_DV)
        if plan.piece is None:
            gradient_ZXDV += _by_parts(hidden_BCD, dlogits_BCV, layout)
            gradient_ZXDV = sharding.constrain(gradient_ZXDV, _PARTS, layout)
            dlogits_BCV = None
        sums_BX = jax.tree.map(jnp.add, sums_BX, terms_BX)
        return (sums_BX, gradient_ZXDV), (dhidden_BCD, dlogits_BCV)

    gradient_ZXDV = None
    if plan.piece is None:
        Z, X = _parts("batch", layout), _parts("length", layout)
        gradient_ZXDV = jnp.zeros((Z, X, *kernel_DV.shape), jnp.float32)
        gradient_ZXDV = sharding.constrain(gradient_ZXDV, _PARTS, layout)
    carry = (_zero_sums(hidden_BTD, layout), gradient_ZXDV)
    (sums_BX, gradient_ZXDV), (dhidden_SBCD, dlogits_SBCV) = jax.lax.scan(step, carry, inputs)
    loss, *parts = map(jnp.sum, sums_BX)
    if plan.piece is None:
        gradient_DV = _meet(gradient_ZXDV, layout)
    else:
        gradient_DV = _in_pieces(inputs[0], dlogits_SBCV, plan.piece, layout)
    gradient_BTD = _join(dhidden_SBCD, hidden_BTD.shape[1], layout)
    # The scalar zero only carries the dtype of the kernel to the backward pass.
    return (loss, tuple(parts)), (gradient_BTD, gradient_DV, jnp.zeros((), kernel_DV.dtype))


def _sums_backward(z_loss, plan, layout, residuals, cotangents):
    del z_loss, plan, layout
    gradient_BTD, gradient_DV, kernel_like = residuals
    cotangent, _ = cotangents  # the other sums are for reading: no gradient runs through them
    # Scaled in float32: a mean's 1 / weight rounded to bfloat16 would shift every gradient by it.
    scaled_BTD = gradient_BTD.astype(jnp.float32) * cotangent
    return (
        scaled_BTD.astype(gradient_BTD.dtype),
        (gradient_DV * cotangent).astype(kernel_like.dtype),
        None,
        None,
    )


_sums.defvjp(_sums_forward, _sums_backward)


def _gathered(kernel_DV: jax.Array, dtype: jnp.dtype, layout: Layout | None) -> jax.Array:
    """The kernel in the arithmetic's dtype, whole along D: gathered once, not once a chunk."""
    # Held in place while it is cast: otherwise XLA gathers first, twice the bytes.
    kernel_DV = sharding.constrain(kernel_DV.astype(dtype), ("embed", "vocab"), layout)
    return sharding.constrain(kernel_DV, ("act_embed", "act_vocab"), layout)


def _parts(logical: str, layout: Layout | None) -> int:
    return 1 if layout is None else layout.size(logical)


# Logical axes of the partial sums [Z, X, D, V]: Z shards of the batch, X of the length.
_PARTS = ("batch", "length", "act_embed", "act_vocab")


def _by_parts(hidden_BCD, dlogits_BCV, layout):
    (B, C, D), V = hidden_BCD.shape, dlogits_BCV.shape[2]
    Z, X = _parts("batch", layout), _parts("length", layout)
    return jnp.einsum(
        "zbxcd,zbxcv->zxdv",
        hidden_BCD.reshape(Z, B // Z, X, C // X, D),
        dlogits_BCV.reshape(Z, B // Z, X, C // X, V),
        preferred_element_type=jnp.float32,
    )


def _meet(gradient_ZXDV: jax.Array, layout: Layout | None) -> jax.Array:
    """The sum over Z and X, the devices' parts: [Z, X, D, V] -> [D, V]."""
    # One chunk is no loop: XLA would fold tied embeddings' transpose into the bfloat16 product, a
    # form that its CPU backend compiles but cannot run.
    gradient_ZXDV = jax.lax.optimization_barrier(gradient_ZXDV)
    if layout is None:
        return gradient_ZXDV.sum(axis=(0, 1))
    return _mapped(
        lambda local_ZXDV: gradients.reduce_to_shard(local_ZXDV[0, 0], layout=layout),
        [_PARTS],
        layout,
    )(gradient_ZXDV)


def _in_pieces(hidden_SBCD, dlogits_SBCV, piece: int, layout: Layout | None) -> jax.Array:
    """Gradient hidden^T dlogits, [D, V] in float32, by `piece` rows of each device's shard of D."""

    def product(hidden_SBCD, dlogits_SBCV):
        # D lies as [devices, pieces, rows]: a piece scatters to every device at once.
        shape = (*hidden_SBCD.shape[:3], _parts("embed", layout), -1, piece)
        pieces = jnp.moveaxis(hidden_SBCD.reshape(shape), 4, 0)

        def one(piece_SBCYR):
            local_DV = jnp.einsum(
                "sbcd,sbcv->dv",
                piece_SBCYR.reshape(*piece_SBCYR.shape[:3], -1),
                dlogits_SBCV,
                preferred_element_type=jnp.float32,
            )
            local_DV = jax.lax.optimization_barrier(local_DV)  # as in `_meet`
            return (
                local_DV if layout is None else gradients.reduce_to_shard(local_DV, layout=layout)
            )

        return jax.lax.map(one, pieces).reshape(-1, dlogits_SBCV.shape[-1])

    if layout is None:
        return product(hidden_SBCD, dlogits_SBCV)
    axes = [(None, "batch", "length", "act_embed"), (None, "batch", "length", "act_vocab")]
    return _mapped(product, axes, layout)(hidden_SBCD, dlogits_SBCV)


def _mapped(local, axes, layout: Layout):
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=tuple(sharding.spec(names, layout) for names in axes),
        out_specs=sharding.spec(("embed", "vocab"), layout),
        check_vma=False,  # the sum over groups of an axis is not known to vary over the axis
    )


def _logits(hidden_BCD: jax.Array, kernel_DV: jax.Array, layout: Layout | None) -> jax.Array:
    # float32 island: the log-sum-exp over 152k terms.
    logits_BCV = jnp.einsum(
        "bcd,dv->bcv", hidden_BCD, kernel_DV, preferred_element_type=jnp.float32
    )
    return sharding.constrain(logits_BCV, ("batch", "length", "act_vocab"), layout)


def _chunk_sums(logits_BCV, targets_BC, weights_BC, z_loss, layout):
    """(loss, cross-entropy, number right, weight) of each part [B, X], and log Z [B, C].

    Two passes over the logits: the maximum and the target's logit, then the sum of exponentials.
    """
    columns = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits_BCV.shape[-1]), 2)
    # A masked maximum, not a gather: it stays local where the vocabulary is sharded. One reduction
    # of two operands: as two, XLA reads the logits twice (1% of a 1.5B step on an H100).
    masked_BCV = jnp.where(columns == targets_BC[..., None], logits_BCV, -jnp.inf)
    peak_BC, target_BC = jax.lax.reduce(
        (logits_BCV, masked_BCV), (-jnp.inf, -jnp.inf), _max_of_each, dimensions=(2,)
    )
    log_z_BC = peak_BC + jnp.log(jnp.sum(jnp.exp(logits_BCV - peak_BC[..., None]), axis=-1))
    # A target outside the vocabulary costs infinity, unless its weight says that it is not one.
    entropy_BC = jnp.where(weights_BC == 0, 0.0, log_z_BC - target_BC)
    right_BC = target_BC >= peak_BC
    terms = (entropy_BC + z_loss * log_z_BC**2, entropy_BC, right_BC, jnp.ones_like(entropy_BC))
    shape = (targets_BC.shape[0], _parts("length", layout), -1)
    return tuple((weights_BC * x_BC).reshape(shape).sum(axis=-1) for x_BC in terms), log_z_BC


def _max_of_each(left, right):
    return tuple(map(jnp.maximum, left, right))


def _zero_sums(hidden_BTD: jax.Array, layout: Layout | None) -> tuple[jax.Array, ...]:
    zeros_BX = jnp.zeros((hidden_BTD.shape[0], _parts("length", layout)), jnp.float32)
    return (sharding.constrain(zeros_BX, ("batch", "length"), layout),) * 4


def _split(x: jax.Array, chunk: int, layout: Layout | None) -> jax.Array:
    """[B, T, ...] -> [chunks, B, X chunk, ...], to scan over: `chunk` of each of X parts at a time.

    A part is what one device has of a sequence; it is padded to whole chunks, with weight 0.
    """
    B, X = x.shape[0], _parts("length", layout)
    parts = x.reshape(B, X, -1, *x.shape[2:])
    beyond = ((0, 0), (0, 0), (0, -parts.shape[2] % chunk)) + ((0, 0),) * (x.ndim - 2)
    chunks = jnp.pad(parts, beyond).reshape(B, X, -1, chunk, *x.shape[2:])
    chunks = jnp.moveaxis(chunks, 2, 0).reshape(-1, B, X * chunk, *x.shape[2:])
    return sharding.constrain(chunks, (None, "batch", "length", *[None] * (x.ndim - 2)), layout)


def _join(chunks: jax.Array, length: int, layout: Layout | None) -> jax.Array:
    """Inverse of `_split`, without the padding: [chunks, B, X chunk, D] -> [B, T, D]."""
    S, B, C, D = chunks.shape
    X = _parts("length", layout)
    parts = jnp.moveaxis(chunks.reshape(S, B, X, C // X, D), 0, 2).reshape(B, X, -1, D)
    whole_BTD = parts[:, :, : length // X].reshape(B, length, D)
    return sharding.constrain(whole_BTD, ("batch", "length", None), layout)
