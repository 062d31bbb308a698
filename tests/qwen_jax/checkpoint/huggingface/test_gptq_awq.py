"""GPTQ and AWQ folders, written here by their published formulas, are read exactly."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs.models import huggingface
from configs.models.architecture import ModelConfig, MoEConfig
from qwen_jax.checkpoint import load, tensor_table, verify
from qwen_jax.checkpoint.huggingface import importer
from qwen_jax.model import transformer
from qwen_jax.quant import array

DENSE = ModelConfig(
    name="hf", vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    bos_token_id=1, eos_token_ids=(2,), pad_token_id=None,
)  # fmt: skip
SPARSE = dataclasses.replace(
    DENSE,
    moe=MoEConfig(
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
    ),
)
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True,
    "damp_percent": 0.01, "static_groups": False, "true_sequential": True,
    "model_name_or_path": None, "model_file_base_name": "model",
}  # fmt: skip
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
    "modules_to_not_convert": None,
}  # fmt: skip


def words(numbers: np.ndarray, bits: int, order=None) -> np.ndarray:
    """[n, m] -> int32 [n, m / per]: number k of a word is its bits k bits and on, one by one."""
    per = 32 // bits
    out = np.zeros((numbers.shape[0], numbers.shape[1] // per), np.uint32)
    for column in range(numbers.shape[1]):
        word, inside = divmod(column, per)
        k = inside if order is None else order.index(inside)
        out[:, word] |= numbers[:, column].astype(np.uint32) << np.uint32(bits * k)
    return out.view(np.int32)


def kernel(rng, config: dict, outputs: int, inputs: int) -> tuple[dict, np.ndarray]:
    """A kernel's tensors, and the plain weight [O, C] in float32 that they stand for."""
    bits, size = config["bits"], config["group_size"]
    size = inputs if size == -1 else size
    q = rng.integers(0, 1 << bits, (inputs, outputs))
    symmetric = config.get("sym", False)
    z = np.full((inputs // size, outputs), 1 << (bits - 1))
    if not symmetric:
        z = rng.integers(0, 1 << bits, z.shape)
    s = rng.uniform(0.001, 0.02, z.shape).astype(np.float16)
    group = np.arange(inputs) // size
    if config.get("desc_act"):
        group = rng.permutation(group)
    plain = (q - z[group]).astype(np.float32) * s[group].astype(np.float32)
    if config["quant_method"] == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        tensors = {"qweight": words(q, 4, order), "qzeros": words(z, 4, order)}
    else:
        less = (z - 1) % (1 << bits)
        tensors = {"qweight": np.ascontiguousarray(words(q.T, bits).T), "qzeros": words(less, bits)}
        tensors |= {"g_idx": group.astype(np.int32), "bias": np.zeros(outputs, np.float16)}
    return {**tensors, "scales": s}, plain.T


def folders(tmp_path, config: dict, cfg: ModelConfig = DENSE):
    """A quantised folder, and a plain one in float32 of the same weights."""
    rng = np.random.default_rng(0)
    packed, plain = {}, {}
    for name, row in tensor_table.hf_names(cfg).items():
        shape = tensor_table.hf_shape(row, cfg)
        base = name.removesuffix(".weight")
        linear = len(shape) == 2 and "layers" in name
        if not linear or base.endswith(("mlp.gate", "shared_expert_gate")):
            packed[name] = rng.normal(size=shape).astype(np.float16)
            plain[name] = packed[name].astype(np.float32)
            continue
        tensors, plain[name] = kernel(rng, config, *shape)
        if f"{base}.bias" in tensor_table.hf_names(cfg):
            tensors.pop("bias", None)
        packed |= {f"{base}.{piece}": tensor for piece, tensor in tensors.items()}
    paths = []
    for kind, tensors in (("packed", packed), ("plain", plain)):
        path = tmp_path / kind
        path.mkdir()
        safetensors.numpy.save_file(
            {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
            path / "model.safetensors",
        )
        values = huggingface.write_model(cfg, dtype="float16")
        extra = {"quantization_config": config} if kind == "packed" else {}
        (path / "config.json").write_text(json.dumps(values | extra))
        paths.append(path)
    return paths


def assert_equal(loaded: dict, plain: dict) -> int:
    """Bitwise, once dequantised; how many parameters are quantised."""
    loaded, plain = tensor_table.flatten(loaded), tensor_table.flatten(plain)
    assert loaded.keys() == plain.keys()
    for path, want in plain.items():
        got = array.dequantised(loaded[path], dtype=jnp.float32)
        assert (np.asarray(got).reshape(want.shape) == np.asarray(want)).all(), path
    return sum(map(array.is_quantised, loaded.values()))


CASES = {
    "gptq int4": (GPTQ, DENSE),
    "gptq int8": (GPTQ | {"bits": 8}, DENSE),
    "gptq, in an order, not symmetric": (GPTQ | {"desc_act": True, "sym": False}, DENSE),
    "gptq int8, in an order, not symmetric": (
        GPTQ | {"bits": 8, "desc_act": True, "sym": False},
        DENSE,
    ),
    "gptq, a scale a channel": (GPTQ | {"group_size": -1}, DENSE),
    "gptq, experts": (GPTQ, SPARSE),
    "awq": (AWQ, DENSE),
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_formula(tmp_path, case):
    config, cfg = CASES[case]
    packed, plain = folders(tmp_path, config, cfg)
    want = load.load_params(plain)
    loaded = load.load_params(packed, dtype="float32")
    assert assert_equal(loaded, want) == (10 if cfg.moe else 7)
    importer.import_checkpoint(packed, tmp_path / "native")
    again = load.load_params(tmp_path / "native", dtype="float32")
    assert jax.tree.structure(again) == jax.tree.structure(loaded)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(loaded), strict=True):
        assert (np.asarray(ours) == np.asarray(theirs)).all()
    report = verify.verify(tmp_path / "native", on_progress=lambda *_: None)
    assert not report.problems and report.num_summed == report.num_arrays > 0


def test_logits_are_those_of_the_plain_weights(tmp_path):
    packed, plain = folders(tmp_path, GPTQ | {"desc_act": True})
    tokens_BT = jnp.arange(12).reshape(2, 6)

    def logits(path):
        params = load.load_params(path, dtype="float32")
        hidden_BTD = transformer.apply(DENSE, params, tokens_BT).hidden_BTD
        return transformer.unembed(DENSE, params, hidden_BTD)

    np.testing.assert_allclose(logits(packed), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTQ | {"bits": 3}, r"gptq with bits=3 is not supported; use one of \(4, 8\)"),
        (GPTQ | {"group_size": 48}, "gptq with group_size=48 is not supported"),
        (GPTQ | {"group_size": 96}, "64 inputs are no multiple of .*group_size=96"),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, "checkpoint_format='gptq_v2' is not supported"),
        (GPTQ | {"rotation": "hadamard"}, "quantization_config: unknown keys rotation"),
        (AWQ | {"version": "gemv"}, "version='gemv' is not supported: only AWQ's gemm packing is"),
        (AWQ | {"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not supported"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, config, message):
    packed, _ = folders(tmp_path, GPTQ | {"group_size": 32})
    values = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    with pytest.raises(ValueError, match=message):
        importer.import_checkpoint(packed, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def edit(path, change) -> None:
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


MLP = "model.layers.1.mlp.down_proj"


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, np.full_like(tensors[name], value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{MLP}.qzeros"), f"lacks {MLP}.qzeros"),
        (drop(f"{MLP}.qweight"), f"lacks tensors that config.json asks for: {MLP}.weight"),
        (put(f"{MLP}.bias", 1), f"{MLP}.bias is not zero"),
        (put(f"{MLP}.qzeros", 0), f"{MLP}.qzeros has zero points other than 8"),
        (put(f"{MLP}.scales", np.inf), f"{MLP}.scales has 192 values that are NaN or infinite"),
        (put(f"{MLP}.g_idx", 0), f"{MLP}.g_idx is no division into groups of 32"),
    ],
)
def test_tensors_that_contradict_the_config_are_refused(tmp_path, change, message):
    packed, _ = folders(tmp_path, GPTQ)
    edit(packed, change)
    with pytest.raises(ValueError, match=message):
        importer.import_checkpoint(packed, tmp_path / "native")
    assert not (tmp_path / "native").exists()
