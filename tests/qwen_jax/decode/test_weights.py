"""Parameters for decoding: their forms, their dtypes, and what is left of the old arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import qwen2_5, qwen2_moe
from partitioning import mesh, rules, sharding
from qwen_jax.checkpoint.quantised import quantised_params
from qwen_jax.decode import weights
from qwen_jax.model import stack, transformer
from qwen_jax.quant import array

SMALL = dataclasses.replace(qwen2_5.tiny(), num_hidden_layers=3)
# Experts in every second layer: two stacks.
MIXED = dataclasses.replace(
    qwen2_moe.tiny(),
    num_hidden_layers=3,
    moe=dataclasses.replace(qwen2_moe.tiny().moe, decoder_sparse_step=2, mlp_only_layers=()),
)


def test_prepare_consumes_and_refuses():
    params = transformer.init(SMALL, jax.random.key(0))
    embed, kernel = params["embed"]["weight"], params["layers"]["mlp"]["gate"]["kernel"]
    result = weights.prepare(SMALL, params, dtype=jnp.bfloat16, form="fused")
    assert kernel.is_deleted() and embed.is_deleted()
    assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype(jnp.bfloat16)}
    assert len(result["layers"]) == SMALL.num_hidden_layers
    again = transformer.init(SMALL, jax.random.key(0))
    with pytest.raises(ValueError, match="unknown form 'stacked'; known: unstacked, fused, words"):
        weights.prepare(SMALL, again, dtype=jnp.float32, form="stacked")


def test_routers_stay_in_float32():
    params = transformer.init(MIXED, jax.random.key(0))
    prepared = weights.prepare(MIXED, params, dtype=jnp.bfloat16)
    sparse = prepared["layers"][1]["moe"]
    assert sparse["router"]["kernel"].dtype == jnp.float32
    assert sparse["experts"]["up"]["kernel"].dtype == jnp.bfloat16
    assert "mlp" in prepared["layers"][0] and "mlp" in prepared["layers"][2]


@pytest.mark.parametrize("cfg", [SMALL, MIXED], ids=["dense", "experts"])
def test_words_are_the_fused_matrices(cfg):
    def prepared(form: weights.Form) -> dict:
        params = quantised_params.quantise(
            cfg, transformer.init(cfg, jax.random.key(0)), quantised_params.Settings()
        )
        return weights.prepare(cfg, params, dtype=jnp.bfloat16, form=form)

    fused, words = prepared("fused"), prepared("words")
    compared = 0
    is_leaf = {"is_leaf": array.is_quantised}
    for a, b in zip(
        jax.tree.leaves(fused, **is_leaf), jax.tree.leaves(words, **is_leaf), strict=True
    ):
        if array.is_quantised(a) and b.is_words:
            a, b = (array.dequantise(x, dtype=jnp.float32) for x in (array.in_words(a), b))
            compared += 1
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)
    dense = [name for name in stack.order(cfg) if "dense" in name or cfg.moe is None]
    assert compared >= 4 * len(dense) + 1


@pytest.mark.parametrize("cfg", [SMALL, MIXED], ids=["dense", "experts"])
@pytest.mark.parametrize("form", ["unstacked", "fused"])
def test_shapes_are_those_of_what_is_prepared(cfg, form):
    layout = sharding.Layout(mesh.make(mesh.parse("fsdp=1")), rules.rule_set("engine"))
    options = {"dtype": jnp.dtype("bfloat16"), "form": form, "layout": layout}
    made = weights.prepare(cfg, transformer.init(cfg, jax.random.key(0)), **options)
    told = weights.shapes(cfg, **options)
    assert jax.tree.structure(told) == jax.tree.structure(made)
    for ours, theirs in zip(jax.tree.leaves(told), jax.tree.leaves(made), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_a_fused_kernel_is_not_made_where_heads_lie_otherwise_than_kv_heads():
    def layout(text: str) -> sharding.Layout:
        config = mesh.parse(text)
        chosen = rules.rule_set("engine", kv_heads=config.kv_heads)
        return sharding.Layout(mesh.abstract(config), chosen)

    assert weights.best_form(layout("tensor=2")) == "fused"
    assert weights.best_form(layout("tensor=4,kv_heads=replicated")) == "unstacked"
