"""Verification: a whole checkpoint is called whole, and whatever is damaged is named."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from configs.models import huggingface
from configs.models.architecture import ModelConfig
from configs.train import CheckpointConfig
from qwen_jax import cli
from qwen_jax.checkpoint import load, tensor_table, verify
from qwen_jax.checkpoint.huggingface import importer
from train.core import state
from train.core.step import State

MODEL = ModelConfig(
    name="m", vocab_size=256, hidden_size=8, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=16,
    bos_token_id=None, eos_token_ids=(0,), pad_token_id=None,
)  # fmt: skip
NUM_PARAMETERS = len(tensor_table.rows(MODEL))


def make(step: int) -> State:
    random = np.random.default_rng(step)
    params = tensor_table.nest(
        {
            row.path: jnp.asarray(random.normal(size=tensor_table.shape(row, MODEL)), jnp.float32)
            for row in tensor_table.rows(MODEL)
        }
    )
    return State(jnp.int32(step), params, {"mu": params, "nu": jax.tree.map(jnp.square, params)})


def save(output: Path, *states: State) -> Path:
    with state.Store(output, CheckpointConfig(), MODEL, states[0]) as store:
        for each in states:
            store.save(int(each.step), each, {"step": int(each.step)})
    return output


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "run", make(2), make(4))


@pytest.fixture
def run(saved, tmp_path):
    """A run of two checkpoints, 2 and 4, to damage."""
    return shutil.copytree(saved, tmp_path / "run")


def command(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit code and output of `qwen-jax checkpoint ...`."""
    monkeypatch.setattr("sys.argv", ["qwen-jax", "checkpoint", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    return stopped.value.code, said.out + said.err


def problems(path: Path) -> list[str]:
    return verify.verify(path, on_progress=lambda done, total, what: None).problems


def file_with(folder: Path, values: jax.Array) -> tuple[Path, int]:
    """The file in which an array's bytes lie, and where."""
    wanted = np.asarray(values).tobytes()
    for path in folder.rglob("d/*"):
        if (at := path.read_bytes().find(wanted)) >= 0:
            return path, at
    raise AssertionError(f"no file in {folder} holds the values")


def write(path: Path, at: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(data)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_run(run, monkeypatch, capsys):
    heard = []
    report = verify.verify(run, on_progress=lambda *what: heard.append(what))
    assert report.path == run / "checkpoints" / "4" and report.problems == []
    assert report.num_arrays == report.num_summed == 3 * NUM_PARAMETERS + 1
    assert heard[-1][0] == heard[-1][1] == report.num_bytes
    for path in (run, run / "checkpoints" / "2"):
        code, said = command(monkeypatch, capsys, "verify", path)
        assert code == 0 and f"whole; {report.num_arrays} arrays" in said
        assert said.rstrip().endswith(", all as saved")
    code, said = command(monkeypatch, capsys, "list", run)
    assert code == 0 and said.count(" whole ") == 2


@pytest.mark.parametrize(
    "part", ["params/_METADATA", "model/metadata", "optimizer/_METADATA", "data/metadata"]
)
def test_a_half_written_one_names_what_it_lacks(run, monkeypatch, capsys, part):
    newest = run / "checkpoints" / "4"
    (newest / part).unlink()
    code, said = command(monkeypatch, capsys, "verify", run)
    assert code == 2 and f"{newest} is half-written: it lacks {part}\n" in said
    code, said = command(monkeypatch, capsys, "list", run)
    assert code == 2 and f"lacks {part}" in said and said.count(" whole ") == 1
    assert command(monkeypatch, capsys, "verify", run / "checkpoints" / "2")[0] == 0


@pytest.mark.parametrize("part", ["params", "optimizer"])
def test_a_folder_without_its_files_is_named(run, part):
    newest = run / "checkpoints" / "4"
    for path in (newest / part).rglob("d/*"):
        path.unlink()
    assert any("cannot be" in problem and part in problem for problem in problems(run))


# Orbax leaves the reads of other arrays behind, which complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_values_that_are_not_there_cannot_be_loaded(run):
    newest = run / "checkpoints" / "4"
    shutil.rmtree(newest / "params" / "ocdbt.process_0")
    with pytest.raises(ValueError, match=f"{newest} is damaged: .*checkpoint verify"):
        load.load_params(run)
    gc.collect()
    assert any("cannot be read" in problem for problem in problems(run))


def test_one_flipped_bit_in_the_values(run, monkeypatch, capsys):
    newest = run / "checkpoints" / "4"
    embed = make(4).params["embed"]["weight"]
    path, at = file_with(newest / "params", embed)
    write(path, at, bytes([path.read_bytes()[at] ^ 1]))  # the last bit of one float's mantissa
    code, said = command(monkeypatch, capsys, "verify", run)
    assert code == 2 and "params: embed.weight does not hold the values that were saved" in said
    assert said.count("does not hold") == 1 and f"{newest}: damaged" in said

    path, at = file_with(newest / "optimizer", jnp.square(embed))
    write(path, at, bytes([path.read_bytes()[at] ^ 1]))
    assert "optimizer: state.nu.embed.weight does not hold" in problems(run)[-1]


@pytest.mark.parametrize("part", ["params", "optimizer"])
@pytest.mark.parametrize("name", ["manifest.ocdbt", "d/*", "_METADATA"])
def test_one_flipped_byte_in_what_leads_to_the_values(run, part, name):
    (path,) = (run / "checkpoints" / "4" / part).glob(name)
    where = range(0, path.stat().st_size, 97) if name != "_METADATA" else [0]
    whole = path.read_bytes()
    for at in where:
        write(path, at, bytes([whole[at] ^ 0x10]))
        assert any(part in problem for problem in problems(run)), at
        path.write_bytes(whole)
    assert not problems(run)


def test_a_value_that_is_not_finite(tmp_path, run):
    newest = run / "checkpoints" / "4"
    path, at = file_with(newest / "params", make(4).params["embed"]["weight"])
    write(path, at, np.array([np.nan, np.inf], np.float32).tobytes())
    assert problems(run) == [
        "params: embed.weight[256, 8], chunk [0:256, 0:8] has 2 values that are not finite"
    ]
    # One that a broken device has saved agrees with its sum, and is found all the same.
    broken = make(1)
    broken.params["norm"]["scale"] = broken.params["norm"]["scale"].at[3].set(jnp.nan)
    assert any("norm.scale" in one for one in problems(save(tmp_path / "broken", broken)))


def test_a_shape_that_is_not_the_configs(run):
    path = run / "checkpoints" / "4" / "model" / "metadata"
    model = json.loads(path.read_text())["model"]
    edit(path, model={**model, "vocab_size": 250})
    found = problems(run)
    assert "model/metadata does not hold the values that were saved" in found
    wrong = "embed.weight has shape [256, 8], its config asks for [250, 8]"
    assert f"params: {wrong}" in found and f"optimizer: state.mu.{wrong}" in found
    edit(path, model={**model, "tie_word_embeddings": True})
    assert "params: lm_head.kernel is no parameter of the model" in problems(run)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda newest: edit(newest / "model" / "metadata", step=3), "model/metadata 3,"),
        (lambda newest: edit(newest / "data" / "metadata", step=3), "data/metadata 3,"),
        (lambda newest: newest.rename(newest.with_name("5")), "the folder's name 5,"),
    ],
)
def test_parts_of_different_steps(run, damage, said):
    damage(run / "checkpoints" / "4")
    problem = problems(run)[-1]
    assert "the parts are not of one step" in problem and said in problem


