"""The oracle: transformers' Qwen2 with random weights, in torch float32 on the CPU.

Weights go from its state dict into our tree by `params_from`, written here once more and on purpose
apart from the project's own conversion table, so that one mistake cannot hide the other.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from configs.models import qwen2_5
from configs.models.architecture import ModelConfig

VOCAB = 211  # a prime: nothing divides it by accident


def shrink(preset: str) -> ModelConfig:
    """The preset's head size, query heads per key-value head, tying, eps and base; little else."""
    full = qwen2_5.preset(preset)
    return dataclasses.replace(
        full,
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=2 * full.num_query_groups,
        num_key_value_heads=2,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_ids=(),
        dual_chunk_attention=None,
    )


def families() -> dict[str, ModelConfig]:
    """One shrunken model per distinct shape among all presets, by the first preset that has it."""
    found: dict[tuple, tuple[str, ModelConfig]] = {}
    for name in qwen2_5.PRESETS:
        if name.startswith("tiny"):
            continue
        small = shrink(name)
        shape = (
            small.head_dim,
            small.num_query_groups,
            small.tie_word_embeddings,
            small.rms_norm_eps,
            small.rope_theta,
        )
        found.setdefault(shape, (name, small))
    return dict(found.values())


def huggingface_config(cfg: ModelConfig) -> transformers.Qwen2Config:
    """The same model as transformers describes it."""
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    positions = cfg.max_position_embeddings
    if cfg.rope_scaling is not None:
        given = dataclasses.asdict(cfg.rope_scaling)
        rope |= {"rope_type": "yarn"} | {k: v for k, v in given.items() if v is not None}
        # It only checks this one against the factor, and warns; RoPE itself does not read it.
        yarn = cfg.rope_scaling
        positions = int(yarn.factor * yarn.original_max_position_embeddings)
    return transformers.Qwen2Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        max_position_embeddings=positions,
        rms_norm_eps=cfg.rms_norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=cfg.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
    )


def build(cfg: ModelConfig, *, seed: int = 0) -> transformers.Qwen2ForCausalLM:
    """A random model in which every parameter matters: biases non-zero, norm scales far from 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.Qwen2ForCausalLM(huggingface_config(cfg)).float().eval()
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if "norm" in name:
                    tensor.uniform_(0.4, 1.8)
                elif name.endswith("bias"):
                    tensor.normal_(0.0, 0.5)
                elif "embed_tokens" in name:
                    tensor.normal_(0.0, 0.02)  # so small that eps shows in the first layer
                else:
                    # Products keep their size, and attention is far from uniform.
                    tensor.normal_(0.0, 1.3 / tensor.shape[1] ** 0.5)
    return model


def params_from(tensors: dict[str, torch.Tensor], cfg: ModelConfig) -> dict:
    """Our tree from tensors named as in a Qwen2 state dict (weights or gradients), in float32."""
    D, H, L = cfg.hidden_size, cfg.head_dim, cfg.num_hidden_layers
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads

    def numpy(name: str) -> np.ndarray:
        return tensors[name].detach().float().numpy()

    def stack(name: str, convert=lambda w: w) -> jnp.ndarray:
        return jnp.stack([convert(numpy(f"model.layers.{i}.{name}")) for i in range(L)])

    def inward(name: str, heads: int) -> dict:
        # torch keeps [out, in], and `out` runs over heads, then over each head's numbers.
        return {
            "kernel": stack(f"self_attn.{name}.weight", lambda w: w.T.reshape(D, heads, H)),
            "bias": stack(f"self_attn.{name}.bias", lambda b: b.reshape(heads, H)),
        }

    tree = {
        "embed": {"weight": jnp.asarray(numpy("model.embed_tokens.weight"))},
        "layers": {
            "input_norm": {"scale": stack("input_layernorm.weight")},
            "attention": {
                "q": inward("q_proj", N),
                "k": inward("k_proj", K),
                "v": inward("v_proj", K),
                "o": {
                    "kernel": stack("self_attn.o_proj.weight", lambda w: w.T.reshape(N, H, D)),
                },
            },
            "post_attention_norm": {"scale": stack("post_attention_layernorm.weight")},
            "mlp": {
                name: {"kernel": stack(f"mlp.{name}_proj.weight", lambda w: w.T)}
                for name in ("gate", "up", "down")
            },
        },
        "norm": {"scale": jnp.asarray(numpy("model.norm.weight"))},
    }
    if not cfg.tie_word_embeddings:
        tree["lm_head"] = {"kernel": jnp.asarray(numpy("lm_head.weight").T)}
    return tree


def params(model: transformers.Qwen2ForCausalLM, cfg: ModelConfig) -> dict:
    """Its weights in our tree."""
    return params_from(dict(model.named_parameters()), cfg)


def gradients(model: transformers.Qwen2ForCausalLM, cfg: ModelConfig) -> dict:
    """Its gradients in our tree, after `backward()`."""
    return params_from({name: p.grad for name, p in model.named_parameters()}, cfg)


def logits(
    model: transformers.Qwen2ForCausalLM, tokens: np.ndarray, positions: np.ndarray | None = None
) -> np.ndarray:
    """Its logits [B, T, V], with a plain causal mask whatever the positions."""
    with torch.no_grad():
        out = model(
            torch.from_numpy(tokens),
            # Given, so that it does not take a jump of the positions for a packed document.
            attention_mask=torch.ones(tokens.shape, dtype=torch.long),
            position_ids=None if positions is None else torch.from_numpy(positions),
            use_cache=False,
        )
    return out.logits.numpy()


def difference(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """(norm of the difference / norm, largest difference / largest value) of `want`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    gap = got - want
    return (
        float(np.linalg.norm(gap) / np.linalg.norm(want)),
        float(np.abs(gap).max() / np.abs(want).max()),
    )


def assert_close(got: np.ndarray, want: np.ndarray, *, tolerance: float = 1e-4) -> None:
    """Both differences are within `tolerance`."""
    norm, largest = difference(got, want)
    assert norm < tolerance, f"relative norm of the difference {norm:.2e}"
    assert largest < tolerance, f"largest difference over largest value {largest:.2e}"
