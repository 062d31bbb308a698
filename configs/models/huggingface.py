"""Hugging Face's config.json, read and written key by key.

Every key is honoured, known to be harmless (with the reason), bound to the one value we implement,
or refused by name. Absent keys take the defaults of transformers' `Qwen2Config`, or where experts
are described (`huggingface_moe.py`) of its `Qwen2MoeConfig`.
"""

from typing import Any

from configs import schema
from configs.models import huggingface_moe, huggingface_quantised
from configs.models.architecture import DualChunkConfig, ModelConfig, YarnConfig
from configs.models.huggingface_values import means, refuse_unknown, token_id, token_ids, typed

# Keys that do not change what the model computes, and why.
HARMLESS = {
    "_attn_implementation_autoset": "how transformers chose its attention kernel",
    "_name_or_path": "where the file came from",
    "architectures": "checked apart: only causal language models",
    "attn_implementation": "transformers' choice of kernel",
    "dtype": "the tensors say what they are",
    "id2label": "labels of a classification head, which a causal model does not have",
    "label2id": "labels of a classification head, which a causal model does not have",
    "max_window_layers": "read only with use_sliding_window, which must be false",
    "model_type": "checked apart: only qwen2 and qwen2_moe",
    "output_attentions": "what transformers' forward returns",
    "output_hidden_states": "what transformers' forward returns",
    "problem_type": "loss of a classification head, which a causal model does not have",
    "return_dict": "what transformers' forward returns",
    "sliding_window": "read only with use_sliding_window, which must be false",
    "torch_dtype": "the tensors say what they are",
    "transformers_version": "who wrote the file",
    "unsloth_fixed": "a note of the tool that wrote the file",
    "unsloth_version": "a note of the tool that wrote the file",
    "use_cache": "transformers' own decoding; ours always keeps a cache",
}

# Keys for which one behaviour exists here: the values that mean it, and what to do about others.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_cross_attention": ((False,), "the model is decoder-only"),
    "attention_dropout": ((0, None), "attention dropout is not implemented; set it to 0"),
    "chunk_size_feed_forward": ((0, None), "feed-forward chunking is not implemented; set it to 0"),
    "hidden_act": (("silu",), "the feed-forward network is SwiGLU"),
    "is_encoder_decoder": ((False,), "the model is decoder-only"),
    "partial_rotary_factor": ((1, None), "RoPE turns the whole head"),
    "tie_encoder_decoder": ((False,), "the model is decoder-only"),
    "use_mrope": ((False, None), "multimodal RoPE is not implemented"),
    "use_sliding_window": ((False, None), "sliding window attention is not implemented"),
}

# key: (field, default of Qwen2Config, type)
_FIELDS: dict[str, tuple[str, Any, type]] = {
    "vocab_size": ("vocab_size", 151936, int),
    "hidden_size": ("hidden_size", 4096, int),
    "intermediate_size": ("intermediate_size", 22016, int),
    "num_hidden_layers": ("num_hidden_layers", 32, int),
    "num_attention_heads": ("num_attention_heads", 32, int),
    "max_position_embeddings": ("max_position_embeddings", 32768, int),
    "initializer_range": ("initializer_range", 0.02, float),
    "rms_norm_eps": ("rms_norm_eps", 1e-6, float),
    "tie_word_embeddings": ("tie_word_embeddings", False, bool),
}
_DERIVED = {
    "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
    "layer_types", "dual_chunk_attention_config", "bos_token_id", "eos_token_id", "pad_token_id",
    "quantization_config",
}  # fmt: skip
_DEFAULT_KV_HEADS, _DEFAULT_THETA = 32, 1e4
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}

_YARN_OPTIONAL = {
    "beta_fast": float,
    "beta_slow": float,
    "attention_factor": float,
    "mscale": float,
    "mscale_all_dim": float,
    "truncate": bool,
}


