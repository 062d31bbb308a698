"""Quantised weights on 8 devices: placed by the kernels' own axes, and one device's tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs.models import qwen2_5, qwen2_moe
from configs.models.architecture import ModelConfig
from partitioning import mesh as mesh_lib
from partitioning import rules, sharding
from qwen_jax.analysis import quantisation
from qwen_jax.checkpoint import load
from qwen_jax.checkpoint.quantised import quantised_params
from qwen_jax.decode import weights
from qwen_jax.model import transformer
from qwen_jax.quant import array
from tests.support import answers

DENSE = dataclasses.replace(
    qwen2_5.tiny(), vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=16,
)  # fmt: skip
SPARSE = dataclasses.replace(
    DENSE,
    moe=dataclasses.replace(
        qwen2_moe.tiny().moe, num_experts=4, moe_intermediate_size=64,
        shared_expert_intermediate_size=128, mlp_only_layers=(), decoder_sparse_step=1,
    ),
)  # fmt: skip


def drawn(cfg: ModelConfig) -> dict:
    leaves, structure = jax.tree.flatten(transformer.shapes(cfg))
    rng = np.random.default_rng(0)
    return structure.unflatten(
        [jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32) for leaf in leaves]
    )


def tokens(cfg: ModelConfig, params: dict, layout: sharding.Layout | None) -> list[list[int]]:
    engine = answers.engine(cfg, params, layout=layout)
    return answers.greedy(engine, [range(3, 3 + n) for n in (4, 11)], max_tokens=6)


@pytest.mark.parametrize(
    ("cfg", "mesh", "settings"),
    [
        (DENSE, "fsdp=1,tensor=4", quantised_params.Settings(weights="int4", group_size=32)),
        pytest.param(
            SPARSE,
            "fsdp=1,expert=2,tensor=2",
            quantised_params.Settings(),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_checkpoint_decodes_sharded(tmp_path, cfg, mesh, settings):
    quantisation.save(
        cfg,
        quantised_params.quantise(cfg, drawn(cfg), settings),
        tmp_path / "c",
        assets=None,
        source={},
    )
    config = mesh_lib.parse(mesh)
    devices = jax.devices()[: config.expert * config.tensor]
    layout = sharding.Layout(mesh_lib.make(config, devices=devices), rules.rule_set("engine"))
    placed = sharding.shardings(transformer.axes(cfg), layout)
    sharded = load.load_params(tmp_path / "c", shardings=placed)
    o = sharded["layers"]["attention"]["o"]["kernel"]
    assert o.values.sharding.spec == PartitionSpec(None, "tensor", None)
    over = "tensor" if o.num_groups > 1 else None
    assert o.scales.sharding.spec == PartitionSpec(None, over, None)
    whole = load.load_params(tmp_path / "c")
    form = weights.best_form(cfg, dtype=jnp.float32, layout=layout, params=sharded)
    assert form == "fused"
    assert tokens(cfg, sharded, layout) == tokens(cfg, whole, None)
    fused = weights.prepare(cfg, sharded, dtype=jnp.float32, form=form, layout=layout)
    qkv = fused.layers[0]["attention"]["qkv"]["kernel"]
    assert qkv.values.sharding.spec == PartitionSpec(None, "tensor", None, None)


def test_a_cut_group_is_refused(tmp_path):
    settings = quantised_params.Settings(weights="int4", group_size=64)
    quantisation.save(
        DENSE,
        quantised_params.quantise(DENSE, drawn(DENSE), settings),
        tmp_path / "c",
        assets=None,
        source={},
    )
    layout = sharding.Layout(
        mesh_lib.make(mesh_lib.parse("data=2,fsdp=1,tensor=4")), rules.rule_set("engine")
    )
    placed = sharding.shardings(transformer.axes(DENSE), layout)
    with pytest.raises(ValueError, match=r"attention.o.kernel: mesh axis tensor=4 would cut"):
        load.load_params(tmp_path / "c", shardings=placed)
    assert array.is_quantised(
        load.load_params(tmp_path / "c")["layers"]["attention"]["o"]["kernel"]
    )
