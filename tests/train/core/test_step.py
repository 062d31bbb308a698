"""The jitted step: accumulation is the full batch, bad gradients change nothing, sharded state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.optimizer import OptimizerConfig
from train.core import batches, loop


def put(program, batch):
    return batches.place(batch, program.batch_sharding, part=batches.Share(index=0, count=1))


def take(helpers, config, *, steps=1, batch=None):
    program = helpers.program(config)
    state = program.init(jax.random.key(0))
    for n in range(steps):
        rows = batch if batch is not None else helpers.random_batch(n, config.batch_size)
        state, values = program.step(state, put(program, rows), program.learning_rate(n))
    return jax.device_get((state, values))


def test_accumulation_is_the_full_batch(helpers):
    # The micro-batches carry unequal numbers of tokens: means of means would differ.
    # The large eps keeps Adam from dividing gradients that are all rounding by themselves.
    adam = OptimizerConfig(schedule="constant", warmup_steps=0, eps=1e-3)
    config = helpers.tiny_config(batch_size=8, optimizer=adam)
    batch = helpers.random_batch(3, 8)
    batch["loss_weights"][::2, 2:] = 0
    split = dataclasses.replace(config, accumulate_steps=4)
    whole, whole_values = take(helpers, config, batch=batch)
    parts, parts_values = take(helpers, split, batch=batch)
    for name in ("loss", "cross_entropy", "accuracy", "grad_norm", "tokens"):
        np.testing.assert_allclose(parts_values[name], whole_values[name], rtol=2e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8),
        parts.optimizer,
        whole.optimizer,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
        parts.params,
        whole.params,
    )


def test_metrics_of_a_step(helpers):
    config = helpers.tiny_config()
    batch = helpers.random_batch(0, 4)
    state, values = take(helpers, config, batch=batch)
    assert values["tokens"] == batch["loss_weights"].sum()
    assert values["loss"] == pytest.approx(np.log(64), rel=0.05)  # random weights know nothing
    assert values["learning_rate"] == pytest.approx(1.5e-3)  # half-way through two warm-up steps
    assert values["finite"] == 1 and state.step == 1
    assert all(value.dtype == np.float32 and value.shape == () for value in values.values())


def test_loss_falls(helpers):
    _, values = take(helpers, helpers.tiny_config(), steps=30)
    assert values["loss"] < 3.0


def test_a_gradient_that_is_not_finite_changes_nothing(helpers):
    config = helpers.tiny_config()
    program = helpers.program(config)
    rate = program.learning_rate(0)
    state, _ = program.step(
        program.init(jax.random.key(0)), put(program, helpers.random_batch(0, 4)), rate
    )
    before = jax.device_get(state)
    bad = helpers.random_batch(1, 4)
    bad["loss_weights"][0, 0] = np.inf
    state, values = program.step(state, put(program, bad), rate)
    after = jax.device_get(state)
    assert values["finite"] == 0
    jax.tree.map(np.testing.assert_array_equal, after, before)
    state, values = program.step(state, put(program, helpers.random_batch(2, 4)), rate)
    assert values["finite"] == 1 and state.step == 2


def test_bfloat16_step_stays_close_to_float32(helpers):
    config = helpers.tiny_config()
    _, exact = take(helpers, config, steps=5)
    state, rough = take(
        helpers, dataclasses.replace(config, compute_dtype="bfloat16", remat="full"), steps=5
    )
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.01)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))


def test_adopting_parameters_is_a_fresh_optimizer_over_them(helpers):
    program = helpers.program(helpers.tiny_config())
    born = program.init(jax.random.key(0))
    adopted = program.adopt(jax.tree.map(jnp.copy, born.params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(adopted), jax.device_get(born))


def test_abstract_state_is_the_state(helpers):
    program = helpers.program(helpers.tiny_config())
    state = program.init(jax.random.key(0))
    jax.tree.map(
        lambda like, leaf: (
            (like.shape, like.dtype, like.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)
            or pytest.fail(f"{like} is not {leaf}")
        ),
        program.state,
        state,
    )


def test_a_batch_that_does_not_divide_is_refused(helpers, monkeypatch):
    from partitioning.sharding import Layout
    from train.core import step

    sizes = {"batch": 4, "length": 3}
    monkeypatch.setattr(Layout, "size", lambda self, logical: sizes.get(logical, 1))
    program = helpers.program(helpers.tiny_config())
    layout = Layout(program.batch_sharding.mesh, step.sharding.rules_lib.TRAIN)
    config = helpers.tiny_config(batch_size=4, accumulate_steps=2)
    with pytest.raises(ValueError, match="micro-batch of 2 .* multiple of 8"):
        step.check_batch(config, layout)
    with pytest.raises(ValueError, match="sequence length 16 .* context=3"):
        step.check_batch(helpers.tiny_config(batch_size=4), layout)


def test_evaluation_weighs_tokens_not_batches(helpers):
    program = helpers.program(helpers.tiny_config())
    params = program.init(jax.random.key(0)).params
    full, nearly_empty = helpers.random_batch(1, 4), helpers.random_batch(2, 4)
    nearly_empty["loss_weights"][:] = 0
    nearly_empty["loss_weights"][2, 5] = 1
    empty = {**nearly_empty, "loss_weights": np.zeros_like(full["loss_weights"])}

    def evaluated(*rows):
        return loop.evaluate(program, params, rows, put=lambda batch: put(program, batch))

    apart = [evaluated(full), evaluated(nearly_empty)]
    together = evaluated(full, nearly_empty, empty)
    tokens = [values["tokens"] for values in apart]
    assert tokens == [full["loss_weights"].sum(), 1]
    for name in ("loss", "cross_entropy", "accuracy"):
        expected = sum(v[name] * n for v, n in zip(apart, tokens, strict=True)) / sum(tokens)
        assert together[name] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="no token to evaluate"):
        evaluated(empty)


def test_z_loss_is_in_the_loss_and_not_in_the_cross_entropy(helpers):
    plain, with_z = (helpers.program(helpers.tiny_config(z_loss=z)) for z in (0.0, 0.1))
    params = plain.init(jax.random.key(0)).params
    batch = put(plain, helpers.random_batch(0, 4))
    expected, sums = plain.evaluate(params, batch), with_z.evaluate(params, batch)
    np.testing.assert_allclose(sums.metrics["cross_entropy"], expected.loss, rtol=1e-6)
    assert sums.loss > expected.loss + 0.5 * sums.weight  # 0.1 log(64)^2 = 1.7 a token
