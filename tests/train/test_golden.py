"""Twenty steps of training, kept as numbers: a change of the curve is reviewed, never missed.

QWEN_JAX_UPDATE_GOLDEN=1 writes the file anew.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

GOLDEN = Path(__file__).parent.parent / "golden" / "loss_curves.json"


@pytest.mark.takes(30, "compiles a training step twice")
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_loss_curve_of_twenty_steps(helpers, remat):
    config = helpers.tiny_config(remat=remat, z_loss=1e-4)
    program = helpers.program(config)
    state = program.init(jax.random.key(0))
    losses = []
    for number in range(20):
        batch = helpers.random_batch(number, config.batch_size)
        state, values = program.step(state, batch, program.learning_rate(number))
        losses.append(float(values["loss"]))
    if os.environ.get("QWEN_JAX_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"tiny, float32": [round(x, 6) for x in losses]}, indent=1))
    (want,) = json.loads(GOLDEN.read_text()).values()
    assert losses[-1] < losses[0] - 0.5, "it learns"
    # Other versions of XLA may order sums differently; float32 keeps that below 1e-4 here.
    np.testing.assert_allclose(losses, want, rtol=1e-4)
