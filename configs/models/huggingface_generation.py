"""Hugging Face's generation_config.json, read key by key.

Every key is honoured, known to be harmless (with the reason), off, or refused by name.
"""

from typing import Any

from configs.models.architecture import GenerationConfig
from configs.models.huggingface_values import means, refuse_unknown, token_id, token_ids, typed

# Fields honoured, with their types.
_FIELDS: dict[str, type] = {
    "do_sample": bool,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
}
# Methods we do not implement, by the values with which they are off. None is always "not set".
_OFF: dict[str, tuple[Any, ...]] = {
    "assistant_confidence_threshold": (0.4,),
    "assistant_lookbehind": (10,),
    "diversity_penalty": (0,),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "is_assistant": (False,),
    "length_penalty": (1,),
    "max_length": (20,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "target_lookbehind": (10,),
    "token_healing": (False,),
    "typical_p": (1,),
    "use_mtp": (False,),
    **dict.fromkeys(
        (
            "assistant_early_exit", "assistant_ensemble_weight", "bad_words_ids",
            "begin_suppress_tokens", "constraints", "decoder_start_token_id", "dola_layers",
            "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id",
            "forced_eos_token_id", "max_matching_ngram_size", "max_time", "prefill_chunk_size",
            "prompt_lookup_num_tokens", "sequence_bias", "speculation_type", "stop_strings",
            "suppress_tokens", "top_h", "watermarking_config",
        ),
        (),
    ),
}  # fmt: skip
# Keys that do not change which tokens come out, and why.
HARMLESS = {
    "_from_model_config": "where transformers took the values from",
    "cache_config": "transformers' own cache",
    "cache_implementation": "transformers' own cache",
    "compile_config": "transformers' own compilation",
    "continuous_batching_config": "transformers' own server",
    "disable_compile": "transformers' own compilation",
    "low_memory": "how transformers' search methods use memory",
    "max_cache_len": "transformers' own cache",
    "output_attentions": "what transformers' generate returns",
    "output_hidden_states": "what transformers' generate returns",
    "output_logits": "what transformers' generate returns",
    "output_scores": "what transformers' generate returns",
    "return_dict_in_generate": "what transformers' generate returns",
    "transformers_version": "who wrote the file",
    "use_cache": "transformers' own decoding; ours always keeps a cache",
}


def read(values: dict) -> GenerationConfig:
    """The sampling defaults of a parsed generation_config.json, None for absent keys.

    Raises `ValueError` naming the key for one that is unknown, of the wrong type, or asks for a
    method that is not implemented.
    """
    file = "generation_config.json"
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    known = {*_FIELDS, *_OFF, *HARMLESS, *ids}
    refuse_unknown(values, known, what=file)
    for key, off in _OFF.items():
        value = values.get(key)
        if value is not None and not means(value, off):
            raise ValueError(
                f"{file}: {key}={value!r} is not supported; remove it"
                + (f" or set it to {off[0]!r}" if off else "")
            )
    return GenerationConfig(
        bos_token_id=token_id("bos_token_id", values.get("bos_token_id"), file=file),
        eos_token_ids=token_ids("eos_token_id", values.get("eos_token_id"), file=file),
        pad_token_id=token_id("pad_token_id", values.get("pad_token_id"), file=file),
        **{
            key: typed(key, values[key], kind, file=file)
            for key, kind in _FIELDS.items()
            if values.get(key) is not None
        },
    )
