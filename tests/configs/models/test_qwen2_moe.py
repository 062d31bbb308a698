"""The published MoE models against their config.json, and what a config of experts refuses."""

import dataclasses

import pytest
import transformers

from configs import schema
from configs.models import architecture, huggingface, presets, qwen2_moe
from configs.models.architecture import ExpertTrainingConfig

# Both files, but for what says nothing about the model.
A2_7B = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
A14B = A2_7B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "moe_intermediate_size": 2560,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 65536,
}
FILES = {
    "qwen1.5-moe-a2.7b": A2_7B,
    "qwen1.5-moe-a2.7b-chat": A2_7B
    | {"max_position_embeddings": 32768, "eos_token_id": [151645, 151643]},
    "qwen2-57b-a14b": A14B,
    "qwen2-57b-a14b-instruct": A14B
    | {"max_position_embeddings": 32768, "eos_token_id": [151645, 151643]},
}


@pytest.mark.parametrize("name", FILES)
def test_presets_are_the_published_files(name):
    read = huggingface.read_model(FILES[name], name=name)
    assert dataclasses.replace(read, pad_token_id=151643) == presets.preset(name)
    assert huggingface.write_model(read, base=FILES[name]) == FILES[name]


@pytest.mark.parametrize("name", qwen2_moe.PRESETS)
def test_transformers_reads_what_we_write_as_we_do(name):
    model = presets.preset(name)
    written = huggingface.write_model(model)
    theirs = transformers.Qwen2MoeConfig(**written)
    assert theirs.num_experts == model.moe.num_experts
    assert huggingface.read_model(theirs.to_dict(), name=name) == model
    assert architecture.model_from_dict(schema.to_dict(model)) == model


def test_absent_keys_take_the_defaults_of_qwen2_moe():
    read = huggingface.read_model({"model_type": "qwen2_moe"})
    theirs = transformers.Qwen2MoeConfig()
    assert read == huggingface.read_model(theirs.to_dict())
    assert (read.num_hidden_layers, read.moe.num_experts) == (24, 60)


def test_training_settings_leave_the_imported_file_as_it_is():
    model = huggingface.read_model(A2_7B, name="m")
    settings = ExpertTrainingConfig(router_z_loss=1e-3, capacity_factor=1.25, pad_experts_to=64)
    assert huggingface.write_model(settings.apply(model), base=A2_7B) == A2_7B
    coefficient = ExpertTrainingConfig(router_aux_loss_coef=0.01).apply(model)
    assert huggingface.write_model(coefficient, base=A2_7B)["router_aux_loss_coef"] == 0.01
    with pytest.raises(ValueError, match="router biases"):
        huggingface.write_model(ExpertTrainingConfig(bias_update_rate=1e-3).apply(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_bias": False}, "qkv_bias=False"),
        ({"num_experts": 0}, "num_experts=0 must be greater than 0"),
        ({"num_experts_per_tok": 61}, "num_experts_per_tok=61 is more than num_experts=60"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be of type bool"),
        ({"mlp_only_layers": [24]}, r"mlp_only_layers \[24\] are not among the 24 layers"),
        ({"decoder_sparse_step": 25}, "no layer has experts"),
        ({"expert_bias": True}, "unknown keys expert_bias"),
    ],
)
def test_refusals_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        huggingface.read_model(A2_7B | change)


def test_settings_for_experts_need_a_model_that_has_some():
    with pytest.raises(ValueError, match="tiny has no experts: experts.router_z_loss"):
        ExpertTrainingConfig(router_z_loss=1e-3).apply(presets.preset("tiny"))
    with pytest.raises(ValueError, match="pad_experts_to=8 is less than num_experts=12"):
        ExpertTrainingConfig(pad_experts_to=8).apply(presets.preset("tiny-moe"))
    with pytest.raises(ValueError, match="capacity_factor=0 must be greater than 0, or None"):
        ExpertTrainingConfig(capacity_factor=0).apply(presets.preset("tiny-moe"))
