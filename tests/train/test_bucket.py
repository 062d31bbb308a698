"""Runs and checkpoints in a bucket, of a stand-in for Google Cloud Storage on this machine."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.data import DataConfig
from configs.train import CheckpointConfig
from qwen_jax import storage
from qwen_jax.checkpoint import load, resolve, verify
from qwen_jax.text.tokenizer import tokenizer
from tests.train import bucket, processes


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    """A bucket, empty at first; the clients of this process and of those it starts use it."""
    port = processes.free_port()
    log = tmp_path_factory.mktemp("bucket") / "log"
    with pytest.MonkeyPatch.context() as patch, bucket.started(port, log):
        for name, value in bucket.settings(port).items():
            patch.setenv(name, value)
        yield f"gs://{bucket.NAME}"


def problems(path) -> list[str]:
    return verify.verify(path, on_progress=lambda *what: None).problems


def test_a_run_in_a_bucket(standin, tmp_path, helpers):
    """Saved, gone on with, found half-written, gone on with again, verified and loaded."""
    local = helpers.tiny_config(output=str(tmp_path), num_steps=8)
    remote = dataclasses.replace(local, output=f"{standin}/run")
    expected = helpers.run(local)
    assert helpers.run(dataclasses.replace(remote, num_steps=4)).step == 4
    assert helpers.run(remote).train["loss"] == expected.train["loss"]
    output = storage.folder(remote.output)
    assert [(step.number, step.state) for step in verify.steps(output)] == [
        (6, "whole"), (8, "whole"),
    ]  # fmt: skip
    assert problems(output) == []

    # What a save that was killed leaves: all there may be, but not the file that says so.
    (output / "checkpoints" / "8" / "commit_success.txt").unlink()
    assert "lacks commit_success.txt" in verify.steps(output)[-1].state
    assert resolve.resolve(output).step == 6
    assert helpers.run(remote).train["loss"] == expected.train["loss"]
    assert problems(output) == []
    jax.tree.map(
        np.testing.assert_array_equal,
        load.load_params(output),
        load.load_params(tmp_path),
    )
    storage.copy_tree(output, tmp_path / "copy")
    assert processes.metrics(tmp_path / "copy") == processes.metrics(tmp_path)
    assert problems(tmp_path / "copy") == []

    values = np.asarray(load.load_params(output)["embed"]["weight"]).tobytes()
    damaged = next(
        file
        for file in storage.files(output / "checkpoints" / "8" / "params")
        if values in file.read_bytes()
    )
    wrong = bytes(len(values))
    damaged.write_bytes(damaged.read_bytes().replace(values, wrong))
    assert problems(output) != []
    with pytest.raises(ValueError, match=r"gs://bucket/run/checkpoints/8 is damaged: .*step 6"):
        helpers.run(dataclasses.replace(remote, num_steps=9))


def test_what_is_not_there(standin):
    empty = storage.folder(f"{standin}/empty")
    with pytest.raises(ValueError, match="gs://bucket/empty is not a folder"):
        resolve.resolve(empty)
    with pytest.raises(ValueError, match="gs://bucket/empty is no training run"):
        verify.steps(empty)


@pytest.mark.slow
def test_processes_that_share_a_bucket(standin, tmp_path, helpers):
    """Two, then one: the losses of a run on a disk; tokenizer and assets in the bucket, too."""
    helpers.write_text(tmp_path / "text", documents=200)
    helpers.write_tokenizer(tmp_path / "tokenizer")
    storage.copy_tree(tmp_path / "tokenizer", storage.folder(f"{standin}/tokenizer"))
    config = helpers.tiny_config(
        model=dataclasses.replace(helpers.tiny_model(), vocab_size=260, eos_token_ids=(256,)),
        output=f"{standin}/shared",
        num_steps=6,
        checkpoint=CheckpointConfig(every_steps=2, keep=2),
        data=DataConfig(
            paths=(str(tmp_path / "text"),), tokenizer=f"{standin}/tokenizer",
            sequence_length=32, eval_fraction=0.1,
        ),
    )  # fmt: skip
    group = processes.Group(config, tmp_path / "cache", 2, logs=tmp_path / "logs")
    assert group.wait() == {0: 0, 1: 0}, group.said()
    longer = dataclasses.replace(config, num_steps=10)
    log = tmp_path / "log"
    assert processes.start(longer, tmp_path / "cache", log=log).wait() == 0, log.read_text()
    assert "going on from the checkpoint of step 6 in gs://bucket/shared" in log.read_text()

    alone = dataclasses.replace(longer, output=str(tmp_path / "alone"))
    assert processes.start(alone, tmp_path / "cache").wait() == 0
    storage.copy_tree(storage.folder(config.output), tmp_path / "copy")
    steps = [
        {row["step"]: row["loss"] for row in processes.metrics(folder) if row["kind"] == "train"}
        for folder in (tmp_path / "copy", alone.output)
    ]
    assert steps[0] == pytest.approx(steps[1], rel=1e-5) and len(steps[0]) == 10
    assert problems(config.output) == []
    words = tokenizer.load(f"{standin}/shared/assets")
    assert words.fingerprint == tokenizer.load(tmp_path / "tokenizer").fingerprint
