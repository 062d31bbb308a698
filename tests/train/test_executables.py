"""Programs compiled before a run, kept, and refused where they do not fit."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.engine import EngineConfig
from configs.hardware import topologies
from partitioning import mesh, rules
from partitioning.sharding import Layout
from qwen_jax.analysis import ahead_of_time as bundles
from qwen_jax.analysis.plan import job
from qwen_jax.decode import forward, programs, slot_state, weights
from qwen_jax.model import transformer
from train import executables

ROOT = Path(__file__).parents[2]
WHERE = topologies.parse("cpu-1")


@pytest.fixture(scope="module")
def kept(helpers, tmp_path_factory):
    """A bundle of the tiny run's step and evaluation, and the config it is of."""
    config = helpers.tiny_config()
    made = job.make(helpers.tiny_model(), config, WHERE, rows=config.batch_size)
    folder = tmp_path_factory.mktemp("kept") / "bundle"
    executables.check(made, save=str(folder))
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


def test_kept_decoding_draws_the_same_tokens(helpers, tmp_path):
    cfg = helpers.tiny_model()
    config = helpers.tiny_config(batch_size=2)
    made = job.make(cfg, config, WHERE, rows=2, purpose="decode")
    layout = executables.placed(made)
    lowered = executables.lower(cfg, made.config, layout, purpose="decode")
    compiled = {n: bundles.compile_program(one, flags={}) for n, one in lowered.items()}
    key = executables.key(lowered, cfg, made.config, WHERE)
    bundles.save(tmp_path / "bundle", compiled, key)
    advance = bundles.load(tmp_path / "bundle", lowered, key)["advance"]

    dtype = jax.numpy.dtype(made.config.compute_dtype)
    params = weights.prepare(
        cfg, transformer.init(cfg, jax.random.key(0)), dtype=dtype, layout=layout
    )
    width = -(-made.length // 64)

    def start() -> slot_state.State:
        state = slot_state.empty(
            cfg, num_slots=2, width=width, num_pages=2 * width, page_size=64, dtype=dtype,
            layout=layout,
        )  # fmt: skip
        here = jax.NamedSharding(layout.mesh, jax.P())
        table_BM = jax.numpy.arange(2 * width, dtype=np.int32).reshape(2, width)
        changed = {
            "table_BM": table_BM,
            "tokens_B": jax.numpy.array([5, 9], np.int32),
            "remaining_B": jax.numpy.array([99, 3], np.int32),
        }
        slots = dataclasses.replace(state.slots, **jax.device_put(changed, here))
        return slot_state.State(state.pages, slots)

    slots_R = jax.numpy.arange(2, dtype=np.int32)
    mask_RW = jax.numpy.full((2, -(-cfg.vocab_size // 32)), 2**32 - 1, np.uint32)
    eos_E = jax.numpy.full(len(cfg.eos_token_ids), -1, np.int32)
    here = jax.NamedSharding(layout.mesh, jax.P())
    slots_R, mask_RW, eos_E = jax.device_put((slots_R, mask_RW, eos_E), here)
    _, ours = advance(params, start(), slots_R, mask_RW, eos_E=eos_E)
    steps = EngineConfig().decode_steps
    _, theirs = programs.advance(
        cfg, params, start(), slots_R, mask_RW, sampler="greedy", eos_E=eos_E, num_steps=steps,
        layout=layout,
    )  # fmt: skip
    np.testing.assert_array_equal(ours.tokens_B, theirs.tokens_B)
    assert ours.tokens_B.shape == (steps, 2)
    assert (np.asarray(ours.tokens_B) != forward.PAD).sum(axis=0).tolist() == [steps, 3]


def test_what_is_not_here_cannot_be_compiled_for():
    with pytest.raises(ValueError, match=r"cpu-64 has 64 cpu device\(s\), 1 are here.*leave"):
        bundles.devices(topologies.parse("cpu-64"))
    with pytest.raises(ValueError, match=r"h100-8 has 8 gpu device\(s\), 0 are here"):
        bundles.devices(topologies.parse("h100-8"))


@pytest.mark.slow
@pytest.mark.parametrize("purpose", ["train", "eval", "decode"])
def test_the_command_compiles_for_a_pod_and_keeps_it(tmp_path, purpose):
    """What a person types, on a machine without a TPU."""
    command = [
        sys.executable, "-m", "qwen_jax.cli", "plan", "--model", "tiny", "--topology", "v5e-4",
        "--rows", "1", "--length", "256", "--purpose", purpose, "--save", str(tmp_path / "kept"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "120"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    main = {"train": "step", "eval": "evaluate", "decode": "advance"}[purpose]
    assert f"{main}, compiled for v5e-4" in done.stdout and "estimate / compiled" in done.stdout
    key = json.loads((tmp_path / "kept" / bundles.FILE).read_text())
    assert key["slice"] == "v5e-4" and main in key["programs"]
    assert (tmp_path / "kept" / main).stat().st_size > 100_000