def _check_kind(values: dict) -> None:
    model_type = values.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type={model_type!r} is not supported; only "
            f"{' and '.join(_ARCHITECTURES)} are"
        )
    architectures, wanted = values.get("architectures"), [_ARCHITECTURES[model_type]]
    if architectures not in (None, wanted):
        raise ValueError(
            f"config.json: architectures={architectures} is not supported; only a causal language "
            f"model, {wanted}, is"
        )
    for key, (allowed, remedy) in _FIXED.items():
        if key in values and not means(values[key], allowed):
            raise ValueError(f"config.json: {key}={values[key]!r} is not supported: {remedy}")
    layer_types = values.get("layer_types")
    others = sorted(set(layer_types or ()) - {"full_attention"})
    if others:
        raise ValueError(
            f"config.json: layer_types {others} are not supported; only full_attention"
        )
    layers = values.get("num_hidden_layers", _FIELDS["num_hidden_layers"][1])
    if layer_types is not None and len(layer_types) != layers:
        raise ValueError(
            f"config.json: layer_types has {len(layer_types)} entries, "
            f"but num_hidden_layers={layers}"
        )


def _read_yarn(key: str, rope: dict, *, max_positions: int) -> YarnConfig:
    """YaRN settings of a rope object; the original length defaults to the longest position."""
    if rope.get("factor") is None:
        raise ValueError(f"config.json: {key} of type yarn has no factor")
    original = rope.get("original_max_position_embeddings")
    optional = {
        name: typed(f"{key}.{name}", rope[name], kind)
        for name, kind in _YARN_OPTIONAL.items()
        if rope.get(name) is not None
    }
    return YarnConfig(
        factor=typed(f"{key}.factor", rope["factor"], float),
        original_max_position_embeddings=typed(
            f"{key}.original_max_position_embeddings",
            max_positions if original is None else original,
            int,
        ),
        **optional,
    )


def _read_rope(values: dict, *, max_positions: int) -> tuple[float, YarnConfig | None]:
    """RoPE theta and scaling, from `rope_theta` and `rope_scaling` or from `rope_parameters`."""
    given = {k: values[k] for k in ("rope_scaling", "rope_parameters") if values.get(k)}
    for key, rope in given.items():
        if not isinstance(rope, dict):
            raise ValueError(f"config.json: {key}={rope!r} must be an object")
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        raise ValueError(
            "config.json: rope_scaling and rope_parameters are both given and differ; keep one"
        )
    key, rope = next(iter(given.items()), ("rope_parameters", {}))
    thetas = [
        typed(name, value, float)
        for name, value in (
            ("rope_theta", values.get("rope_theta")),
            (f"{key}.rope_theta", rope.get("rope_theta")),
        )
        if value is not None
    ]
    if len(set(thetas)) > 1:
        raise ValueError(f"config.json: rope_theta={thetas[0]} but {key}.rope_theta={thetas[1]}")
    theta = thetas[0] if thetas else _DEFAULT_THETA
    kinds = {
        typed(f"{key}.{name}", rope[name], str)
        for name in ("type", "rope_type")
        if rope.get(name) is not None
    }
    if len(kinds) > 1:
        raise ValueError(f"config.json: {key} has both types {sorted(kinds)}; keep one")
    kind = kinds.pop() if kinds else "default"
    known = {"type", "rope_type", "rope_theta"}
    if kind == "default":
        refuse_unknown(rope, known, what=f"config.json {key} of type default")
        return theta, None
    if kind != "yarn":
        raise ValueError(
            f"config.json: {key} of type {kind!r} is not supported; use yarn, default, or null"
        )
    known |= {"factor", "original_max_position_embeddings", *_YARN_OPTIONAL}
    refuse_unknown(rope, known, what=f"config.json {key} of type yarn")
    return theta, _read_yarn(key, rope, max_positions=max_positions)


def _read_dual_chunk(values: dict) -> DualChunkConfig | None:
    given = values.get("dual_chunk_attention_config")
    if given is None:
        return None
    known = {"chunk_size", "local_size", "original_max_position_embeddings"}
    typed("dual_chunk_attention_config", given, dict)
    refuse_unknown(given, known, what="config.json dual_chunk_attention_config")
    missing = sorted(known - set(given))
    if missing:
        raise ValueError(f"config.json: dual_chunk_attention_config has no {', '.join(missing)}")
    return DualChunkConfig(
        **{k: typed(f"dual_chunk_attention_config.{k}", given[k], int) for k in sorted(known)}
    )


