"""Qwen2.5 as pure functions: `init(cfg, key) -> params`, `apply(cfg, params, tokens) -> Output`.

Parameters are a plain nested dict, layers stacked along a leading dimension:

    embed.weight [V, D]
    layers.input_norm.scale [L, D]           layers.post_attention_norm.scale [L, D]
    layers.attention.{q,k,v}.kernel [L, D, N or K, H]  and .bias [L, N or K, H]
    layers.attention.o.kernel [L, N, H, D]
    layers.mlp.{gate,up}.kernel [L, D, F]    layers.mlp.down.kernel [L, F, D]
    norm.scale [D]                           lm_head.kernel [D, V], absent where embeddings are tied
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from configs import schema
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax import layers, module, remat, rope
from qwen_jax.attention import api, context

# Given q, k, v of one layer: attention's output, and whatever the caller keeps (its cache).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    """Grouped-query self-attention with QKV bias and RoPE (Qwen2 report, section 2.2.1)."""

    def __init__(self, key: jax.Array, cfg: schema.Model):
        init = layers.normal(cfg.initializer_range)
        keys = jax.random.split(key, 4)
        D, H = cfg.hidden_size, cfg.head_dim
        N, K = cfg.num_attention_heads, cfg.num_key_value_heads

        def inward(key: jax.Array, heads: int, name: str) -> layers.Linear:
            axes = ("embed", name, "head_dim")
            return layers.Linear(key, shape=(D, heads, H), axes=axes, init=init, bias_dims=2)

        self.q = inward(keys[0], N, "heads")
        self.k = inward(keys[1], K, "kv_heads")
        self.v = inward(keys[2], K, "kv_heads")
        axes = ("heads", "head_dim", "embed")
        self.o = layers.Linear(keys[3], shape=(N, H, D), axes=axes, init=init)

    def __call__(
        self, x_BTD: jax.Array, *, turn: rope.Rotation, attend: Attend, layout: Layout | None
    ) -> tuple[jax.Array, Any]:
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD)
        q_BTNH, k_BTKH = rope.rotate(q_BTNH, turn), rope.rotate(k_BTKH, turn)
        heads = ("batch", "length", "act_heads", None)
        kv_heads = ("batch", "length", "act_kv_heads", None)
        q_BTNH = checkpoint_name(sharding.constrain(q_BTNH, heads, layout), "q")
        k_BTKH = checkpoint_name(sharding.constrain(k_BTKH, kv_heads, layout), "k")
        v_BTKH = checkpoint_name(sharding.constrain(v_BTKH, kv_heads, layout), "v")
        o_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH)
        o_BTNH = sharding.constrain(o_BTNH, heads, layout)
        return self.o(o_BTNH, "btnh,nhd->btd"), kept

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [B, T, N, H], k and v [B, T, K, H], before RoPE."""
        q_BTNH = self.q(x_BTD, "btd,dnh->btnh")
        return q_BTNH, self.k(x_BTD, "btd,dkh->btkh"), self.v(x_BTD, "btd,dkh->btkh")


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, key: jax.Array, cfg: schema.Model):
        keys = jax.random.split(key, 4)
        D, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_norm = layers.RMSNorm(keys[0], size=D, eps=eps)
        self.attention = Attention(keys[1], cfg)
        self.post_attention_norm = layers.RMSNorm(keys[2], size=D, eps=eps)
        self.mlp = layers.SwiGLU(
            keys[3],
            size=D,
            hidden=cfg.intermediate_size,
            init=layers.normal(cfg.initializer_range),
        )

    def __call__(
        self, x_BTD: jax.Array, *, turn: rope.Rotation, attend: Attend, layout: Layout | None
    ) -> tuple[jax.Array, Any]:
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        y_BTD, kept = self.attention(
            self.input_norm(x_BTD), turn=turn, attend=attend, layout=layout
        )
        x_BTD = checkpoint_name(x_BTD + y_BTD, "attention_residual")
        x_BTD = x_BTD + self.mlp(self.post_attention_norm(x_BTD), layout=layout)
        return sharding.constrain(x_BTD, ("batch", "length", "act_embed"), layout), kept


@dataclass(frozen=True)
class Output:
    """`hidden_BTD`: the final norm's output; `unembed` turns (some of) it into logits."""

    hidden_BTD: jax.Array


jax.tree_util.register_dataclass(Output, ["hidden_BTD"], [])


@functools.lru_cache(maxsize=64)
def parts(cfg: schema.Model) -> dict[str, module.Part]:
    """The model's modules by the name of their subtree."""
    init = layers.normal(cfg.initializer_range)
    V, D = cfg.vocab_size, cfg.hidden_size
    table = {
        "embed": module.Part(lambda key: layers.Embed(key, num_rows=V, size=D, init=init)),
        "layers": module.Part(lambda key: Block(key, cfg), count=cfg.num_hidden_layers),
        "norm": module.Part(lambda key: layers.RMSNorm(key, size=D, eps=cfg.rms_norm_eps)),
    }
    if not cfg.tie_word_embeddings:
        table["lm_head"] = module.Part(
            lambda key: layers.Linear(key, shape=(D, V), axes=("embed", "vocab"), init=init)
        )
    return table


def init(cfg: schema.Model, key: jax.Array) -> dict:
    """Random float32 parameters."""
    keys = jax.random.split(key, 4)
    return {name: part.init(k) for (name, part), k in zip(parts(cfg).items(), keys, strict=False)}


def axes(cfg: schema.Model) -> dict:
    """The logical axes of every parameter, as a tree of tuples."""
    return {name: part.axes() for name, part in parts(cfg).items()}


