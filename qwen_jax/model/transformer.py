"""Qwen2.5 as pure functions: `init(cfg, key) -> params`, `apply(cfg, params, tokens) -> Output`.

Parameters are a plain nested dict, layers stacked along a leading dimension:

    embed.weight [V, D]
    layers.input_norm.scale [L, D]           layers.post_attention_norm.scale [L, D]
    layers.attention.{q,k,v}.kernel [L, D, N or K, H]  and .bias [L, N or K, H]
    layers.attention.o.kernel [L, N, H, D]
    layers.mlp.{gate,up}.kernel [L, D, F]    layers.mlp.down.kernel [L, F, D]
    norm.scale [D]                           lm_head.kernel [D, V], absent where embeddings are tied

With experts, E of them held and J chosen (`qwen_jax/model/moe.py`), a layer has in place of `mlp`:

    layers.moe.router.kernel [L, D, E]       and .bias [L, E], where one steers the choice
    layers.moe.experts.{gate,up}.kernel [L, E, D, F]   and .down.kernel [L, E, F, D]
    layers.moe.shared.{gate,up,down}.kernel, layers.moe.shared_gate.kernel [L, D, 1]

Where only some layers have experts, `layers` holds those, and `dense_layers` the others.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.model import layers, module, moe, remat, rope, stack
from qwen_jax.ops.attention import api, context_parallelism
from qwen_jax.ops.quantized_matmul import api as quantized_matmul
from qwen_jax.quant import array

# From q, k, v of one layer: attention's output, and what the caller stores (its cache).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    """Grouped-query self-attention with QKV bias and RoPE (Qwen2 report, section 2.2.1)."""

    def __init__(self, key: jax.Array, cfg: ModelConfig):
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
        self, x_BTD: jax.Array, *, rotation: rope.Rotation, attend: Attend, layout: Layout | None
    ) -> tuple[jax.Array, Any]:
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, layout=layout)
        q_BTNH, k_BTKH = rope.rotate(q_BTNH, rotation), rope.rotate(k_BTKH, rotation)
        heads = ("batch", "length", "act_heads", None)
        kv_heads = ("batch", "length", "act_kv_heads", None)
        q_BTNH = checkpoint_name(sharding.constrain(q_BTNH, heads, layout), "q")
        k_BTKH = checkpoint_name(sharding.constrain(k_BTKH, kv_heads, layout), "k")
        v_BTKH = checkpoint_name(sharding.constrain(v_BTKH, kv_heads, layout), "v")
        o_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH)
        o_BTNH = sharding.constrain(o_BTNH, heads, layout)
        return self.o(o_BTNH, "btnh,nhd->btd", layout=layout), cache

    def project(
        self, x_BTD: jax.Array, *, layout: Layout | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], before RoPE."""
        q_BTNH = self.q(x_BTD, "btd,dnh->btnh", layout=layout)
        k_BTKH = self.k(x_BTD, "btd,dkh->btkh", layout=layout)
        return q_BTNH, k_BTKH, self.v(x_BTD, "btd,dkh->btkh", layout=layout)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    make_attention = Attention

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        keys = jax.random.split(key, 4)
        D, eps = cfg.hidden_size, cfg.rms_norm_eps
        self.input_norm = layers.RMSNorm(keys[0], size=D, eps=eps)
        self.attention = self.make_attention(keys[1], cfg)
        self.post_attention_norm = layers.RMSNorm(keys[2], size=D, eps=eps)
        self.make_feed_forward(keys[3], cfg)

    def make_feed_forward(self, key: jax.Array, cfg: ModelConfig) -> None:
        """Declares the modules that `feed_forward` applies."""
        self.mlp = layers.SwiGLU(
            key,
            size=cfg.hidden_size,
            hidden=cfg.intermediate_size,
            init=layers.normal(cfg.initializer_range),
        )

    def feed_forward(
        self, x_BTD: jax.Array, *, layout: Layout | None, routing: moe.Routing
    ) -> tuple[jax.Array, moe.Stats | None]:
        """The term added to the residual stream, and the router's statistics, if there is one."""
        del routing
        return self.mlp(x_BTD, layout=layout), None

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        rotation: rope.Rotation,
        attend: Attend,
        layout: Layout | None,
        routing: moe.Routing = moe.DROPLESS,
        only_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, moe.Stats | None]:
        """The residual stream, the second result of `attend`, and the router's statistics.

        only_B: the one position of each row that is computed further, [B, 1, D]; `attend` returns
        attention at that position alone.
        """
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        y_BTD, cache = self.attention(
            self.input_norm(x_BTD), rotation=rotation, attend=attend, layout=layout
        )
        if only_B is not None:
            x_BTD = jnp.take_along_axis(x_BTD, only_B[:, None, None], axis=1)
        x_BTD = checkpoint_name(x_BTD + y_BTD, "attention_residual")
        y_BTD, stats = self.feed_forward(
            self.post_attention_norm(x_BTD), layout=layout, routing=routing
        )
        x_BTD = sharding.constrain(x_BTD + y_BTD, ("batch", "length", "act_embed"), layout)
        return x_BTD, cache, stats


