"""Checkpoints of a run: what a damaged one says, and what a save takes of the host's memory."""

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import schema
from configs.train import CheckpointConfig
from qwen_jax.checkpoint import tensor_table
from tests.train import conftest as helpers
from tests.train import processes
from train.core import state
from train.core.step import State

CFG = helpers.tiny_model()


def make(step: int) -> State:
    random = np.random.default_rng(step)
    params = tensor_table.nest(
        {
            row.path: jnp.asarray(random.normal(size=tensor_table.shape(row, CFG)), jnp.float32)
            for row in tensor_table.rows(CFG)
        }
    )
    return State(jnp.int32(step), params, {"mu": params})


def open_store(output: Path) -> state.Store:
    return state.Store(output, CheckpointConfig(keep=2), CFG, make(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    output = tmp_path_factory.mktemp("saved")
    with open_store(output) as store:
        for step in (2, 4):
            store.save(step, make(step), {"count": step})
    return output


@pytest.fixture
def run(saved, tmp_path):
    """A run of two checkpoints, 2 and 4, to damage."""
    return shutil.copytree(saved, tmp_path / "run")


def refusal(output: Path) -> str:
    with open_store(output) as store, pytest.raises(ValueError) as caught:
        store.restore()
    return str(caught.value)


def flip(part: str, newest: Path) -> None:
    path = max((newest / part).rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "no params": lambda newest: shutil.rmtree(newest / "params"),
    "no metadata of params": lambda newest: (newest / "params" / "_METADATA").unlink(),
    "no manifest": lambda newest: (newest / "params" / "manifest.ocdbt").unlink(),
    "no values": lambda newest: shutil.rmtree(newest / "params" / "ocdbt.process_0"),
    "no optimizer": lambda newest: shutil.rmtree(newest / "optimizer"),
    "no data": lambda newest: shutil.rmtree(newest / "data"),
    "no data state": lambda newest: (newest / "data" / "metadata").unlink(),
    "no model": lambda newest: shutil.rmtree(newest / "model"),
    "half the model": lambda newest: os.truncate(newest / "model" / "metadata", 100),
    "half the data state": lambda newest: os.truncate(newest / "data" / "metadata", 5),
    "another data state": lambda newest: (newest / "data" / "metadata").write_text('{"count": 3}'),
    "half the manifest": lambda newest: os.truncate(newest / "params" / "manifest.ocdbt", 60),
    "a flipped bit of params": lambda newest: flip("params", newest),
    "a flipped bit of moments": lambda newest: flip("optimizer", newest),
    "an empty folder": lambda newest: (shutil.rmtree(newest), newest.mkdir()),
}


# Orbax leaves the reads of other arrays behind, which complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_an_older_one_can_be_chosen(run, damage):
    newest = run / "checkpoints" / "4"
    DAMAGE[damage](newest)
    said = refusal(run)
    gc.collect()
    assert said.startswith(f"{newest} is damaged: ") and "\n" not in said
    assert said.endswith("remove the folder to go on from the checkpoint of step 2")
    assert newest.is_dir()  # nothing is removed but by a person

    shutil.rmtree(newest)
    with open_store(run) as store:
        restored = store.restore()
        assert (restored.step, restored.data) == (2, {"count": 2})
        jax.tree.map(np.testing.assert_array_equal, restored.state, make(2))
        store.save(4, make(4), {"count": 4})  # and the run goes on
    with open_store(run) as store:
        assert store.restore().step == 4


def test_the_only_checkpoint_damaged(run):
    shutil.rmtree(run / "checkpoints" / "2")
    flip("params", run / "checkpoints" / "4")
    assert refusal(run).endswith("remove the folder to go on from the beginning")


def test_a_newer_format_is_not_called_damaged(run):
    path = run / "checkpoints" / "4" / "model" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    assert "has format 2; this version reads 1" in refusal(run)


SAVE = """
import dataclasses, json, resource, sys, threading, time
from pathlib import Path
import jax
from configs.mesh import MeshConfig
from configs.models import architecture
from configs.train import CheckpointConfig
from partitioning import mesh, rules
from partitioning.sharding import Layout
from tests.train import conftest as helpers
from train.core import state
from train.core import step

cfg = architecture.model_from_dict(json.loads(sys.argv[1]))
layout = Layout(mesh.make(MeshConfig(), devices=jax.devices()[:1]), rules.TRAIN)
program = step.make(cfg, helpers.tiny_config(), layout)
made = jax.block_until_ready(program.init(jax.random.key(0)))
size = sum(leaf.nbytes for leaf in jax.tree.leaves(made))

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

with state.Store(Path(sys.argv[2]), CheckpointConfig(keep=3), cfg, program.state) as store:
    state.checksums(made)  # compiled before memory is looked at
    before, peak, done = resident(), 0, False
    def watch():
        global peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.002)
    watching = threading.Thread(target=watch)
    watching.start()
    for n in (1, 2, 3):  # each waits for the one before it
        store.save(n, made, {})
    store.wait()
    done = True
    watching.join()
print(json.dumps({"state": size, "above": peak - before}))
"""


@pytest.mark.slow
def test_three_saves_need_less_than_one_more_copy_of_the_state(tmp_path):
    cfg = dataclasses.replace(
        CFG, vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    # glibc keeps large blocks that were freed once, and they count as the process's; with a fixed
    # threshold it gives them back, and what is held is measured.
    plain = {**os.environ, "JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", SAVE, json.dumps(schema.to_dict(cfg)), str(tmp_path / "run")],
        cwd=processes.ROOT, env=plain, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["state"] > 400e6
    assert found["above"] < found["state"], found
