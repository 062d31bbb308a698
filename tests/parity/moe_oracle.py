"""The oracle for experts: transformers' Qwen2Moe with random weights, in torch float32 on the CPU.

As in `oracle.py`, its weights go into our tree by code that knows nothing of the project's table.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from configs.models import qwen2_moe
from configs.models.architecture import ModelConfig, MoEConfig
from tests.parity import oracle

BASE = dataclasses.replace(
    qwen2_moe.a2_7b(),
    vocab_size=oracle.VOCAB,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    bos_token_id=None,
    pad_token_id=None,
    eos_token_ids=(),
    moe=MoEConfig(
        num_experts=10,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=112,
        router_aux_loss_coef=0.3,
    ),
)


def changed(**fields) -> ModelConfig:
    """`BASE` with other fields of its experts."""
    return dataclasses.replace(BASE, moe=dataclasses.replace(BASE.moe, **fields))


MODELS = {
    "as published": BASE,
    "renormalised": changed(norm_topk_prob=True),
    "every second layer": dataclasses.replace(changed(decoder_sparse_step=2), num_hidden_layers=5),
    "one dense layer": changed(mlp_only_layers=(1,)),
}


def build(cfg: ModelConfig, *, seed: int = 0) -> transformers.Qwen2MoeForCausalLM:
    """A random model whose router is far from undecided, as in `oracle.build`."""
    dense = oracle.huggingface_config(dataclasses.replace(cfg, moe=None))
    shared = {
        name: getattr(dense, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
            "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
        )
    }  # fmt: skip
    config = transformers.Qwen2MoeConfig(
        **shared,
        num_experts=cfg.moe.num_experts,
        num_experts_per_tok=cfg.moe.num_experts_per_tok,
        moe_intermediate_size=cfg.moe.moe_intermediate_size,
        shared_expert_intermediate_size=cfg.moe.shared_expert_intermediate_size,
        norm_topk_prob=cfg.moe.norm_topk_prob,
        decoder_sparse_step=cfg.moe.decoder_sparse_step,
        mlp_only_layers=list(cfg.moe.mlp_only_layers),
        router_aux_loss_coef=cfg.moe.router_aux_loss_coef,
        output_router_logits=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.Qwen2MoeForCausalLM(config).float().eval()
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "norm" in name:
                    tensor.uniform_(0.4, 1.8)
                elif name.endswith("bias"):
                    tensor.normal_(0.0, 0.5)
                elif "embed_tokens" in name:
                    tensor.normal_(0.0, 0.02)
                else:
                    tensor.normal_(0.0, 1.3 / tensor.shape[-1] ** 0.5)
    return model


def params_from(tensors: dict[str, torch.Tensor], cfg: ModelConfig) -> dict:
    """Our tree from tensors named as in a Qwen2Moe state dict (weights or gradients), float32."""
    sparse = [f"model.layers.{i}." for i in cfg.sparse_layers]
    dense = [f"model.layers.{i}." for i in cfg.dense_layers]
    arrays = {name: t.detach().float().numpy() for name, t in tensors.items()}
    tree = {
        "embed": {"weight": arrays["model.embed_tokens.weight"]},
        "layers": _attention(arrays, cfg, sparse) | {"moe": _experts(arrays, cfg, sparse)},
        "norm": {"scale": arrays["model.norm.weight"]},
        "lm_head": {"kernel": arrays["lm_head.weight"].T},
    }
    if dense:
        mlp = _swiglu(arrays, [prefix + "mlp." for prefix in dense])
        tree["dense_layers"] = _attention(arrays, cfg, dense) | {"mlp": mlp}
    return jax.tree.map(jnp.asarray, tree)


def _stack(arrays: dict, prefixes: list[str], name: str, convert=lambda w: w) -> np.ndarray:
    return np.stack([convert(arrays[prefix + name]) for prefix in prefixes])


def _attention(arrays: dict, cfg: ModelConfig, prefixes: list[str]) -> dict:
    D, H = cfg.hidden_size, cfg.head_dim
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads

    def inward(name: str, heads: int) -> dict:
        kernel = _stack(
            arrays, prefixes, f"self_attn.{name}.weight", lambda w: w.T.reshape(D, heads, H)
        )
        bias = _stack(arrays, prefixes, f"self_attn.{name}.bias", lambda b: b.reshape(heads, H))
        return {"kernel": kernel, "bias": bias}

    outward = _stack(arrays, prefixes, "self_attn.o_proj.weight", lambda w: w.T.reshape(N, H, D))
    attention = {"q": inward("q_proj", N), "k": inward("k_proj", K), "v": inward("v_proj", K)}
    return {
        "input_norm": {"scale": _stack(arrays, prefixes, "input_layernorm.weight")},
        "attention": attention | {"o": {"kernel": outward}},
        "post_attention_norm": {
            "scale": _stack(arrays, prefixes, "post_attention_layernorm.weight")
        },
    }


def _swiglu(arrays: dict, prefixes: list[str]) -> dict:
    return {
        name: {"kernel": _stack(arrays, prefixes, f"{name}_proj.weight", lambda w: w.T)}
        for name in ("gate", "up", "down")
    }


def _experts(arrays: dict, cfg: ModelConfig, prefixes: list[str]) -> dict:
    F = cfg.moe.moe_intermediate_size
    prefixes = [prefix + "mlp." for prefix in prefixes]
    both = _stack(arrays, prefixes, "experts.gate_up_proj").swapaxes(2, 3)
    down = _stack(arrays, prefixes, "experts.down_proj").swapaxes(2, 3)
    return {
        "router": {"kernel": _stack(arrays, prefixes, "gate.weight", lambda w: w.T)},
        "experts": {
            "gate": {"kernel": both[..., :F]},
            "up": {"kernel": both[..., F:]},
            "down": {"kernel": down},
        },
        "shared": _swiglu(arrays, [prefix + "shared_expert." for prefix in prefixes]),
        "shared_gate": {
            "kernel": _stack(arrays, prefixes, "shared_expert_gate.weight", lambda w: w.T)
        },
    }
