"""config.json and generation_config.json: transformers is the oracle of what a file means."""

import dataclasses
import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.models import huggingface, huggingface_generation, qwen2_5
from configs.models.architecture import GenerationConfig, ModelConfig, YarnConfig

YARN = YarnConfig(factor=4.0, original_max_position_embeddings=32768)
QWEN_7B_FILE = {  # as published for Qwen2.5-7B
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def through_transformers(values: dict, tmp_path) -> dict:
    transformers.Qwen2Config(**values).save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


def test_published_file_is_the_preset():
    model = huggingface.read_model(QWEN_7B_FILE, name="qwen2.5-7b")
    assert model == dataclasses.replace(qwen2_5.base("7b"), pad_token_id=None)
    assert huggingface.write_model(model, base=QWEN_7B_FILE, dtype="bfloat16") == QWEN_7B_FILE


@pytest.mark.parametrize("name", qwen2_5.PRESETS)
def test_presets_survive_transformers(name, tmp_path):
    model = qwen2_5.preset(name)
    saved = through_transformers(huggingface.write_model(model, dtype="bfloat16"), tmp_path)
    assert huggingface.read_model(saved, name=name) == model


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": YARN},
        {
            "rope_scaling": dataclasses.replace(
                YARN, beta_fast=16.0, attention_factor=1.5, mscale=1.0, truncate=False
            )
        },
        {"head_dim": 64},
        {"eos_token_ids": ()},
        {"eos_token_ids": (3, 1), "bos_token_id": None, "pad_token_id": None},
    ],
)
def test_variants_survive_transformers(change, tmp_path):
    model = dataclasses.replace(qwen2_5.tiny(), **change)
    saved = through_transformers(huggingface.write_model(model), tmp_path)
    assert huggingface.read_model(saved, name="tiny") == model


@settings(max_examples=50, deadline=None)
@given(
    kv=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 4),
    head_dim=st.sampled_from([2, 8, 64]),
    hidden=st.sampled_from([32, 48]),
    eps=st.sampled_from([1e-5, 1e-6]),
    theta=st.floats(1e3, 1e7),
    tied=st.booleans(),
    yarn=st.none() | st.builds(
        YarnConfig,
        factor=st.floats(1, 8),
        original_max_position_embeddings=st.integers(1, 4096),
        attention_factor=st.none() | st.floats(0.5, 2),
    ),
    eos=st.lists(st.integers(0, 99), max_size=3).map(tuple),
)  # fmt: skip
def test_write_then_read_is_the_identity(kv, groups, head_dim, hidden, eps, theta, tied, yarn, eos):
    model = ModelConfig(
        name="m", vocab_size=100, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=kv * groups, num_key_value_heads=kv, head_dim=head_dim,
        max_position_embeddings=64, rms_norm_eps=eps, rope_theta=theta, rope_scaling=yarn,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_ids=eos, pad_token_id=None,
    )  # fmt: skip
    written = json.loads(json.dumps(huggingface.write_model(model)))
    assert huggingface.read_model(written, name="m") == model


def test_absent_keys_take_the_defaults_of_transformers():
    ours = huggingface.read_model({"model_type": "qwen2"})
    theirs = transformers.Qwen2Config()
    for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
        "initializer_range", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "pad_token_id",
    ):  # fmt: skip
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling is None
    assert ours.eos_token_ids == ()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 2}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 2.0}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 131072,
                "beta_fast": None,
            },
        },
    ],
)
def test_every_spelling_of_yarn(rope):
    values = {k: v for k, v in QWEN_7B_FILE.items() if k != "rope_theta"}
    model = huggingface.read_model({**values, **rope})
    assert model.rope_theta == 5e5
    assert model.rope_scaling == YarnConfig(factor=2.0, original_max_position_embeddings=131072)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparse_attention": 1}, "unknown keys sparse_attention"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "'llama3' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "no factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "wavelength": 3}}, "wavelength"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "both types"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be an object"),
        ({"rope_scaling": {"factor": 2.0}}, "unknown keys factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor=0.5 must be at least 1"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta=1000000.0 but"),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 2.0},
                "rope_parameters": {"type": "yarn", "factor": 4.0},
            },
            "both given and differ",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_mrope": True}, "use_mrope=True"),
        ({"model_type": "qwen2_moe"}, r"only a causal language model, \['Qwen2MoeForCausalLM'\]"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"model_type": None}, "model_type=None"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        ({"quantization_config": {"bits": 4}}, "not quantised"),
        ({"layer_types": ["sliding_attention"] * 28}, "sliding_attention"),
        ({"layer_types": ["full_attention"] * 3}, "3 entries"),
        ({"dual_chunk_attention_config": {"chunk_size": 2}}, "has no local_size"),
        ({"dual_chunk_attention_config": {"sparse": 2}}, "unknown keys sparse"),
        ({"hidden_size": "big"}, "hidden_size='big' must be of type int"),
        ({"hidden_size": True}, "hidden_size=True must be of type int"),
        ({"tie_word_embeddings": 1}, "must be of type bool"),
        ({"num_attention_heads": 27}, "not a multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
        ({"eos_token_id": 152064}, "outside the vocabulary"),
    ],
)
def test_refusals_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        huggingface.read_model({**QWEN_7B_FILE, **change})


def test_changed_model_keeps_only_harmless_keys_of_its_base():
    model = huggingface.read_model(QWEN_7B_FILE)
    longer = dataclasses.replace(model, rope_scaling=YARN)
    values = huggingface.write_model(longer, base=QWEN_7B_FILE, dtype="float32")
    assert huggingface.read_model(values) == longer
    assert values["transformers_version"] == "4.40.1"
    assert values["torch_dtype"] == "float32"


def test_generation_of_instruct():
    got = huggingface_generation.read(
        {
            "bos_token_id": 151643,
            "pad_token_id": 151643,
            "do_sample": True,
            "eos_token_id": [151645, 151643],
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "transformers_version": "4.37.0",
        }
    )
    assert got == GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05,
        bos_token_id=151643, eos_token_ids=(151645, 151643), pad_token_id=151643,
    )  # fmt: skip


def test_generation_knows_every_key_and_default_of_transformers():
    values = transformers.GenerationConfig().to_dict()
    values |= transformers.GenerationConfig._get_default_generation_params()
    got = huggingface_generation.read(values)
    assert got.temperature == 1.0
    assert got.top_k == 50
    assert got.do_sample is False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"typical_p": 0.9}, "typical_p=0.9"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"temprature": 1.0}, "unknown keys temprature"),
        ({"top_k": 1.5}, "top_k=1.5 must be of type int"),
        ({"top_p": 1.5}, r"top_p=1.5 must be in \(0, 1\]"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_generation_refusals(values, message):
    with pytest.raises(ValueError, match=message):
        huggingface_generation.read(values)


def test_written_generation_stops_where_the_model_stops():
    model = qwen2_5.instruct("7b")
    got = huggingface_generation.read(huggingface.write_generation(model))
    assert got.eos_token_ids == model.eos_token_ids
