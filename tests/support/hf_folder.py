"""Hugging Face folders of small random models, as transformers saves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from configs.models import huggingface
from configs.models.architecture import ModelConfig
from qwen_jax.text.tokenizer.tokenizer import Tokenizer


def vectors(parameter: torch.Tensor) -> bool:
    """Biases and norms, which do nothing at the start of a training."""
    return parameter.ndim == 1


def write(
    folder: Path,
    cfg: ModelConfig,
    *,
    dtype: str = "float32",
    seed: int = 0,
    drawn: Callable[[torch.Tensor], bool] = lambda parameter: False,
    max_shard_size: str = "5GB",
    tokenizer: Tokenizer | None = None,
    generation: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Weights as at the start of a training, but those that `drawn` takes: of them all are normal.

    `generation` is the generation_config.json, where transformers' own will not do; `config` goes
    into config.json beside what describes the model.
    """
    name = "Qwen2" if cfg.moe is None else "Qwen2Moe"
    values = huggingface.write_model(cfg, dtype=dtype) | config
    torch.manual_seed(seed)
    made = getattr(transformers, f"{name}Config")(**values)
    model = getattr(transformers, f"{name}ForCausalLM")(made)
    with torch.no_grad():
        for parameter in filter(drawn, model.parameters()):
            parameter.copy_(torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
