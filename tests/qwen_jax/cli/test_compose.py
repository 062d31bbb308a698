"""Programs of a plan: lowered by training or by the engine, compiled, and kept."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.data import DataConfig
from configs.engine import EngineConfig
from configs.hardware import topologies
from configs.models import qwen2_5
from configs.train import TrainConfig
from qwen_jax.analysis import ahead_of_time as bundles
from qwen_jax.analysis.plan import job
from qwen_jax.cli import compose
from qwen_jax.decode import forward, programs, slot_state, weights
from qwen_jax.model import transformer
from train import executables

ROOT = Path(__file__).parents[3]
WHERE = topologies.parse("cpu-1")


def test_kept_decoding_draws_the_same_tokens(tmp_path):
    cfg = dataclasses.replace(qwen2_5.tiny(), num_hidden_layers=2)
    config = TrainConfig(compute_dtype="float32", data=DataConfig(sequence_length=16))
    made = job.make(cfg, config, WHERE, rows=2, purpose="decode")
    layout = bundles.layout(WHERE, made.config.mesh, kind="engine")
    lowered = compose.lower(made)
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
    _, ours = advance(weights=params, state=start(), slots_R=slots_R, mask_RW=mask_RW, eos_E=eos_E)
    steps = EngineConfig().decode_steps
    _, theirs = programs.advance(
        cfg, params, start(), slots_R, mask_RW, sampler="greedy", eos_E=eos_E, num_steps=steps,
        layout=layout,
    )  # fmt: skip
    np.testing.assert_array_equal(ours.tokens_B, theirs.tokens_B)
    assert ours.tokens_B.shape == (steps, 2)
    assert (np.asarray(ours.tokens_B) != forward.PAD).sum(axis=0).tolist() == [steps, 3]


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
