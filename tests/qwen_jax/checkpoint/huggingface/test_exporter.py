"""Exports: byte-identical to what was imported, and loadable by transformers."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers
from safetensors import numpy as safetensors_numpy

from configs.models import huggingface
from qwen_jax.checkpoint import block_plan, load
from qwen_jax.checkpoint.huggingface import exporter, importer
from qwen_jax.checkpoint.native import store


def round_trip(folder, tmp_path, **options):
    importer.import_checkpoint(folder, tmp_path / "native")
    return exporter.export_checkpoint(tmp_path / "native", tmp_path / "back", **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
def test_import_then_export_is_the_identity(hf, tmp_path, dtype, tied):
    folder = hf.make(tmp_path / "hf", dtype=dtype, tie_word_embeddings=tied)
    plans, progress = [], []
    round_trip(
        folder, tmp_path, on_plan=plans.append, on_progress=lambda *args: progress.append(args)
    )
    back = tmp_path / "back"
    hf.assert_same_bytes(hf.tensors(back), hf.tensors(folder))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes(), name
    assert sorted(p.name for p in back.iterdir()) == sorted(p.name for p in folder.iterdir())
    assert plans[0].total_bytes == sum(t.nbytes for t in hf.tensors(folder).values())
    assert progress[-1][0] == progress[-1][1] == plans[0].total_bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "native"]


def test_transformers_loads_an_export_of_shards(hf, tmp_path):
    folder = hf.make(tmp_path / "hf", dtype="float32")
    round_trip(folder, tmp_path, max_shard_bytes=20_000)
    back = tmp_path / "back"
    shards = sorted(back.glob("*.safetensors"))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == {p.name for p in shards}
    total = sum(t.nbytes for t in hf.tensors(folder).values())
    assert index["metadata"]["total_size"] == total
    for path in shards:
        held = safetensors_numpy.load_file(path)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 20_000
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(folder).state_dict()
    ours = transformers.Qwen2ForCausalLM.from_pretrained(back).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tied_projection_stored_twice_comes_back(hf, tmp_path):
    folder = hf.make(tmp_path / "hf", tie_word_embeddings=True)
    found = hf.tensors(folder)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].copy()
    safetensors_numpy.save_file(found, folder / "model.safetensors")
    round_trip(folder, tmp_path)
    hf.assert_same_bytes(hf.tensors(tmp_path / "back"), found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_other_dtypes_round_as_torch_does(hf, tmp_path, dtype):
    folder = hf.make(tmp_path / "hf", dtype="float32")
    round_trip(folder, tmp_path, dtype=dtype)
    wanted = getattr(torch, dtype)
    ours = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "back")
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(folder).to(wanted).state_dict()
    assert ours.dtype == wanted
    assert all(torch.equal(array, theirs[name]) for name, array in ours.state_dict().items())


def test_value_too_large_for_float16(hf, tmp_path):
    folder = hf.make(tmp_path / "hf", dtype="float32")
    found = hf.tensors(folder)
    found["model.norm.weight"][0] = 1e6
    safetensors_numpy.save_file(found, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight has 1 values.* as float16"):
        round_trip(folder, tmp_path, dtype="float16")
    assert not (tmp_path / "back").exists()


def training_run(hf, folder, *, step=7):
    """A training run's output: Orbax chooses chunks (whole stacks) and compresses them."""
    output = folder.parent / "run"
    params = load.load_params(folder)
    model = huggingface.read_model(json.loads((folder / "config.json").read_text()), name="hf")
    with ocp.CheckpointManager(
        output / "checkpoints", item_names=("params", "optimizer", "model")
    ) as manager:
        for number in (step - 1, step):
            manager.save(
                number,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(jax.tree.map(lambda a, n=number: a + n, params)),
                    optimizer=ocp.args.PyTreeSave({"count": np.zeros(1)}),
                    model=ocp.args.JsonSave(store.metadata(model)),
                ),
            )
        manager.wait_until_finished()
    (output / "assets").mkdir()
    for path in folder.glob("*.json"):
        shutil.copyfile(path, output / "assets" / path.name)
    return output


@pytest.mark.parametrize("block_bytes", [block_plan.BLOCK_BYTES, 4096])
def test_training_run_exports_its_newest_step(hf, tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(block_plan, "BLOCK_BYTES", block_bytes)
    folder = hf.make(tmp_path / "hf", dtype="float32")
    output = training_run(hf, folder)
    exporter.export_checkpoint(output, tmp_path / "back")
    expected = {name: tensor + np.float32(7) for name, tensor in hf.tensors(folder).items()}
    hf.assert_same_bytes(hf.tensors(tmp_path / "back"), expected)
    assert (tmp_path / "back" / "tokenizer.json").exists()


def test_checkpoint_without_assets(hf, tmp_path):
    folder = hf.make(tmp_path / "hf", dtype="float32")
    importer.import_checkpoint(folder, tmp_path / "native")
    shutil.rmtree(tmp_path / "native" / "assets")
    exporter.export_checkpoint(tmp_path / "native", tmp_path / "back")
    ours = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "back")
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(folder)
    assert ours.generation_config.eos_token_id == theirs.config.eos_token_id
    tokens = torch.arange(10)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_refusals(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    importer.import_checkpoint(folder, tmp_path / "native")
    native, back = tmp_path / "native", tmp_path / "back"
    with pytest.raises(ValueError, match="is a Hugging Face folder already"):
        exporter.export_checkpoint(folder, back)
    with pytest.raises(ValueError, match="hf exists already"):
        exporter.export_checkpoint(native, folder)
    with pytest.raises(ValueError, match="dtype='int8' is not one of"):
        exporter.export_checkpoint(native, back, dtype="int8")
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        exporter.export_checkpoint(native, back, max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"max_memory=8 MiB is too little.* at least \d+ MiB"):
        exporter.export_checkpoint(native, back, max_memory=8 << 20)
    (tmp_path / "back.partial").mkdir()
    (tmp_path / "back.partial" / "mine").write_text("keep")
    with pytest.raises(ValueError, match=r"back\.partial is in the way"):
        exporter.export_checkpoint(native, back)
    assert not back.exists()


def test_interrupted_export_never_looks_whole_and_starts_again(hf, tmp_path, monkeypatch):
    folder = hf.make(tmp_path / "hf")
    importer.import_checkpoint(folder, tmp_path / "native")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"cannot write .*back\.partial: .*No space left"):
        exporter.export_checkpoint(tmp_path / "native", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    monkeypatch.undo()
    exporter.export_checkpoint(tmp_path / "native", tmp_path / "back")
    hf.assert_same_bytes(hf.tensors(tmp_path / "back"), hf.tensors(folder))


def test_lost_data_is_an_error_that_names_the_parameter(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    importer.import_checkpoint(folder, tmp_path / "native")
    for path in (tmp_path / "native" / "params" / "d").iterdir():
        if path.stat().st_size > 4000:
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be (read|opened)"):
        exporter.export_checkpoint(tmp_path / "native", tmp_path / "back")
    assert not (tmp_path / "back").exists()
