"""The published Qwen2.5 dense models, and tiny ones for tests and the quickstart.

Values: each model's own config.json and generation_config.json on Hugging Face. They differ between
checkpoints, so a checkpoint's own file always wins over a preset (`configs/models/huggingface.py`).
"""

import dataclasses
from collections.abc import Callable

from configs.models.architecture import DualChunkConfig, ModelConfig

ENDOFTEXT, IM_END = 151643, 151645

# name: (hidden, layers, query heads, kv heads, ffn, tied, rows, base eps, base max positions)
_SIZES = {
    "0.5b": (896, 24, 14, 2, 4864, True, 151936, 1e-6, 32768),
    "1.5b": (1536, 28, 12, 2, 8960, True, 151936, 1e-6, 131072),
    "3b": (2048, 36, 16, 2, 11008, True, 151936, 1e-6, 32768),
    "7b": (3584, 28, 28, 4, 18944, False, 152064, 1e-6, 131072),
    "14b": (5120, 48, 40, 8, 13824, False, 152064, 1e-5, 131072),
    "32b": (5120, 64, 40, 8, 27648, False, 152064, 1e-5, 131072),
    "72b": (8192, 80, 64, 8, 29568, False, 152064, 1e-5, 131072),
}


def base(size: str) -> ModelConfig:
    """Qwen2.5-{size}: the pretrained model (Qwen/Qwen2.5-*/config.json)."""
    hidden, layers, heads, kv_heads, ffn, tied, rows, eps, positions = _SIZES[size]
    return ModelConfig(
        name=f"qwen2.5-{size}",
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        rms_norm_eps=eps,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        bos_token_id=ENDOFTEXT,
        eos_token_ids=(ENDOFTEXT,),
        pad_token_id=ENDOFTEXT,
    )


def instruct(size: str) -> ModelConfig:
    """Qwen2.5-{size}-Instruct: eps 1e-6 and 32,768 positions in every size."""
    return dataclasses.replace(
        base(size),
        name=f"qwen2.5-{size}-instruct",
        rms_norm_eps=1e-6,
        max_position_embeddings=32768,
        eos_token_ids=(IM_END, ENDOFTEXT),
    )


def instruct_1m(size: str) -> ModelConfig:
    """Qwen2.5-{size}-Instruct-1M (arXiv 2501.15383): RoPE base 1e7 and dual chunk attention."""
    return dataclasses.replace(
        instruct(size),
        name=f"qwen2.5-{size}-instruct-1m",
        rms_norm_eps=1e-5,
        rope_theta=1e7,
        max_position_embeddings=1010000,
        dual_chunk_attention=DualChunkConfig(
            chunk_size=262144, local_size=8192, original_max_position_embeddings=262144
        ),
    )


def tiny() -> ModelConfig:
    """Model of a million parameters for the quickstart on 2 cores, with all of Qwen2.5's parts."""
    return ModelConfig(
        name="tiny",
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rope_theta=1e6,
        bos_token_id=None,
        eos_token_ids=(0,),
        pad_token_id=0,
    )


def tiny_untied() -> ModelConfig:
    """`tiny` with an output projection of its own, as the 7B and larger have."""
    return dataclasses.replace(tiny(), name="tiny-untied", tie_word_embeddings=False)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "tiny-untied": tiny_untied,
    **{f"qwen2.5-{s}": (lambda s=s: base(s)) for s in _SIZES},
    **{f"qwen2.5-{s}-instruct": (lambda s=s: instruct(s)) for s in _SIZES},
    **{f"qwen2.5-{s}-instruct-1m": (lambda s=s: instruct_1m(s)) for s in ("7b", "14b")},
}


def preset(name: str) -> ModelConfig:
    """The preset called `name`. Raises `ValueError` with the known names."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}; presets are {', '.join(PRESETS)}")
    return PRESETS[name]()
