"""Experts from Hugging Face folders and back: byte for byte, padded where asked, and stripped."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers

from configs.models.architecture import ModelConfig, MoEConfig
from qwen_jax.checkpoint import block_plan, load, resolve, tensor_table
from qwen_jax.checkpoint.huggingface import exporter, importer
from qwen_jax.checkpoint.native import store
from qwen_jax.model import transformer
from tests.support import hf_folder

MOE = MoEConfig(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
    mlp_only_layers=(1,),
)


def make(hf, folder: Path, moe: MoEConfig = MOE, *, dtype: str = "bfloat16") -> Path:
    """A folder that transformers saves, everything in it random."""
    cfg = dataclasses.replace(hf.tiny, moe=moe)
    return hf_folder.write(folder, cfg, dtype=dtype, drawn=lambda parameter: True)


def flat(path, **options) -> dict[str, np.ndarray]:
    params = tensor_table.flatten(load.load_params(path, **options))
    return {name: np.asarray(array) for name, array in params.items()}


@pytest.mark.parametrize("block_bytes", [block_plan.BLOCK_BYTES, 4096])
@pytest.mark.parametrize(
    "moe", [MOE, dataclasses.replace(MOE, mlp_only_layers=())], ids=["irregular", "uniform"]
)
def test_import_then_export_is_the_identity(hf, tmp_path, monkeypatch, moe, block_bytes):
    monkeypatch.setattr(block_plan, "BLOCK_BYTES", block_bytes)
    folder = make(hf, tmp_path / "hf", moe)
    importer.import_checkpoint(folder, tmp_path / "native")
    exporter.export_checkpoint(tmp_path / "native", tmp_path / "back")
    hf.assert_same_bytes(hf.tensors(tmp_path / "back"), hf.tensors(folder))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes(), name
    loaded, imported = flat(folder), flat(tmp_path / "native")
    hf.assert_same_bytes(imported, loaded)
    expert = hf.tensors(folder)["model.layers.2.mlp.experts.4.up_proj.weight"]
    np.testing.assert_array_equal(loaded["layers.moe.experts.up.kernel"][-1, 4], expert.T)


def test_transformers_loads_an_export(hf, tmp_path):
    folder = make(hf, tmp_path / "hf", dtype="float32")
    importer.import_checkpoint(folder, tmp_path / "native")
    exporter.export_checkpoint(tmp_path / "native", tmp_path / "back", max_shard_bytes=50_000)
    ours, theirs = (
        transformers.Qwen2MoeForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "back", folder)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_padding_is_added_at_load_and_stripped_on_export(hf, tmp_path, kind):
    folder = make(hf, tmp_path / "hf", dtype="float32")
    importer.import_checkpoint(folder, tmp_path / "native")
    cfg = resolve.resolve(folder).model
    padded = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, pad_experts_to=8))
    params = load.load_params(tmp_path / kind, model=padded)
    plain, held = flat(folder), tensor_table.flatten(params)
    for path, leaf in tensor_table.flatten(transformer.shapes(padded)).items():
        assert held[path].shape == leaf.shape, path
    for path, array in plain.items():
        if ".experts." in path:
            np.testing.assert_array_equal(held[path][:, :6], array)
            assert not np.any(held[path][:, 6:])
        else:
            np.testing.assert_array_equal(held[path], array)
    save(tmp_path / "padded", padded, params)
    hf.assert_same_bytes(flat(tmp_path / "padded", model=cfg), plain)
    exporter.export_checkpoint(tmp_path / "padded", tmp_path / "back")
    hf.assert_same_bytes(hf.tensors(tmp_path / "back"), hf.tensors(folder))


def save(folder: Path, cfg: ModelConfig, params: dict) -> None:
    """A native checkpoint, as Orbax writes it."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params)
    store.write_json(folder / "model" / "metadata", store.metadata(cfg))


def test_router_biases_begin_as_zeros_and_are_not_exported(hf, tmp_path):
    folder = make(hf, tmp_path / "hf", dtype="float32")
    cfg = resolve.resolve(folder).model
    biased = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, bias_update_rate=1e-3))
    params = load.load_params(folder, model=biased)
    bias = params["layers"]["moe"]["router"]["bias"]
    assert bias.shape == (2, 6) and not np.any(bias)
    params["layers"]["moe"]["router"]["bias"] = bias + 0.5
    save(tmp_path / "biased", biased, params)
    np.testing.assert_array_equal(flat(tmp_path / "biased")["layers.moe.router.bias"], 0.5)
    with pytest.raises(ValueError, match="router biases .* no place"):
        exporter.export_checkpoint(tmp_path / "biased", tmp_path / "back")
    with pytest.raises(ValueError, match="set experts.bias_update_rate to go on with them"):
        load.load_params(tmp_path / "biased", model=cfg)
    assert not (tmp_path / "back").exists()


def test_an_expert_that_is_missing_is_named(hf, tmp_path):
    folder = make(hf, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 7}))
    with pytest.raises(ValueError, match=r"lacks .*layers\.0\.mlp\.experts\.6\.gate_proj"):
        importer.import_checkpoint(folder, tmp_path / "native")
