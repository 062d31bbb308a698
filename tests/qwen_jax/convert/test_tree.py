"""The conversion table and the model agree on the parameter tree."""

import pytest

from configs import qwen2_5
from qwen_jax import model
from qwen_jax.convert import table


@pytest.mark.parametrize("name", ["tiny", "tiny-untied", "qwen2.5-0.5b", "qwen2.5-72b"])
def test_shapes_are_the_models(name):
    cfg = qwen2_5.preset(name)
    shapes = {path: leaf.shape for path, leaf in table.flatten(model.shapes(cfg)).items()}
    assert shapes == {row.path: table.shape(row, cfg) for row in table.rows(cfg)}