def shapes(cfg: schema.Model, *, dtype: jnp.dtype = jnp.float32) -> dict:
    """The parameters as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    abstract = jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract)


def apply(
    cfg: schema.Model,
    params: dict,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    dtype: jnp.dtype = jnp.float32,
    attention: str | None = None,
    context_parallel: str | None = None,
    remat_policy: str = "none",
    layer_loop: str = "scan",
    layout: Layout | None = None,
) -> Output:
    """The transformer over whole sequences, causally masked.

    positions_BT defaults to 0..T-1; packed rows restart them, and give equal `segment_ids_BT` to
    tokens of one document. `dtype` is that of the arithmetic. `attention` names an implementation,
    `context_parallel` how rows spread over devices meet: all arrays [B, T] are then in the order
    that `qwen_jax/attention/context.py` says, and `context.arrange` puts them there.
    `remat_policy` what the backward pass recomputes (`qwen_jax/remat.py`), `layer_loop` how layers
    are run (`run_layers`).
    Raises `ValueError` for lengths beyond a dual-chunk model's chunk.
    """
    B, T = tokens_BT.shape
    check_length(cfg, T)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        positions_BT = context.arrange(positions_BT, context_parallel, layout=layout)
    mask = api.Mask(causal=True, segment_ids_BT=segment_ids_BT)

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, None]:
        o_BTNH = api.attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            mask=mask,
            implementation=attention,
            context_parallel=context_parallel,
            layout=layout,
        )
        return o_BTNH, None

    def body(x_BTD: jax.Array, layer: dict, index: jax.Array | int) -> jax.Array:
        del index
        return block(layer)(x_BTD, turn=turn, attend=attend, layout=layout)[0]

    turn = rope.rotation(cfg, positions_BT)
    block = parts(cfg)["layers"].bind
    x_BTD = embed(cfg, params, tokens_BT, dtype=dtype, layout=layout)
    body = remat.wrap(body, remat_policy)
    x_BTD = run_layers(body, x_BTD, params["layers"], layer_loop=layer_loop)
    return Output(parts(cfg)["norm"].bind(params["norm"])(x_BTD))


def run_layers(
    body: Callable[[Any, dict, jax.Array | int], Any],
    carry: Any,
    layers: dict | tuple[dict, ...],
    *,
    layer_loop: str = "scan",
) -> Any:
    """`carry = body(carry, layer, index)` for every layer: of stacked parameters, or of a tuple.

    scan: compiles as fast for 80 layers as for 8; the index is traced. unrolled: one copy of the
    code a layer, minutes to compile for large models, but nothing is copied into and out of stacked
    arrays (on one H100, 1.5B: 488 TFLOP/s against 453; docs/experiments.md). A tuple of layers is
    always unrolled. Raises `ValueError` for another name.
    """
    if layer_loop not in ("scan", "unrolled"):
        raise ValueError(f"unknown layer_loop {layer_loop!r}; known: scan, unrolled")
    if layer_loop == "scan" and isinstance(layers, dict):
        indices = jnp.arange(jax.tree.leaves(layers)[0].shape[0])
        return jax.lax.scan(lambda c, xs: (body(c, *xs), None), carry, (layers, indices))[0]
    for index, layer in enumerate(layers if isinstance(layers, tuple) else module.unstack(layers)):
        carry = body(carry, layer, index)
    return carry


def embed(
    cfg: schema.Model,
    params: dict,
    tokens_BT: jax.Array,
    *,
    dtype: jnp.dtype,
    layout: Layout | None = None,
) -> jax.Array:
    """[B, T] ids -> [B, T, D]."""
    return parts(cfg)["embed"].bind(params["embed"])(tokens_BT, dtype=dtype, layout=layout)


def output_kernel(cfg: schema.Model, params: dict) -> jax.Array:
    """The projection to the vocabulary, [D, V]: the embedding's transpose where tied."""
    return params["embed"]["weight"].T if cfg.tie_word_embeddings else params["lm_head"]["kernel"]


def unembed(cfg: schema.Model, params: dict, hidden_BTD: jax.Array) -> jax.Array:
    """Logits [B, T, V] in float32. For a few positions: training never holds this array."""
    kernel_DV = output_kernel(cfg, params).astype(hidden_BTD.dtype)
    return jnp.einsum("btd,dv->btv", hidden_BTD, kernel_DV, preferred_element_type=jnp.float32)


def check_length(cfg: schema.Model, length: int) -> None:
    """Raises `ValueError` where plain RoPE would no longer be what the model computes."""
    dual = cfg.dual_chunk_attention
    if dual is not None and length > dual.chunk_size:
        raise ValueError(
            f"length {length} exceeds the dual chunk attention's chunk_size={dual.chunk_size} of "
            f"{cfg.name}: up to there it equals plain RoPE, beyond it is not implemented; use "
            f"sequences of at most {dual.chunk_size} tokens"
        )
    if length > max_length(cfg):
        extended = max_length(cfg) > cfg.max_position_embeddings
        origin = "rope_scaling's extended length" if extended else "max_position_embeddings"
        raise ValueError(
            f"length {length} exceeds {origin}={max_length(cfg)} of {cfg.name}; use shorter "
            f"sequences, or extend the context with rope_scaling"
        )


def max_length(cfg: schema.Model) -> int:
    """The most tokens that a sequence may have."""
    limit = cfg.max_position_embeddings
    if cfg.rope_scaling is not None:
        # The released configs keep max_position_embeddings at the unextended 32,768.
        yarn = cfg.rope_scaling
        limit = max(limit, int(yarn.factor * yarn.original_max_position_embeddings))
    if cfg.dual_chunk_attention is not None:
        limit = min(limit, cfg.dual_chunk_attention.chunk_size)
    return limit
