"""Imports: what plain Orbax restores, memory within its bound, and kills at any moment."""

import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import numpy as safetensors_numpy

from configs.models import architecture, huggingface
from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint import block_plan, tensor_table
from qwen_jax.checkpoint.huggingface import importer, source
from qwen_jax.checkpoint.native import store

ROOT = Path(__file__).resolve().parents[4]
CHILD = """
import resource, sys
from qwen_jax.checkpoint.huggingface import importer
hf_dir, out, max_memory, file_limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if file_limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
try:
    planned = importer.import_checkpoint(
        hf_dir, out, max_memory=max_memory or None,
        on_progress=lambda done, total, what: print(done, flush=True),
    )
except (OSError, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
with open("/proc/self/status") as status:
    print(next(int(s.split()[1]) * 1024 for s in status if s.startswith("VmHWM")))
    print(planned.peak_bytes)
"""


def start_import(hf_dir, out, *, max_memory=0, file_limit=0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(hf_dir), str(out), str(max_memory), str(file_limit)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


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


def restored(out: Path) -> dict:
    """The parameters by path, as plain Orbax restores them."""
    return tensor_table.flatten(ocp.PyTreeCheckpointer().restore(out.resolve() / "params"))


def assert_same_params(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert ours[path].dtype == array.dtype, path
        assert ours[path].shape == array.shape, path
        assert np.asarray(ours[path]).tobytes() == np.asarray(array).tobytes(), path


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


@pytest.fixture(scope="module")
def medium(hf, tmp_path_factory):
    """A folder of some 50 blocks, and its undisturbed import."""
    folder = tmp_path_factory.mktemp("medium")
    hf.make(
        folder / "hf", dtype="float32", vocab_size=8192, hidden_size=256, intermediate_size=1024,
        num_hidden_layers=6, head_dim=64,
    )  # fmt: skip
    importer.import_checkpoint(folder / "hf", folder / "out")
    return folder


SMALL_BLOCKS = 160 << 20  # memory with which blocks are small, so that there are many


def test_killed_imports_go_on(medium, tmp_path):
    chance = random.Random(0)
    out = tmp_path / "out"
    finished, kills = False, 0
    while not finished:
        child = start_import(medium / "hf", out, max_memory=SMALL_BLOCKS)
        for _ in range(chance.randint(1, 12)):
            if not child.stdout.readline():
                break
        finished = child.poll() is not None or kills == 6
        if not finished:
            child.kill()
            kills += 1
        _, errors = child.communicate()
        assert not errors
        assert out.exists() == (child.returncode == 0)
        finished = child.returncode == 0
    assert kills >= 3
    assert_same_params(restored(out), restored(medium / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    # What the killed runs were writing has been cleared away: the database names every file.
    files = set((out / "params").rglob("*"))
    store.remove_leftovers(out / "params")
    assert files - set((out / "params").rglob("*")) == {out / "params" / "_METADATA"}


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


def test_going_on_with_less_memory_says_how_much_it_takes(medium, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "_commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        importer.import_checkpoint(medium / "hf", tmp_path / "out")
    with pytest.raises(ValueError, match=r"begun with more memory .* at least \d+ MiB"):
        importer.import_checkpoint(
            medium / "hf", tmp_path / "out", max_memory=block_plan.peak_bytes(1 << 20)
        )


def test_blocks_done_before_are_not_written_again(medium, tmp_path, monkeypatch):
    real, written = source.read_block, []

    def stop_halfway(opened, stored, block, buffer):
        if len(written) == 20:
            raise KeyboardInterrupt
        written.append((stored.row.path, str(block)))
        return real(opened, stored, block, buffer)

    monkeypatch.setattr(block_plan, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(source, "read_block", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        importer.import_checkpoint(medium / "hf", tmp_path / "out")
    first, plans = set(written), []
    written.clear()
    monkeypatch.setattr(
        source, "read_block", lambda *a: written.append((a[1].row.path, str(a[2]))) or real(*a)
    )
    importer.import_checkpoint(medium / "hf", tmp_path / "out", on_plan=plans.append)
    assert plans[0].done_bytes > 10 << 20
    assert len(first & set(written)) <= block_plan.UNDER_WAY
    assert_same_params(restored(tmp_path / "out"), restored(medium / "out"))


def test_killed_between_commit_and_end(medium, tmp_path, monkeypatch):
    real = Path.unlink

    def keep_journal(self, **kwargs):
        if self.name == importer._JOURNAL:
            raise KeyboardInterrupt
        real(self, **kwargs)

    monkeypatch.setattr(Path, "unlink", keep_journal)
    with pytest.raises(KeyboardInterrupt):
        importer.import_checkpoint(medium / "hf", tmp_path / "out")
    monkeypatch.undo()
    importer.import_checkpoint(medium / "hf", tmp_path / "out")
    assert not (tmp_path / "out" / importer._JOURNAL).exists()


def test_nothing_is_trusted_after_the_machine_stopped(medium, tmp_path, monkeypatch):
    monkeypatch.setattr(importer, "_commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        importer.import_checkpoint(medium / "hf", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(store, "boot_id", lambda: "another")
    plans = []
    importer.import_checkpoint(medium / "hf", tmp_path / "out", on_plan=plans.append)
    assert plans[0].done_bytes == 0
    assert_same_params(restored(tmp_path / "out"), restored(medium / "out"))


def test_full_disk_is_one_clear_error_and_resumable(medium, tmp_path):
    out = tmp_path / "out"
    # No file may grow beyond a megabyte: what a full disk looks like to the writer.
    child = start_import(medium / "hf", out, max_memory=SMALL_BLOCKS, file_limit=1 << 20)
    _, errors = child.communicate()
    assert child.returncode == 1
    assert errors.startswith(f"OSError: cannot write {out}.partial: ")
    assert "it goes on where it stopped" in errors
    assert len(errors.strip().splitlines()) == 1
    assert not out.exists()
    importer.import_checkpoint(medium / "hf", out)
    assert_same_params(restored(out), restored(medium / "out"))


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
