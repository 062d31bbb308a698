"""Imports: what plain Orbax restores, refusals, and memory within its bound."""

import json
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import numpy as safetensors_numpy

from configs.models import architecture, huggingface
from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint import block_plan, tensor_table
from qwen_jax.checkpoint.huggingface import importer
from qwen_jax.checkpoint.native import store
from tests.qwen_jax.checkpoint.huggingface.import_process import (
    assert_same_params,
    restored,
    start_import,
)


def make_zeros(folder: Path, model: ModelConfig, *, dtype="BF16") -> Path:
    """A folder of zeros that takes no space: enough where only sizes matter."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(huggingface.write_model(model)))
    header, end = {}, 0
    for name, row in tensor_table.hf_names(model).items():
        shape = tensor_table.hf_shape(row, model)
        start, end = end, end + int(np.prod(shape)) * (2 if dtype == "BF16" else 4)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def expected_params(hf, folder: Path) -> dict:
    """The parameters from the tensors, layer by layer in plain numpy."""
    found = hf.tensors(folder)
    model = huggingface.read_model(json.loads((folder / "config.json").read_text()))
    params, size = {}, tensor_table.sizes(model)
    for row in tensor_table.rows(model):
        layers = range(model.num_hidden_layers) if row.stack else [None]
        params[row.path] = np.stack(
            [
                tensor_table.read_region(
                    row, tensor_table.whole(row, size), size, found[name].__getitem__
                )
                for name in (row.hf.format(layer) for layer in layers)
            ]
        )
        if not row.stack:
            params[row.path] = params[row.path][0]
    return params


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_plain_orbax_restores_an_import(hf, tmp_path, dtype, tied, max_shard_size):
    folder = hf.make(
        tmp_path / "hf", dtype=dtype, tie_word_embeddings=tied, max_shard_size=max_shard_size
    )
    plans = []
    importer.import_checkpoint(folder, tmp_path / "out", on_plan=plans.append)
    assert_same_params(restored(tmp_path / "out"), expected_params(hf, folder))
    assert (plans[0].num_tensors, plans[0].done_bytes) == (len(hf.tensors(folder)), 0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["assets", "model", "params"]
    assert sorted(p.name for p in (tmp_path / "out" / "assets").iterdir()) == [
        "config.json", "generation_config.json", "tokenizer.json",
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_orbax_restores_onto_a_device_and_reads_the_model(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    importer.import_checkpoint(folder, tmp_path / "out")
    params = tensor_table.nest(expected_params(hf, folder))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), params
    )
    got = ocp.StandardCheckpointer().restore((tmp_path / "out" / "params").resolve(), abstract)
    assert isinstance(got["norm"]["scale"], jax.Array)
    assert_same_params(tensor_table.flatten(got), tensor_table.flatten(params))
    whole = ocp.Checkpointer(ocp.CompositeCheckpointHandler()).restore(
        (tmp_path / "out").resolve(),
        args=ocp.args.Composite(params=ocp.args.PyTreeRestore(), model=ocp.args.JsonRestore()),
    )
    assert architecture.model_from_dict(whole["model"]["model"]).num_hidden_layers == 3


def test_metadata_is_what_orbax_writes(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    importer.import_checkpoint(folder, tmp_path / "out")
    params = tensor_table.nest(expected_params(hf, folder))
    ocp.PyTreeCheckpointer().save(tmp_path / "theirs", params)
    ours = json.loads((tmp_path / "out" / "params" / "_METADATA").read_text())
    theirs = json.loads((tmp_path / "theirs" / "_METADATA").read_text())
    for values in (ours, theirs):  # how arrays are cut may differ
        for entry in values["tree_metadata"].values():
            entry["value_metadata"].pop("write_shape", None)
    assert ours == theirs


def test_torch_files_import_the_same(hf, tmp_path):
    import torch

    folder = hf.make(tmp_path / "hf")
    state = {
        name: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        for name, a in hf.tensors(folder).items()
    }
    expected = expected_params(hf, folder)
    names = sorted(state)
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({n: state[n] for n in names if weight_map[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    importer.import_checkpoint(folder, tmp_path / "out")
    assert_same_params(restored(tmp_path / "out"), expected)


def tie(hf, folder: Path, *, change: float) -> None:
    """Stores the tied projection too."""
    found = hf.tensors(folder)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].copy()
    found["lm_head.weight"][-1, 0] += change
    safetensors_numpy.save_file(found, folder / "model.safetensors")


def test_tied_projection_that_is_stored_too(hf, tmp_path):
    folder = hf.make(tmp_path / "hf", tie_word_embeddings=True)
    tie(hf, folder, change=0)
    importer.import_checkpoint(folder, tmp_path / "out")
    assert "lm_head.kernel" not in restored(tmp_path / "out")
    tie(hf, folder, change=1)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        importer.import_checkpoint(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_non_finite_tensor_is_named_and_nothing_looks_whole(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    found = hf.tensors(folder)
    found["model.norm.weight"][3] = np.nan
    safetensors_numpy.save_file(found, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight has 1 values"):
        importer.import_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generation_config_is_checked_before_anything_is_written(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    with pytest.raises(ValueError, match="num_beams=4"):
        importer.import_checkpoint(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_places_in_the_way(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists already"):
        importer.import_checkpoint(folder, tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").write_text("keep")
    with pytest.raises(ValueError, match=r"new\.partial is in the way"):
        importer.import_checkpoint(folder, tmp_path / "new")
    assert (tmp_path / "new.partial" / "mine").read_text() == "keep"


def test_partial_import_of_other_files(hf, tmp_path, monkeypatch):
    folder = hf.make(tmp_path / "hf")
    monkeypatch.setattr(importer, "_commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        importer.import_checkpoint(folder, tmp_path / "out")
    monkeypatch.undo()
    other = hf.make(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="unfinished import of other files"):
        importer.import_checkpoint(other, tmp_path / "out")


def test_two_imports_in_one_place(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")

    def again(_):
        with pytest.raises(ValueError, match="another import is writing"):
            importer.import_checkpoint(folder, tmp_path / "out")

    importer.import_checkpoint(folder, tmp_path / "out", on_plan=again)
    assert (tmp_path / "out").is_dir()


def test_too_little_memory_names_the_least(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"max_memory=8 MiB is too little; .* at least \d+ MiB"):
        importer.import_checkpoint(folder, tmp_path / "out", max_memory=8 << 20)


def test_disk_known_to_be_too_small(hf, tmp_path, monkeypatch):
    folder = hf.make(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(OSError, match="0.00 GB free; make room"):
        importer.import_checkpoint(folder, tmp_path / "out")
    monkeypatch.undo()
    # Nothing is written yet, so less memory will do than the first run would have used.
    importer.import_checkpoint(folder, tmp_path / "out", max_memory=block_plan.peak_bytes(1 << 20))


def test_leftovers_are_removed_and_nothing_else(hf, tmp_path):
    importer.import_checkpoint(hf.make(tmp_path / "hf"), tmp_path / "out")
    params = tmp_path / "out" / "params"
    expected = restored(tmp_path / "out")
    metadata = (params / "_METADATA").read_text()
    (params / "d" / "0123456789abcdef").write_bytes(b"half a chunk")
    (params / "manifest.ocdbt.__lock").write_bytes(b"")
    store.remove_leftovers(params)
    assert not (params / "d" / "0123456789abcdef").exists()
    assert not (params / "manifest.ocdbt.__lock").exists()
    (params / "_METADATA").write_text(metadata)
    assert_same_params(restored(tmp_path / "out"), expected)


@pytest.mark.parametrize("max_memory", [144 << 20, 0])
def test_memory_stays_within_the_plan(tmp_path, max_memory):
    model = ModelConfig(
        name="large", vocab_size=40960, hidden_size=2048, intermediate_size=16384,
        num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4, head_dim=128,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_ids=(), pad_token_id=None,
    )  # fmt: skip
    folder = make_zeros(tmp_path / "hf", model)
    assert (folder / "model.safetensors").stat().st_size > 500 << 20
    child = start_import(folder, tmp_path / "out", max_memory=max_memory)
    output, errors = child.communicate()
    assert not errors
    peak, planned = map(int, output.split()[-2:])
    assert peak <= planned
    assert not max_memory or planned <= max_memory
