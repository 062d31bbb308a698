"""The keys of a config.json that qwen2_moe adds to those of qwen2."""

import dataclasses
from typing import Any

from configs.models.architecture import ModelConfig, MoEConfig
from configs.models.huggingface_values import means, typed

# key, which is the field's name: (default of Qwen2MoeConfig, type)
_FIELDS: dict[str, tuple[Any, type]] = {
    "num_experts": (60, int),
    "num_experts_per_tok": (4, int),
    "moe_intermediate_size": (1408, int),
    "shared_expert_intermediate_size": (5632, int),
    "norm_topk_prob": (False, bool),
    "decoder_sparse_step": (1, int),
    "router_aux_loss_coef": (0.001, float),
}
# qkv_bias: one behaviour exists. output_router_logits: what transformers' forward returns, and
# whether its training adds the balance loss, which ours adds by its coefficient.
KEYS = {*_FIELDS, "mlp_only_layers", "qkv_bias", "output_router_logits"}
# Defaults of Qwen2MoeConfig for keys of qwen2, where the two differ.
DEFAULTS = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


def read(values: dict) -> MoEConfig:
    """The experts that a parsed config.json describes. Raises `ValueError` naming the key."""
    if not means(values.get("qkv_bias", True), (True,)):
        raise ValueError(
            f"config.json: qkv_bias={values['qkv_bias']!r} is not supported: projections to "
            f"queries, keys and values have a bias; set it to true"
        )
    alone = values.get("mlp_only_layers")
    alone = [] if alone is None else typed("mlp_only_layers", alone, list)
    return MoEConfig(
        mlp_only_layers=tuple(typed("mlp_only_layers", layer, int) for layer in alone),
        **{
            key: typed(key, values.get(key, default), kind)
            for key, (default, kind) in _FIELDS.items()
        },
    )


def write(moe: MoEConfig) -> dict:
    """The keys of config.json that describe `moe`, without settings that only this project has."""
    return {
        **{key: getattr(moe, key) for key in _FIELDS},
        "mlp_only_layers": list(moe.mlp_only_layers),
        "qkv_bias": True,
    }


def without_our_own(model: ModelConfig) -> ModelConfig:
    """`model` without settings that a config.json cannot hold: expert training and padding.

    Raises `ValueError` for router biases: they belong to what the model computes.
    """
    if model.moe is None:
        return model
    if model.moe.bias_update_rate is not None:
        raise ValueError(
            f"{model.name} has router biases (bias_update_rate={model.moe.bias_update_rate}), for "
            f"which qwen2_moe has no place: without them other experts would be chosen"
        )
    known = {*_FIELDS, "mlp_only_layers"}
    ours = {f.name: f.default for f in dataclasses.fields(MoEConfig) if f.name not in known}
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, **ours))
