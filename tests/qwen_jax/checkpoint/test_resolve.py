"""What `resolve` knows of a folder, and that every file is read once."""

import json

import pytest

from configs.models.architecture import GenerationConfig
from qwen_jax.checkpoint import load, resolve
from qwen_jax.checkpoint.huggingface import importer
from tests.support import opened_files


def test_a_huggingface_folder_is_read_once(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    with opened_files.counted() as opened:
        found = resolve.resolve(folder)
        load.load(found, dtype="float32")
        assert found.generation_config == found.generation_config
    assert opened[folder / "config.json"] == 1
    assert opened[folder / "generation_config.json"] == 1
    (folder / "config.json").read_text()
    assert opened[folder / "config.json"] == 1, "counted after the block"


def test_a_native_checkpoint_is_read_once(hf, tmp_path):
    importer.import_checkpoint(hf.make(tmp_path / "hf"), tmp_path / "native")
    with opened_files.counted() as opened:
        load.load_params(tmp_path / "native")
    assert opened[tmp_path / "native" / "model" / "metadata"] == 1
    assert not opened[tmp_path / "native" / "assets" / "config.json"]


def test_what_a_huggingface_folder_holds(hf, tmp_path):
    folder = hf.make(tmp_path / "hf", dtype="float16")
    found = resolve.resolve(folder)
    assert (found.dtype, found.weights.format) == ("float16", "safetensors")
    assert found.weights.path == folder / "model.safetensors" and not found.weights.is_index
    assert found.files == {path.name for path in folder.iterdir()}
    assert found.generation_config.eos_token_ids == hf.tiny.eos_token_ids
    assert not found.is_quantised
    (folder / "generation_config.json").unlink()
    assert resolve.resolve(folder).generation_config == GenerationConfig()


def test_generation_config_is_refused_only_where_it_is_wanted(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    found = resolve.resolve(folder)
    load.load(found)
    with pytest.raises(ValueError, match="num_beams=4"):
        _ = found.generation_config


def test_a_checkpoint_without_a_tokenizer(hf, tmp_path):
    importer.import_checkpoint(hf.make(tmp_path / "hf"), tmp_path / "native")
    (tmp_path / "native" / "assets").rename(tmp_path / "elsewhere")
    found = resolve.resolve(tmp_path / "native")
    assert found.files == frozenset()
    with pytest.raises(ValueError, match="native has no tokenizer beside it; import it again"):
        _ = found.tokenizer


def test_an_import_needs_a_huggingface_folder(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    importer.import_checkpoint(folder, tmp_path / "native")
    with pytest.raises(ValueError, match=r"native/config\.json does not exist"):
        importer.import_checkpoint(tmp_path / "native", tmp_path / "again")
    (folder / "checkpoints").mkdir()  # of another tool: nothing to an import
    assert resolve.resolve_huggingface(folder).kind == "huggingface"


def test_a_quantised_folder_is_known_by_its_config(hf, tmp_path, edit_config):
    folder = hf.make(tmp_path / "hf")
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    edit_config(folder, quantization_config=settings)
    found = resolve.resolve(folder)
    assert found.is_quantised and found.quantisation.bits == 4
    with pytest.raises(ValueError, match="is quantised, for inference alone; train the checkpoint"):
        resolve.check_not_quantised(found, remedy="train")
    assert json.loads((folder / "config.json").read_text()) == found.config