def test_json_that_is_not_what_was_saved(run):
    model, data = (run / "checkpoints" / "4" / part / "metadata" for part in ("model", "data"))
    edit(model, model={**json.loads(model.read_text())["model"], "rope_theta": 1e5})
    edit(data, more=1)
    said = "metadata does not hold the values that were saved"
    assert problems(run) == [f"model/{said}", f"data/{said}"]
    data.write_text("{")
    assert f"{data} is not valid JSON" in problems(run)[0]


def test_an_imported_checkpoint_has_no_sums(tmp_path, monkeypatch, capsys):
    tensors = {
        name: np.ones(tensor_table.hf_shape(row, MODEL), np.float32)
        for name, row in tensor_table.hf_names(MODEL).items()
    }
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(huggingface.write_model(MODEL)))
    safetensors_numpy.save_file(tensors, tmp_path / "hf" / "model.safetensors")
    importer.import_checkpoint(tmp_path / "hf", tmp_path / "native")
    code, said = command(monkeypatch, capsys, "verify", tmp_path / "native")
    assert code == 0 and f"; {NUM_PARAMETERS} have no recorded sum to compare" in said
    code, said = command(monkeypatch, capsys, "verify", tmp_path / "hf")
    assert code == 2 and "is a Hugging Face folder; import it" in said


def test_what_is_no_run(tmp_path, monkeypatch, capsys):
    code, said = command(monkeypatch, capsys, "list", tmp_path)
    assert code == 2 and "is no training run" in said
    (tmp_path / "checkpoints").mkdir()
    code, said = command(monkeypatch, capsys, "verify", tmp_path)
    assert code == 2 and "a training run without a checkpoint yet" in said
    code, said = command(monkeypatch, capsys, "verify", tmp_path / "nowhere")
    assert code == 2 and "nowhere" in said


def test_bfloat16_moments_are_summed_too(tmp_path):
    plain = make(3)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain.params)
    mixed = dataclasses.replace(plain, optimizer={"mu": half, "nu": plain.params})
    report = verify.verify(save(tmp_path / "run", mixed), on_progress=lambda *what: None)
    assert report.problems == [] and report.num_summed == report.num_arrays
