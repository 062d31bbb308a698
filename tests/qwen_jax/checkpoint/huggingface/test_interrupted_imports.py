"""Imports that are killed or run out of space at any moment, and go on from there."""

import random
import signal
from pathlib import Path

import pytest

from qwen_jax.checkpoint import block_plan
from qwen_jax.checkpoint.huggingface import importer, source
from qwen_jax.checkpoint.native import store
from tests.qwen_jax.checkpoint.huggingface.import_process import (
    assert_same_params,
    restored,
    start_import,
)


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


def kill_until_finished(folder: Path, out: Path, chance: random.Random) -> int:
    """Imports a folder, killing up to six processes; the number of kills that stopped an import.

    A kill that comes when the result is in place stops nothing, and is not counted.
    """
    num_stopped = 0
    while not out.exists():
        child = start_import(folder, out, max_memory=SMALL_BLOCKS)
        for _ in range(chance.randint(1, 12)):
            if not child.stdout.readline():
                break
        if num_stopped < 6:
            child.kill()
        _, errors = child.communicate()
        assert not errors
        if child.returncode == 0:
            assert sorted(p.name for p in out.parent.iterdir()) == ["out"]
        else:
            assert child.returncode == -signal.SIGKILL
            num_stopped += not out.exists()
    return num_stopped


@pytest.mark.races
def test_killed_imports_go_on(medium, tmp_path):
    chance = random.Random(0)
    for attempt in range(10):  # on a busy machine kills may come too late
        out = tmp_path / str(attempt) / "out"
        num_stopped = kill_until_finished(medium / "hf", out, chance)
        if num_stopped >= 3:
            break
    assert num_stopped >= 3
    if (out / importer._JOURNAL).exists():  # the last kill fell between the commit and the end
        importer.import_checkpoint(medium / "hf", out)
    assert_same_params(restored(out), restored(medium / "out"))
    assert sorted(p.name for p in out.iterdir()) == ["assets", "model", "params"]
    # What the killed runs were writing has been cleared away: the database names every file.
    files = set((out / "params").rglob("*"))
    store.remove_leftovers(out / "params")
    assert files - set((out / "params").rglob("*")) == {out / "params" / "_METADATA"}


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


@pytest.mark.races
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
