"""Layers with q, k, v in one kernel and gate, up in another: fewer, longer reads for each token.

The arithmetic is that of `qwen_jax.model.transformer.Block`, for parameters that `fuse` rearranged.
Query heads are grouped by the key-value head they share, so that tensor parallelism splits the
fused kernel as it splits the three: [D, K, G + 2, H] holds, for each of K key-value heads, its G
query heads, its key and its value.
"""

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.model import layers, module, moe, transformer
from qwen_jax.quant import array


class Attention(transformer.Attention):
    """Attention with one fused projection for queries, keys and values."""

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        init = layers.normal(cfg.initializer_range)
        D, H = cfg.hidden_size, cfg.head_dim
        N, K, G = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_query_groups
        self.qkv = layers.Linear(
            key,
            shape=(D, K, G + 2, H),
            axes=("embed", "kv_heads", None, "head_dim"),
            init=init,
            bias_dims=3,
        )
        axes = ("heads", "head_dim", "embed")
        self.o = layers.Linear(key, shape=(N, H, D), axes=axes, init=init)

    def project(
        self, x_BTD: jax.Array, *, layout: Layout | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        qkv_BTKJH = self.qkv(x_BTD, "btd,dkjh->btkjh", layout=layout)
        B, T, K, J, H = qkv_BTKJH.shape
        q_BTNH = qkv_BTKJH[:, :, :, : J - 2].reshape(B, T, K * (J - 2), H)
        return q_BTNH, qkv_BTKJH[:, :, :, J - 2], qkv_BTKJH[:, :, :, J - 1]


class SwiGLU(layers.SwiGLU):
    """SwiGLU with one fused projection [D, 2, F]: gate, then up."""

    def __init__(self, key: jax.Array, *, size: int, hidden: int, init: module.Initializer):
        self.gate_up = layers.Linear(
            key, shape=(size, 2, hidden), axes=("embed", None, "ffn"), init=init
        )
        self.down = layers.Linear(key, shape=(hidden, size), axes=("ffn", "embed"), init=init)

    def __call__(self, x_BTD: jax.Array, *, layout: Layout | None) -> jax.Array:
        both_BTCF = self.gate_up(x_BTD, "btd,dcf->btcf", layout=layout)
        h_BTF = jax.nn.silu(both_BTCF[:, :, 0]) * both_BTCF[:, :, 1]
        h_BTF = sharding.constrain(h_BTF, ("batch", "length", "act_ffn"), layout)
        return self.down(h_BTF, "btf,fd->btd", layout=layout)


class MoE(moe.MoE):
    """A mixture of experts whose shared expert is fused."""

    def make_shared(self, key: jax.Array, cfg: ModelConfig) -> None:
        self.shared = SwiGLU(
            key,
            size=cfg.hidden_size,
            hidden=cfg.moe.shared_expert_intermediate_size,
            init=layers.normal(cfg.initializer_range),
        )


class Block(transformer.Block):
    """A layer with fused attention and a fused feed-forward network."""

    make_attention = Attention

    def make_feed_forward(self, key: jax.Array, cfg: ModelConfig) -> None:
        init = layers.normal(cfg.initializer_range)
        self.mlp = SwiGLU(key, size=cfg.hidden_size, hidden=cfg.intermediate_size, init=init)


class OutputMajorAttention(Attention):
    """Fused attention with output-major kernels [K, G + 2, H, D] and [D, N, H]."""

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        init = layers.normal(cfg.initializer_range)
        D, H = cfg.hidden_size, cfg.head_dim
        N, K, G = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_query_groups
        axes = ("kv_heads", None, "head_dim", "embed")
        self.qkv = layers.OutputMajorLinear(
            key, shape=(K, G + 2, H, D), axes=axes, init=init, bias_dims=3
        )
        axes = ("embed", "heads", "head_dim")
        self.o = layers.OutputMajorLinear(key, shape=(D, N, H), axes=axes, init=init)


class OutputMajorSwiGLU(SwiGLU):
    """Fused SwiGLU with output-major kernels [2, F, D] and [D, F]."""

    def __init__(self, key: jax.Array, *, size: int, hidden: int, init: module.Initializer):
        axes = (None, "ffn", "embed")
        linear = layers.OutputMajorLinear
        self.gate_up = linear(key, shape=(2, hidden, size), axes=axes, init=init)
        axes = ("embed", "ffn")
        self.down = linear(key, shape=(size, hidden), axes=axes, init=init)


class OutputMajorBlock(transformer.Block):
    """A fused dense layer with output-major kernels, for `small_batch/`; on one device."""

    make_attention = OutputMajorAttention

    def make_feed_forward(self, key: jax.Array, cfg: ModelConfig) -> None:
        init = layers.normal(cfg.initializer_range)
        self.mlp = OutputMajorSwiGLU(
            key, size=cfg.hidden_size, hidden=cfg.intermediate_size, init=init
        )


class SparseBlock(transformer.SparseBlock):
    """A layer of experts with fused attention and a fused shared expert."""

    make_attention = Attention

    def make_feed_forward(self, key: jax.Array, cfg: ModelConfig) -> None:
        self.moe = MoE(key, cfg)


def fuse(cfg: ModelConfig, layer: dict) -> dict:
    """Parameters of one layer, or of stacked ones, with q, k, v joined and gate, up joined."""
    G = cfg.num_query_groups
    attention = layer["attention"]

    def grouped(name: str, leaf: str) -> jax.Array | array.QuantArray:
        x = attention[name][leaf]
        heads = (cfg.num_key_value_heads, G if name == "q" else 1, cfg.head_dim)
        if array.is_quantised(x):
            return array.with_outputs(x, heads)
        return x.reshape(*x.shape[:-2], *heads)

    def joined_leaf(leaf: str) -> jax.Array | array.QuantArray:
        three = [grouped(name, leaf) for name in "qkv"]
        if array.is_quantised(three[0]):
            return array.concatenate(three)
        return jnp.concatenate(three, axis=-2)

    qkv = {leaf: joined_leaf(leaf) for leaf in ("kernel", "bias")}
    joined = {**layer, "attention": {"qkv": qkv, "o": attention["o"]}}
    if "mlp" in layer:
        joined["mlp"] = _fuse_swiglu(layer["mlp"])
    elif "shared" in layer["moe"]:
        joined["moe"] = {**layer["moe"], "shared": _fuse_swiglu(layer["moe"]["shared"])}
    return joined


def output_major(layer: dict) -> dict:
    """The parameters of a fused dense layer with every kernel's outputs before its inputs."""
    attention, mlp = layer["attention"], layer["mlp"]
    qkv, o = attention["qkv"], attention["o"]["kernel"]
    gate_up, down = mlp["gate_up"]["kernel"], mlp["down"]["kernel"]
    return {
        **layer,
        "attention": {
            "qkv": {"kernel": jnp.moveaxis(qkv["kernel"], 0, -1), "bias": qkv["bias"]},
            "o": {"kernel": jnp.moveaxis(o, -1, 0)},
        },
        "mlp": {
            "gate_up": {"kernel": jnp.moveaxis(gate_up, 0, -1)},
            "down": {"kernel": down.T},
        },
    }


def can_fuse(layers: dict) -> bool:
    """Whether `fuse` takes these layers, one or stacked: kernels are plain, or quantised alike."""
    groups = [[layers["attention"][name]["kernel"] for name in "qkv"]]
    mlp = layers.get("mlp") or layers["moe"].get("shared")
    if mlp is not None:
        groups.append([mlp[name]["kernel"] for name in ("gate", "up")])
    return all(array.alike(kernels) for kernels in groups)


def _fuse_swiglu(mlp: dict) -> dict:
    both = [mlp["gate"]["kernel"], mlp["up"]["kernel"]]
    if array.is_quantised(both[0]):
        both = [array.with_outputs(kernel, (1, *kernel.outputs)) for kernel in both]
        gate_up = array.concatenate(both)
    else:
        gate_up = jnp.stack(both, axis=-2)
    return {"gate_up": {"kernel": gate_up}, "down": mlp["down"]}