class SparseBlock(Block):
    """`Block` with experts in place of the one feed-forward network."""

    def make_feed_forward(self, key: jax.Array, cfg: ModelConfig) -> None:
        self.moe = moe.MoE(key, cfg)

    def feed_forward(
        self, x_BTD: jax.Array, *, layout: Layout | None, routing: moe.Routing
    ) -> tuple[jax.Array, moe.Stats | None]:
        return self.moe(x_BTD, layout=layout, routing=routing)


@dataclass(frozen=True)
class Output:
    """Results of a forward pass.

    hidden_BTD: the final norm's output, of which `unembed` makes logits. router: statistics of the
    layers with experts, stacked; None where there are none.
    """

    hidden_BTD: jax.Array
    router: moe.Stats | None = None


jax.tree_util.register_dataclass(Output, ["hidden_BTD", "router"], [])


@functools.lru_cache(maxsize=64)
def definitions(cfg: ModelConfig) -> dict[str, module.Definition]:
    """The definitions of the model's modules, by the name of their subtree of parameters."""
    init = layers.normal(cfg.initializer_range)
    V, D = cfg.vocab_size, cfg.hidden_size
    table = {
        "embed": module.Definition(lambda key: layers.Embed(key, num_rows=V, size=D, init=init)),
        **stacks(cfg, Block, SparseBlock),
        "norm": module.Definition(lambda key: layers.RMSNorm(key, size=D, eps=cfg.rms_norm_eps)),
    }
    if not cfg.tie_word_embeddings:
        table["lm_head"] = module.Definition(
            lambda key: layers.Linear(key, shape=(D, V), axes=("embed", "vocab"), init=init)
        )
    return table


def stacks(
    cfg: ModelConfig, dense: type[Block], sparse: type[Block]
) -> dict[str, module.Definition]:
    """Definitions of the model's stacks of these blocks, by the name of their subtree."""
    counts = {"layers": (sparse, len(cfg.sparse_layers)), "dense_layers": (dense, 0)}
    if not cfg.sparse_layers:
        counts = {"layers": (dense, cfg.num_hidden_layers)}
    elif cfg.dense_layers:
        counts["dense_layers"] = (dense, len(cfg.dense_layers))
    return {
        name: module.Definition(lambda key, block=block: block(key, cfg), count=count)
        for name, (block, count) in counts.items()
        if count
    }


def init(cfg: ModelConfig, key: jax.Array) -> dict:
    """Random float32 parameters."""
    table = definitions(cfg)
    keys = jax.random.split(key, max(4, len(table)))
    return {name: one.init(k) for (name, one), k in zip(table.items(), keys, strict=False)}


def axes(cfg: ModelConfig) -> dict:
    """The logical axes of every parameter, as a tree of tuples."""
    return {name: one.axes() for name, one in definitions(cfg).items()}


