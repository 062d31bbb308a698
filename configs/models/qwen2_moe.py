"""The published Qwen MoE models, two presets of our own in their design, and a tiny one.

Values: each published model's own config.json on Hugging Face; a checkpoint's own file always wins
over a preset. The hosted Qwen2.5-Turbo and -Plus are MoE models of fine-grained experts and a
shared one (arXiv 2412.15115, section 2), but their sizes are not published: `turbo_like` and
`plus_like` are sizes that we chose.
"""

import dataclasses
from collections.abc import Callable

from configs.models import qwen2_5
from configs.models.architecture import ModelConfig, MoEConfig
from configs.models.qwen2_5 import ENDOFTEXT, IM_END


def a2_7b() -> ModelConfig:
    """Qwen1.5-MoE-A2.7B: 14.3 billion parameters, 2.7 of them used by a token."""
    return ModelConfig(
        name="qwen1.5-moe-a2.7b",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        moe=MoEConfig(
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            norm_topk_prob=False,
            router_aux_loss_coef=0.001,
        ),
    )


def a14b() -> ModelConfig:
    """Qwen2-57B-A14B: 57.4 billion parameters, 14.2 of them used by a token."""
    return dataclasses.replace(
        a2_7b(),
        name="qwen2-57b-a14b",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        moe=MoEConfig(
            num_experts=64,
            num_experts_per_tok=8,
            moe_intermediate_size=2560,
            shared_expert_intermediate_size=20480,
            norm_topk_prob=False,
            router_aux_loss_coef=0.001,
        ),
    )


def _chat(model: ModelConfig, suffix: str) -> ModelConfig:
    """The chat model of a base: 32,768 positions, and its turns end with <|im_end|>."""
    return dataclasses.replace(
        model,
        name=f"{model.name}-{suffix}",
        max_position_embeddings=32768,
        eos_token_ids=(IM_END, ENDOFTEXT),
    )


def turbo_like() -> ModelConfig:
    """In the manner of Qwen2.5-Turbo, with sizes of our own: 16 billion, 3 used by a token."""
    return dataclasses.replace(
        a2_7b(),
        name="moe-turbo-like",
        vocab_size=152064,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        moe=MoEConfig(
            num_experts=64,
            num_experts_per_tok=8,
            moe_intermediate_size=1024,
            shared_expert_intermediate_size=4096,
        ),
    )


def plus_like() -> ModelConfig:
    """In the manner of Qwen2.5-Plus, with sizes of our own: 154 billion, 18 used by a token."""
    return dataclasses.replace(
        turbo_like(),
        name="moe-plus-like",
        hidden_size=5120,
        intermediate_size=14336,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        moe=MoEConfig(
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1536,
            shared_expert_intermediate_size=6144,
        ),
    )


def shapes_of_30b_a3b() -> ModelConfig:
    """The shapes of Qwen3-30B-A3B, for comparing compiled steps; no preset.

    Qwen3 normalises queries and keys and has no QKV bias, which this project cannot express, so its
    checkpoint cannot be loaded into this.
    """
    return dataclasses.replace(
        a2_7b(),
        name="shapes-of-30b-a3b",
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=40960,
        moe=MoEConfig(
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            shared_expert_intermediate_size=0,
            norm_topk_prob=True,
        ),
    )


def tiny() -> ModelConfig:
    """Twelve experts on the tiny dense model's frame, for tests and rehearsals on a CPU."""
    return dataclasses.replace(
        qwen2_5.tiny_untied(),
        name="tiny-moe",
        moe=MoEConfig(
            num_experts=12,
            num_experts_per_tok=3,
            moe_intermediate_size=96,
            shared_expert_intermediate_size=256,
        ),
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny-moe": tiny,
    "qwen1.5-moe-a2.7b": a2_7b,
    "qwen1.5-moe-a2.7b-chat": lambda: _chat(a2_7b(), "chat"),
    "qwen2-57b-a14b": a14b,
    "qwen2-57b-a14b-instruct": lambda: _chat(a14b(), "instruct"),
    "moe-turbo-like": turbo_like,
    "moe-plus-like": plus_like,
}
