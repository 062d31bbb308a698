"""The training step on 8 fake devices is the step on one; checkpoints go from mesh to mesh.

The devices exist in a process of their own: JAX fixes their number when it starts.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import dataclasses, importlib.util, pathlib, sys, warnings

warnings.simplefilter("error")
import jax
import numpy as np

from configs import schema
from partitioning import mesh, rules
from partitioning.sharding import Layout
from train import batches, state as state_lib, step

path = pathlib.Path("tests/train/conftest.py")
spec = importlib.util.spec_from_file_location("helpers", path)
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)

cfg = helpers.tiny_model()
# The large eps keeps Adam from dividing gradients that are all rounding by themselves.
adam = schema.Optimizer(schedule="constant", warmup_steps=0, eps=1e-3)
config = helpers.tiny_config(batch_size=16, accumulate_steps=2, optimizer=adam)
folder = pathlib.Path(sys.argv[1])


def train(sizes, *, devices, steps, restore=False):
    layout = Layout(mesh.make(sizes, devices=devices), rules.rule_set("train"))
    program = step.make(cfg, config, layout)
    with state_lib.Store(folder, config.checkpoint, cfg) as store:
        if restore:
            saved = store.restore(program.state)
            assert (saved.step, saved.data) == (2, {"rows": 2})
            state = saved.state
        else:
            state = program.init(jax.random.key(0))
        for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True):
            assert leaf.sharding == like.sharding, (leaf.sharding, like.sharding)
        part = batches.share(program.batch_sharding, (16, helpers.LENGTH))
        assert (part.index, part.count) == (0, 1)
        history = []
        for n in steps:
            rows = batches.place(helpers.random_batch(n, 16), program.batch_sharding, parts=1)
            state, values = program.step(state, rows)
            history.append(jax.device_get(values))
            if n == 1 and not restore and len(devices) > 1:
                store.save(2, state, {"rows": 2})
                store.wait()
    return jax.device_get(state.params), history, program


def same(got, expected):
    (params, history, _), (expected_params, expected_history, _) = got, expected
    for values, wanted in zip(history, expected_history, strict=True):
        for name in wanted:
            np.testing.assert_allclose(values[name], wanted[name], rtol=2e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6), params, expected_params
    )


one = train(schema.Mesh(fsdp=1), devices=jax.devices()[:1], steps=range(4))
many = train(schema.Mesh(data=2, fsdp=4), devices=jax.devices(), steps=range(4))
same(many, one)
# ZeRO-3: a device holds a quarter of each matrix and of its moments.
gate = many[2].state.params["layers"]["mlp"]["gate"]["kernel"]
assert gate.sharding.shard_shape(gate.shape) == (2, 8, 48)
moment = many[2].state.optimizer[1].nu["layers"]["mlp"]["gate"]["kernel"]
assert moment.sharding == gate.sharding

onward = schema.Mesh(data=2, fsdp=2, tensor=2)
other = train(onward, devices=jax.devices(), steps=range(2, 4), restore=True)
same(other, (one[0], one[1][2:], None))
print("the same")
"""


def test_steps_on_eight_devices_are_the_steps_on_one(tmp_path):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "the same" in done.stdout, done.stdout + done.stderr
