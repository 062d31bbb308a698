"""`quantization_config` of config.json: GPTQ and AWQ checkpoints, key by key.

Every key is honoured, harmless (with the reason), bound to the values we implement, or refused by
name.
"""

from typing import Any

from configs.models.architecture import QuantisationConfig
from configs.models.huggingface_values import means, refuse_unknown, typed

_WHAT = "config.json quantization_config"
_HARMLESS = {
    "batch_size": "how it was calibrated",
    "block_name_to_quantize": "which modules: the tensors say it",
    "damp_percent": "how it was calibrated",
    "dataset": "how it was calibrated",
    "exllama_config": "transformers' choice of kernel",
    "fuse_max_seq_len": "transformers' own modules",
    "max_input_length": "transformers' choice of kernel",
    "meta": "a note of the tool that wrote the file",
    "model_file_base_name": "a file's name: the folder says it",
    "model_name_or_path": "where the file came from",
    "model_seqlen": "how it was calibrated",
    "modules_in_block_to_quantize": "which modules: the tensors say it",
    "modules_to_fuse": "transformers' own modules",
    "modules_to_not_convert": "which modules: the tensors say it",
    "module_name_preceding_first_block": "which modules: the tensors say it",
    "static_groups": "how it was calibrated: g_idx says which group an input is of",
    "tokenizer": "how it was calibrated",
    "true_sequential": "how it was calibrated",
    "use_cuda_fp16": "transformers' choice of kernel",
    "use_exllama": "transformers' choice of kernel",
    "use_exllama_v2": "transformers' choice of kernel",
    "disable_exllama": "transformers' choice of kernel",
    "cache_block_outputs": "how it was calibrated",
    "pad_token_id": "how it was calibrated",
}
# method: {key: (values that we implement, what to do about others)}
_FIXED: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "gptq": {
        "checkpoint_format": (("gptq", None), "only GPTQ's first format, zero points less 1, is"),
        "is_marlin_format": ((False, None), "use the checkpoint that is not packed for Marlin"),
        "lm_head": ((False, None), "use a checkpoint whose lm_head is not quantised"),
        "dynamic": ((None,), "settings by module are not implemented"),
    },
    "awq": {
        "version": (("gemm", "GEMM", None), "only AWQ's gemm packing is"),
        "do_fuse": ((False, None), "set it to false"),
        "backend": (("autoawq", None), "only AutoAWQ's checkpoints are"),
        "zero_point": ((True, None), "AWQ without zero points has a packing of its own"),
    },
}
_KEYS = {
    "gptq": {"bits", "group_size", "sym", "desc_act"},
    "awq": {"bits", "w_bit", "group_size", "q_group_size"},
}


def read(values: dict) -> QuantisationConfig | None:
    """The quantisation that a parsed config.json describes; None where it has none.

    Raises `ValueError` naming the key for one that is unknown, of the wrong type, or asks for
    something that is not implemented.
    """
    given = values.get("quantization_config")
    if given is None:
        return None
    typed("quantization_config", given, dict)
    method = given.get("quant_method")
    if method not in _KEYS:
        raise ValueError(
            f"config.json: quantization_config.quant_method={method!r} is not supported; use a "
            f"checkpoint in {' or '.join(_KEYS)}, or one that is not quantised"
        )
    fixed = _FIXED[method]
    refuse_unknown(given, {"quant_method", *_HARMLESS, *fixed, *_KEYS[method]}, what=_WHAT)
    for key, (allowed, remedy) in fixed.items():
        if key in given and not means(given[key], allowed):
            raise ValueError(f"{_WHAT}: {key}={given[key]!r} is not supported: {remedy}")

    def value(*names: str, kind: type, default: Any = None) -> Any:
        for name in names:
            if given.get(name) is not None:
                return typed(f"quantization_config.{name}", given[name], kind)
        if default is None:
            raise ValueError(f"{_WHAT}: {names[0]} is missing")
        return default

    group_size = value("group_size", "q_group_size", kind=int)
    return QuantisationConfig(
        method=method,
        bits=value("bits", "w_bit", kind=int),
        group_size=None if group_size == -1 else group_size,
        symmetric=method == "gptq" and value("sym", kind=bool, default=True),
        ordered=method == "gptq" and value("desc_act", kind=bool, default=False),
    )
