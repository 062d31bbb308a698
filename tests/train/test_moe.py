"""Training a model with experts: its losses, its metrics, its bias, and split batches."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs.mesh import MeshConfig
from configs.models.architecture import ModelConfig, MoEConfig
from configs.train import CheckpointConfig
from partitioning import mesh, rules
from partitioning.sharding import Layout
from tests.train import conftest as helpers
from train.core import state as state_lib
from train.core import step

MOE = MoEConfig(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
    router_aux_loss_coef=0.1,
    router_z_loss=0.01,
    load_balance="sequence",
    bias_update_rate=0.25,
)
CFG = dataclasses.replace(helpers.tiny_model(), moe=MOE)
ONE = Layout(mesh.make(MeshConfig(), devices=jax.devices()[:1]), rules.TRAIN)


@functools.cache
def program(cfg: ModelConfig = CFG, *, accumulate_steps: int = 1) -> step.Program:
    return step.make(cfg, helpers.tiny_config(accumulate_steps=accumulate_steps), ONE)


def after_one(made: step.Program, batch=None) -> tuple[step.State, dict]:
    rows = helpers.random_batch(0, 4) if batch is None else batch
    state, metrics = made.step(made.init(jax.random.key(0)), rows, made.learning_rate(0))
    return jax.device_get(state), jax.device_get(metrics)


@pytest.fixture(scope="module")
def plain():
    return after_one(program())


def test_the_loss_is_cross_entropy_and_the_routers_losses(plain):
    _, metrics = plain
    extra = 0.1 * metrics["router_balance"] + 0.01 * metrics["router_z"]
    assert metrics["loss"] == pytest.approx(metrics["cross_entropy"] + extra, rel=1e-6)
    assert metrics["router_balance"] >= 2.0 - 0.2 and metrics["router_dropped"] == 0
    assert 1 <= metrics["router_imbalance"] <= metrics["router_imbalance_worst"] <= 3.0
    assert 0 < metrics["router_entropy"] <= np.log(6)


def test_a_split_batch_makes_the_same_step_with_losses_of_sequences(plain):
    batch = helpers.random_batch(0, 4)
    batch["loss_weights"][:] = 1  # as much weight in each part
    whole = after_one(program(), batch)
    split = after_one(program(accumulate_steps=2), batch)
    for name in ("loss", "router_balance", "router_z", "router_entropy", "grad_norm"):
        assert split[1][name] == pytest.approx(whole[1][name], rel=1e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5),
        split[0].params,
        whole[0].params,
    )


def test_the_bias_is_moved_by_the_load_of_the_whole_batch_and_saved(tmp_path):
    made = program(accumulate_steps=2)
    state, _ = made.step(
        made.init(jax.random.key(0)), helpers.random_batch(0, 4), made.learning_rate(0)
    )
    bias_LE = np.asarray(state.params["layers"]["moe"]["router"]["bias"])
    sums = made.evaluate(made.init(jax.random.key(0)).params, helpers.random_batch(0, 4))
    load_LE = np.asarray(sums.router_load_LE)
    assert load_LE.sum() == 2 * 4 * helpers.LENGTH * 2
    np.testing.assert_array_equal(bias_LE, 0.25 * np.sign(load_LE.mean(1)[:, None] - load_LE))
    with state_lib.Store(tmp_path, CheckpointConfig(), CFG, made.state) as store:
        store.save(1, state, {})
        restored = store.restore()
    np.testing.assert_array_equal(restored.state.params["layers"]["moe"]["router"]["bias"], bias_LE)


def test_the_router_computes_in_float32_whatever_the_rest(plain):
    params = plain[0].params
    copy = step.compute_copy(params, np.dtype("bfloat16"))["layers"]["moe"]
    assert copy["router"]["kernel"].dtype == np.float32
    assert (
        copy["experts"]["up"]["kernel"].dtype == copy["shared_gate"]["kernel"].dtype != np.float32
    )


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global_batch", "sequence"])
def test_the_balance_loss_evens_the_load(scope):
    moe = dataclasses.replace(MOE, router_aux_loss_coef=1.0, load_balance=scope)
    made = program(dataclasses.replace(CFG, moe=moe))
    state, history = made.init(jax.random.key(1)), []
    for n in range(20):
        state, metrics = made.step(state, helpers.random_batch(n, 4), made.learning_rate(n))
        history.append(float(metrics["router_balance"]))
    assert history[-1] < history[0] and history[-1] == pytest.approx(2.0, abs=0.1)