def _read_heads(values: dict, *, hidden_size: int, num_heads: int) -> tuple[int, int]:
    """Key-value heads and head size, derived where the file leaves them out."""
    kv_heads = values.get("num_key_value_heads", _DEFAULT_KV_HEADS)
    kv_heads = num_heads if kv_heads is None else typed("num_key_value_heads", kv_heads, int)
    head_dim = values.get("head_dim")
    if head_dim is not None:
        return kv_heads, typed("head_dim", head_dim, int)
    if num_heads <= 0 or hidden_size % num_heads:
        raise ValueError(
            f"config.json: hidden_size={hidden_size} is not a multiple of "
            f"num_attention_heads={num_heads}; give head_dim"
        )
    return kv_heads, hidden_size // num_heads


def read_model(values: dict, *, name: str = "huggingface") -> ModelConfig:
    """The model that a parsed config.json describes, called `name`.

    Raises `ValueError` naming the key for one that is unknown, of the wrong type, or asks for
    something that is not implemented.
    """
    known = {*HARMLESS, *_FIXED, *_FIELDS, *_DERIVED}
    sparse = values.get("model_type") == "qwen2_moe"
    if sparse:
        known |= huggingface_moe.KEYS
        values = huggingface_moe.DEFAULTS | values
    _check_kind(values)
    refuse_unknown(values, known, what="config.json")
    huggingface_quantised.read(values)  # how the tensors are stored, not what they compute
    fields = {
        field: typed(key, values.get(key, default), kind)
        for key, (field, default, kind) in _FIELDS.items()
    }
    theta, scaling = _read_rope(values, max_positions=fields["max_position_embeddings"])
    kv_heads, head_dim = _read_heads(
        values, hidden_size=fields["hidden_size"], num_heads=fields["num_attention_heads"]
    )
    return ModelConfig(
        name=name,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        dual_chunk_attention=_read_dual_chunk(values),
        moe=huggingface_moe.read(values) if sparse else None,
        bos_token_id=token_id("bos_token_id", values.get("bos_token_id")),
        eos_token_ids=token_ids("eos_token_id", values.get("eos_token_id")),
        pad_token_id=token_id("pad_token_id", values.get("pad_token_id")),
        **fields,
    )


def _canonical(model: ModelConfig) -> dict:
    """The values of config.json in the form that every transformers since 4.37 reads."""
    model_type = "qwen2" if model.moe is None else "qwen2_moe"
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "num_key_value_heads": model.num_key_value_heads,
        "rope_theta": model.rope_theta,
        "bos_token_id": model.bos_token_id,
        "pad_token_id": model.pad_token_id,
    }
    values |= {key: getattr(model, field) for key, (field, _, _) in _FIELDS.items()}
    if model.moe is not None:
        values |= huggingface_moe.write(model.moe)
    eos = model.eos_token_ids
    values["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        values["head_dim"] = model.head_dim
    if model.rope_scaling is not None:
        scaling = {k: v for k, v in schema.to_dict(model.rope_scaling).items() if v is not None}
        values["rope_scaling"] = {"type": "yarn", **scaling}
    if model.dual_chunk_attention is not None:
        values["dual_chunk_attention_config"] = schema.to_dict(model.dual_chunk_attention)
    return values


def write_model(model: ModelConfig, *, base: dict | None = None, dtype: str | None = None) -> dict:
    """The values of a config.json from which transformers builds `model`.

    `base` is the file the model was imported from: returned as it is while it describes this model,
    otherwise only its harmless keys are kept. `dtype` (`bfloat16`...) is that of the weights beside
    the file.
    """
    model = huggingface_moe.without_our_own(model)
    if base is not None and read_model(base, name=model.name) == model:
        values = dict(base)
    else:
        values = {k: v for k, v in (base or {}).items() if k in HARMLESS} | _canonical(model)
    key = "dtype" if "dtype" in values else "torch_dtype"
    if dtype is not None and values.get(key) != dtype:
        values[key] = dtype
    return values


def write_generation(model: ModelConfig) -> dict:
    """The values of a generation_config.json with the end tokens of `model`."""
    values = _canonical(model)
    return {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
