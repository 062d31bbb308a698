"""One run from start to end, stopped and gone on with, told to stop, and going wrong."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs.models import architecture
from configs.train import CheckpointConfig
from qwen_jax.analysis import flops
from train.core import guard, loop, state

MEASURED = ("tokens_per_second", "tflops_causal", "tflops_full")


def lines(folder) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def parameters(folder, step: int) -> dict:
    saved = Path(folder, "checkpoints", str(step), "params")
    names = ocp.PyTreeCheckpointHandler().metadata(saved).tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
    return ocp.PyTreeCheckpointer().restore(saved, restore_args=args)


def steps(folder) -> list[int]:
    return sorted(int(path.name) for path in Path(folder, "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of 12 steps that nothing disturbed."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def undisturbed(whole, helpers):
    if not any(whole.iterdir()):
        helpers.run(helpers.tiny_config(output=str(whole), num_steps=12))
    return whole


def test_files_of_a_run(undisturbed):
    rows = lines(undisturbed)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 13))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 4, 8, 12]
    assert steps(undisturbed) == [9, 12]
    assert list((undisturbed / "tensorboard").glob("events*"))
    saved = undisturbed / "checkpoints" / "12"
    assert {path.name for path in saved.iterdir()} >= {"params", "optimizer", "data", "model"}
    model = json.loads((saved / "model" / "metadata").read_text())
    assert model["format"] == 1 and model["step"] == 12
    assert architecture.model_from_dict(model["model"]).name == "test"
    assert json.loads((saved / "data" / "metadata").read_text()) == {"count": 12}


def test_layers_are_stored_one_by_one(undisturbed):
    # So that a layer can be read without the others, however many there are.
    folder = undisturbed / "checkpoints" / "12" / "params"
    metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
    kernel = metadata["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.shape == (2, 32, 48) and kernel.storage.chunk_shape == (1, 32, 48)
    assert metadata["embed"]["weight"].storage.chunk_shape == (64, 32)


def test_stopped_and_gone_on_with_is_bitwise_the_same(undisturbed, tmp_path, helpers):
    config = helpers.tiny_config(output=str(tmp_path), num_steps=12)
    # Step 5 lies between checkpoints, and behind it one more batch than that is on the device.
    helpers.run(dataclasses.replace(config, num_steps=5))
    result = helpers.run(config)
    assert result.status == "finished" and result.step == 12
    # The shorter run ended with an evaluation and a log line of its own; all else is the same.
    again = [row for row in lines(tmp_path) if (row["kind"], row["step"]) != ("eval", 5)]
    for row in again:
        if row["step"] == 5:
            del row["param_norm"]
    assert again == lines(undisturbed)
    jax.tree.map(
        np.testing.assert_array_equal, parameters(tmp_path, 12), parameters(undisturbed, 12)
    )


def test_lines_behind_the_checkpoint_are_dropped(undisturbed, tmp_path, helpers):
    config = helpers.tiny_config(output=str(tmp_path), num_steps=6)
    helpers.run(config)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # as a killed run leaves them
        file.write('{"kind": "train", "step": 7, "loss": 1.0}\n{"kind": "train", "st')
    helpers.run(dataclasses.replace(config, num_steps=12))
    once = [(row["kind"], row["step"]) for row in lines(tmp_path)]
    assert len(once) == len(set(once))
    by_step = {row["step"]: row["loss"] for row in lines(tmp_path) if row["kind"] == "train"}
    assert by_step == {r["step"]: r["loss"] for r in lines(undisturbed) if r["kind"] == "train"}


def test_a_finished_run_stays_finished(undisturbed, helpers):
    before = lines(undisturbed)
    result = helpers.run(helpers.tiny_config(output=str(undisturbed), num_steps=12))
    assert (result.status, result.step, result.exit_code) == ("finished", 12, 0)
    assert result.train["loss"] == before[-2]["loss"]
    assert lines(undisturbed) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.races
def test_a_signal_saves_and_the_run_goes_on(undisturbed, tmp_path, helpers, number):
    config = helpers.tiny_config(output=str(tmp_path), num_steps=12)

    def tell(count):
        if count == 8:  # read ahead of the step that is under way
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    result = helpers.run(config, before=tell)
    assert result.status == "interrupted" and result.exit_code == loop.EXIT_INTERRUPTED != 0
    assert 0 < result.step < 8 and steps(tmp_path)[-1] == result.step
    assert signal.getsignal(number) is handler
    assert helpers.run(config).status == "finished"
    assert lines(tmp_path) == lines(undisturbed)


def test_a_bad_batch_stops_the_run_and_the_checkpoint_before_it_stays(tmp_path, helpers):
    def poison(batch):
        batch["loss_weights"][0, 0] = np.nan
        return batch

    config = helpers.tiny_config(output=str(tmp_path), num_steps=12)
    with pytest.raises(guard.Diverged, match="step 9: .*not finite.*checkpoints/6.*init_from"):
        helpers.run(config, breaks={9: poison})  # a checkpoint is due at 9 itself
    assert steps(tmp_path) == [3, 6]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters(tmp_path, 6)))
    assert lines(tmp_path)[-1]["step"] == 8


def test_a_lasting_spike_stops_the_run_and_is_never_saved(tmp_path, helpers):
    def noise(batch):
        batch["targets"] = np.random.default_rng(0).permutation(batch["targets"].ravel())
        batch["targets"] = batch["targets"].reshape(batch["tokens"].shape)
        return batch

    config = helpers.tiny_config(
        output=str(tmp_path), num_steps=60, spike_factor=1.2, spike_patience=4, eval_every_steps=60,
        log_every_steps=50,
    )  # fmt: skip
    with pytest.raises(guard.Diverged, match="step 43: loss .* running mean"):
        helpers.run(config, breaks=dict.fromkeys(range(40, 61), noise))
    assert steps(tmp_path)[-1] == 39  # 42 was due while the loss was up


def test_the_end_of_the_data_is_said(tmp_path, helpers):
    with pytest.raises(ValueError, match="data ended after 5 steps; set num_steps=5"):
        helpers.run(helpers.tiny_config(output=str(tmp_path)), end=5)


def test_a_checkpoint_of_another_model_is_refused(undisturbed, helpers):
    cfg = dataclasses.replace(helpers.tiny_model(), rope_theta=1e4)
    config = helpers.tiny_config(output=str(undisturbed), num_steps=14)
    with pytest.raises(ValueError, match=r"another model \(rope_theta: 1000000.0 -> 10000.0\)"):
        helpers.run(config, cfg=cfg)


def test_a_full_disk_is_one_clear_error_and_the_checkpoints_before_stay(
    tmp_path, helpers, monkeypatch
):
    config = helpers.tiny_config(output=str(tmp_path), num_steps=9)
    usage = state.shutil.disk_usage
    with monkeypatch.context() as patched:

        def nearly_full(path):
            full = (tmp_path / "checkpoints" / "3").exists()
            return usage(path)._replace(free=1000) if full else usage(path)

        patched.setattr(state.shutil, "disk_usage", nearly_full)
        with pytest.raises(state.DiskFull) as caught:
            helpers.run(config)
    size = 3 * 4 * flops.parameters(helpers.tiny_model())  # parameters and two moments, float32
    assert str(caught.value) == (
        f"no space left (or a limit on the size of files) in {tmp_path} (a checkpoint takes "
        f"{size / 1e9:.3g} GB and 1e-06 GB are free); the checkpoint of step 3 is whole. Free "
        f"space there, or lower checkpoint.keep, and run again to go on"
    )
    assert helpers.run(config).status == "finished"
    assert steps(tmp_path) == [6, 9]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ValueError("OUT_OF_RANGE: Failed to write 72481 bytes to file 32: File too large"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [code='28']"),
    ],
)
def test_a_disk_that_fills_up_meanwhile_is_the_same_error(tmp_path, helpers, monkeypatch, error):
    def fail(store):
        raise RuntimeError("a thread has failed") from error

    monkeypatch.setattr(state.Store, "wait", fail)
    with pytest.raises(state.DiskFull, match="no space left.*no checkpoint exists"):
        helpers.run(helpers.tiny_config(output=str(tmp_path)))


def test_a_profile_is_taken_where_asked(tmp_path, helpers):
    helpers.run(helpers.tiny_config(output=str(tmp_path), num_steps=4, profile_steps=(2, 3)))
    assert list((tmp_path / "tensorboard").rglob("*.xplane.pb"))


def test_kept_checkpoints(tmp_path, helpers):
    keep = CheckpointConfig(every_steps=2, keep=1, keep_every_steps=4)
    helpers.run(helpers.tiny_config(output=str(tmp_path), num_steps=10, checkpoint=keep))
    assert steps(tmp_path) == [4, 8, 10]


def test_the_source_is_closed_whatever_happens(tmp_path, helpers):
    config = helpers.tiny_config(output=str(tmp_path))
    source = helpers.Numbers(4)
    inputs = loop.Inputs(source=source, start=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.run(helpers.tiny_model(), config, helpers.program(config), inputs)
    assert source.closed
