"""The output kernel's gradient on eight devices is that of one, in either of its ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partitioning import sharding
from tests.multidevice import cases, hlo
from train.losses import language_model

B, T, V = 8, 16, 48
PIECES, SUM = 1024, 256  # hidden sizes; the former's pieces are two


def _loss(hidden_BTD, kernel_DV, targets_BT, weights_BT, *, layout):
    sums = language_model.cross_entropy(
        hidden_BTD, kernel_DV, targets_BT, weights_BT, z_loss=1e-3, chunk=3, layout=layout
    )
    return 0.37 * sums.loss


def _inputs(width, layout):
    random = np.random.default_rng(0)
    values = (
        (random.normal(size=(B, T, width)), np.float32, ("batch", "length", None)),
        (random.normal(size=(width, V)) * (8 / width) ** 0.5, np.float32, ("embed", "vocab")),
        (random.integers(0, V, (B, T)), np.int32, ("batch", "length")),
        (random.integers(0, 3, (B, T)), np.float32, ("batch", "length")),
    )
    arrays = [(jnp.asarray(x, dtype), axes) for x, dtype, axes in values]
    if layout is None:
        return [x for x, _ in arrays]
    place = functools.partial(sharding.spec, layout=layout)
    return [jax.device_put(x, jax.NamedSharding(layout.mesh, place(axes))) for x, axes in arrays]


@pytest.mark.parametrize("width", [PIECES, SUM])
@pytest.mark.parametrize(
    "mesh",
    ["fsdp=8", "data=2,fsdp=4", "fsdp=4,tensor=2", "fsdp=2,context=4", "expert=2,fsdp=4", "data=8"],
)
def test_the_gradients_of_one_device(mesh, width):
    layout = cases.layout(mesh)
    run = jax.jit(jax.value_and_grad(_loss, argnums=(0, 1)), static_argnames="layout")
    inputs = _inputs(width, layout)
    got, gradients = run(*inputs, layout=layout)
    want, wanted = run(*_inputs(width, None), layout=None)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for ours, theirs, of in zip(gradients, wanted, inputs, strict=False):
        assert ours.sharding.is_equivalent_to(of.sharding, of.ndim)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "looped"), [(PIECES, True), (SUM, False)])
def test_pieces_meet_one_by_one(width, looped):
    """No device holds the whole gradient where it is had in pieces."""
    layout = cases.layout("fsdp=8")
    gradient = jax.jit(jax.grad(functools.partial(_loss, layout=layout), argnums=(0, 1)))
    program = hlo.compile_and_read(gradient.lower(*_inputs(width, layout)), layout.mesh)
    scattered = [c for c in program.collectives if c.kind == "reduce-scatter"]
    assert [c.looped for c in scattered] == [looped]
    assert scattered[0].shape == (64 if looped else width // 8, V)
