"""Programs compiled before a run, kept, and refused where they do not fit."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.hardware import topologies
from partitioning import mesh, rules
from partitioning.sharding import Layout
from qwen_jax.analysis import ahead_of_time as bundles
from qwen_jax.analysis.plan import job
from qwen_jax.cli import compose
from train import executables

WHERE = topologies.parse("cpu-1")


@pytest.fixture(scope="module")
def kept(helpers, tmp_path_factory):
    """A bundle of the tiny run's step and evaluation, and the config it is of."""
    config = helpers.tiny_config()
    made = job.make(helpers.tiny_model(), config, WHERE, rows=config.batch_size)
    folder = tmp_path_factory.mktemp("kept") / "bundle"
    compose.compile_job(made, save=str(folder))
    return folder, config


def _layout(config) -> Layout:
    return Layout(mesh.make(config.mesh, devices=jax.devices()[:1]), rules.TRAIN)


def with_bundle(helpers, config, folder):
    config = dataclasses.replace(config, executables=str(folder))
    program = helpers.program(dataclasses.replace(config, executables=""))
    return executables.with_bundle(program, helpers.tiny_model(), config, _layout(config))


def test_a_kept_step_does_what_a_compiled_one_does(helpers, kept):
    folder, config = kept
    # Another rate and schedule: they are inputs.
    other = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, peak_learning_rate=1e-2, warmup_steps=0),
    )
    plain = helpers.program(other)
    program = with_bundle(helpers, other, folder)
    assert isinstance(program.step, jax.stages.Compiled)
    rows = helpers.random_batch(0, config.batch_size)
    rows = jax.device_put(rows, plain.batch_sharding)
    ours, values = program.step(plain.init(jax.random.key(0)), rows, program.learning_rate(0))
    theirs, expected = plain.step(plain.init(jax.random.key(0)), rows, plain.learning_rate(0))
    assert float(values["learning_rate"]) == pytest.approx(1e-2)
    jax.tree.map(np.testing.assert_array_equal, (ours, values), (theirs, expected))
    jax.tree.map(
        np.testing.assert_array_equal,
        program.evaluate(ours.params, rows),
        plain.evaluate(theirs.params, rows),
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"remat": "full"}, "config.remat: 'none' -> 'full'"),
        ({"loss_chunk": 16}, "config.loss_chunk: 8 -> 16"),
        ({"batch_size": 8}, "config.batch_size: 4 -> 8"),
    ],
)
def test_a_bundle_of_another_config_is_refused(helpers, kept, changes, said):
    folder, config = kept
    with pytest.raises(ValueError, match=f"was not compiled for this run .*{said}"):
        with_bundle(helpers, dataclasses.replace(config, **changes), folder)


def _damage(folder: Path, target: Path, **changes) -> Path:
    """A copy of the bundle with parts of its key replaced."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    key = json.loads((target / bundles.FILE).read_text())
    (target / bundles.FILE).write_text(json.dumps(key | changes))
    return target


def test_a_bundle_of_other_versions_code_or_slice_is_refused(helpers, kept, tmp_path):
    folder, config = kept
    key = json.loads((folder / bundles.FILE).read_text())
    for number, (changes, said) in enumerate(
        (
            ({"versions": key["versions"] | {"jax": "0.0.1"}}, "versions.jax: '0.0.1' -> "),
            ({"programs": key["programs"] | {"step": "0"}}, "the code has changed since"),
            ({"flags": {"xla_some_flag": True}}, "flags.xla_some_flag: True -> None"),
            ({"slice": "cpu-8"}, "compiled for cpu-8, 8 devices; this run has 1"),
            ({"format": 0}, "is not of format 1"),
        )
    ):
        changed = _damage(folder, tmp_path / str(number), **changes)
        with pytest.raises(ValueError, match=said):
            with_bundle(helpers, config, changed)


def test_a_bundle_that_is_not_whole_is_refused(helpers, kept, tmp_path):
    folder, config = kept
    with pytest.raises(ValueError, match="is no bundle: it has no bundle.json"):
        with_bundle(helpers, config, tmp_path)
    cut = _damage(folder, tmp_path / "cut")
    (cut / "step").write_bytes((cut / "step").read_bytes()[:1000])
    with pytest.raises(ValueError, match="step cannot be loaded"):
        with_bundle(helpers, config, cut)
    (cut / "step").unlink()
    with pytest.raises(ValueError, match="step cannot be loaded"):
        with_bundle(helpers, config, cut)


def test_nothing_is_written_over(kept):
    folder, _ = kept
    with pytest.raises(ValueError, match="is there already; remove it, or save to another"):
        bundles.save(folder, {}, {})


def test_what_is_not_here_cannot_be_compiled_for():
    with pytest.raises(ValueError, match=r"cpu-64 has 64 cpu device\(s\), 1 are here.*leave"):
        bundles.devices(topologies.parse("cpu-64"))
    with pytest.raises(ValueError, match=r"h100-8 has 8 gpu device\(s\), 0 are here"):
        bundles.devices(topologies.parse("h100-8"))
