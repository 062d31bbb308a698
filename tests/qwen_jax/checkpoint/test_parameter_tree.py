"""The conversion table and the model agree on the parameter tree."""

import dataclasses

import pytest

from configs.models import presets, qwen2_moe
from qwen_jax.checkpoint import tensor_table
from qwen_jax.model import transformer


@pytest.mark.parametrize(
    "name", ["tiny", "tiny-untied", "qwen2.5-0.5b", "qwen2.5-72b", "qwen2-57b-a14b"]
)
def test_shapes_are_the_models(name):
    cfg = presets.preset(name)
    shapes = {
        path: leaf.shape for path, leaf in tensor_table.flatten(transformer.shapes(cfg)).items()
    }
    assert shapes == {row.path: tensor_table.shape(row, cfg) for row in tensor_table.rows(cfg)}


@pytest.mark.parametrize(
    "fields",
    [
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": (0,), "pad_experts_to": 16},
        {"shared_expert_intermediate_size": 0, "bias_update_rate": 1e-3},
    ],
)
def test_shapes_of_other_stacks_are_the_models(fields):
    cfg = qwen2_moe.tiny()
    cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, **fields))
    shapes = {
        path: leaf.shape for path, leaf in tensor_table.flatten(transformer.shapes(cfg)).items()
    }
    assert shapes == {row.path: tensor_table.shape(row, cfg) for row in tensor_table.rows(cfg)}