def shapes(cfg: ModelConfig, *, dtype: jnp.dtype = jnp.float32) -> dict:
    """The parameters as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    abstract = jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract)


def apply(
    cfg: ModelConfig,
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
    tokens of one document. `dtype` is that of the arithmetic. `attention` names an implementation.
    `context_parallel` names the attention over sequences that are sharded over devices; all arrays
    [B, T] are then in the order of `context_parallelism.arrange`. `remat_policy` names what the
    backward pass recomputes (`qwen_jax/model/remat.py`), `layer_loop` the loop over layers
    (`qwen_jax/model/stack.py`). Raises `ValueError` for lengths beyond a dual-chunk model's chunk.
    """
    B, T = tokens_BT.shape
    check_length(cfg, T)
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        positions_BT = context_parallelism.arrange(positions_BT, context_parallel, layout=layout)
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

    def body(block: module.Definition, x_BTD: jax.Array, layer: dict, index: jax.Array | int):
        del index
        x_BTD, _, stats = block.bind(layer)(
            x_BTD, rotation=rotation, attend=attend, layout=layout, routing=routing
        )
        return x_BTD, stats

    routing = moe.Routing(
        capacity_factor=None if cfg.moe is None else cfg.moe.capacity_factor,
        real_BT=None if segment_ids_BT is None else segment_ids_BT != 0,
    )
    rotation = rope.rotation(cfg, positions_BT)
    x_BTD = embed(cfg, params, tokens_BT, dtype=dtype, layout=layout)
    bodies = {
        name: remat.wrap(
            functools.partial(body, definitions(cfg)[name]), remat_policy, layer_loop=layer_loop
        )
        for name in set(stack.order(cfg))
    }
    x_BTD, stats = stack.run(cfg, params, bodies, x_BTD, layer_loop=layer_loop)
    return Output(definitions(cfg)["norm"].bind(params["norm"])(x_BTD), stats)


def embed(
    cfg: ModelConfig,
    params: dict,
    tokens_BT: jax.Array,
    *,
    dtype: jnp.dtype,
    layout: Layout | None = None,
) -> jax.Array:
    """Embeddings [B, T, D] of ids [B, T]."""
    return definitions(cfg)["embed"].bind(params["embed"])(tokens_BT, dtype=dtype, layout=layout)


def output_kernel(cfg: ModelConfig, params: dict) -> jax.Array:
    """The projection to the vocabulary, [D, V]: the embedding's transpose where tied."""
    return params["embed"]["weight"].T if cfg.tie_word_embeddings else params["lm_head"]["kernel"]


def unembed(
    cfg: ModelConfig, params: dict, hidden_BTD: jax.Array, *, layout: Layout | None = None
) -> jax.Array:
    """Logits [B, T, V] in float32, for a few positions: training never holds this array."""
    tied = cfg.tie_word_embeddings
    stored = params["embed"]["weight"] if tied else params["lm_head"]["kernel"]
    if array.is_quantised(stored):
        einsum = "btd,vd->btv" if tied else "btd,dv->btv"
        return quantized_matmul.contract(
            einsum, hidden_BTD, stored, layout=layout, preferred=jnp.float32
        )
    kernel_DV = output_kernel(cfg, params).astype(hidden_BTD.dtype)
    return jnp.einsum("btd,dv->btv", hidden_BTD, kernel_DV, preferred_element_type=jnp.float32)


def check_length(cfg: ModelConfig, length: int) -> None:
    """Raises `ValueError` for lengths at which plain RoPE is not what the model computes."""
    dual = cfg.dual_chunk_attention
    if dual is not None and length > dual.chunk_size:
        raise ValueError(
            f"length {length} exceeds the dual chunk attention's chunk_size={dual.chunk_size} of "
            f"{cfg.name}: shorter lengths equal plain RoPE, longer ones are not implemented; use "
            f"sequences of at most {dual.chunk_size} tokens"
        )
    if length > max_length(cfg):
        extended = max_length(cfg) > cfg.max_position_embeddings
        origin = "rope_scaling's extended length" if extended else "max_position_embeddings"
        raise ValueError(
            f"length {length} exceeds {origin}={max_length(cfg)} of {cfg.name}; use shorter "
            f"sequences, or extend the context with rope_scaling"
        )


def max_length(cfg: ModelConfig) -> int:
    """The most tokens that a sequence may have."""
    limit = cfg.max_position_embeddings
    if cfg.rope_scaling is not None:
        # The released configs keep max_position_embeddings at the unextended 32,768.
        yarn = cfg.rope_scaling
        limit = max(limit, int(yarn.factor * yarn.original_max_position_embeddings))
    if cfg.dual_chunk_attention is not None:
        limit = min(limit, cfg.dual_chunk_attention.chunk_size)
    return limit
