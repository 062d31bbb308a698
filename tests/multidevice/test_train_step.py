"""The training step on eight devices is the step on one; checkpoints go from mesh to mesh."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from configs.optimizer import OptimizerConfig
from partitioning import mesh, rules
from partitioning.sharding import Layout
from tests.train import conftest as helpers
from train.core import batches, state, step

CFG = helpers.tiny_model()
# The large eps keeps Adam from dividing gradients that are all rounding by themselves.
ADAM = OptimizerConfig(schedule="constant", warmup_steps=0, eps=1e-3)
CONFIG = helpers.tiny_config(batch_size=16, accumulate_steps=2, optimizer=ADAM)


@dataclass(frozen=True)
class Trained:
    params: dict
    metrics: list[dict]


def program_on(text: str, *, num_devices: int) -> step.Program:
    made = mesh.make(mesh.parse(text), devices=jax.devices()[:num_devices])
    return step.make(CFG, CONFIG, Layout(made, rules.rule_set("train")))


def train(program: step.Program, at: step.State, steps: range) -> tuple[step.State, list[dict]]:
    history = []
    for n in steps:
        rows = batches.place(
            helpers.random_batch(n, 16),
            program.batch_sharding,
            part=batches.Share(index=0, count=1),
        )
        at, values = program.step(at, rows, program.learning_rate(n))
        history.append(jax.device_get(values))
    return at, history


def check_same(params: dict, metrics: list[dict], expected: Trained, *, first: int) -> None:
    for values, wanted in zip(metrics, expected.metrics[first:], strict=True):
        for name in wanted:
            np.testing.assert_allclose(values[name], wanted[name], rtol=2e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6),
        jax.device_get(params),
        expected.params,
    )


@pytest.fixture(scope="module")
def one_device() -> Trained:
    program = program_on("", num_devices=1)
    at, history = train(program, program.init(jax.random.key(0)), range(4))
    return Trained(jax.device_get(at.params), history)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device):
    """Checkpoints of a run on data=2,fsdp=4, after its second step; the run itself is checked."""
    folder = tmp_path_factory.mktemp("run")
    program = program_on("data=2,fsdp=4", num_devices=8)
    at = program.init(jax.random.key(0))
    for leaf, like in zip(jax.tree.leaves(at), jax.tree.leaves(program.state), strict=True):
        assert leaf.sharding == like.sharding
    at, begin = train(program, at, range(2))
    with state.Store(folder, CONFIG.checkpoint, CFG, program.state) as store:
        store.save(2, at, {"rows": 2})
        at, end = train(program, at, range(2, 4))  # donates what is being saved
    check_same(at.params, begin + end, one_device, first=0)
    return folder


def test_each_device_holds_its_slice_of_parameters_and_moments(folder):
    del folder
    like = program_on("data=2,fsdp=4", num_devices=8).state
    kernel = like.params["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 32 // 4, 48)
    for moments in (like.optimizer[1].mu, like.optimizer[1].nu):
        assert moments["layers"]["mlp"]["gate"]["kernel"].sharding == kernel.sharding


@pytest.mark.parametrize(
    "text", ["data=2,fsdp=2,tensor=2", pytest.param("context=4,fsdp=2", marks=pytest.mark.slow)]
)
def test_a_checkpoint_goes_on_on_another_mesh(folder, one_device, text):
    program = program_on(text, num_devices=8)
    with state.Store(folder, CONFIG.checkpoint, CFG, program.state) as store:
        saved = store.restore()
    assert (saved.step, saved.data) == (2, {"rows": 2})
    for leaf, like in zip(
        jax.tree.leaves(saved.state), jax.tree.leaves(program.state), strict=True
    ):
        assert leaf.sharding == like.sharding
    at, history = train(program, saved.state, range(2, 4))
    check_same(at.params, history, one_device, first=2)


def test_one_process_reads_whole_batches():
    where = program_on("data=2,fsdp=4", num_devices=8).batch_sharding
    assert batches.share(where, (16, helpers.LENGTH)) == batches.Share(index=0, count=1)
