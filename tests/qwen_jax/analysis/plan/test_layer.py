"""What plan says of a layer's tensors, against the tensors that the model itself marks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from configs.models import remat
from qwen_jax.analysis.plan import layer
from qwen_jax.model import transformer
from tests.qwen_jax.analysis.plan.cases import CFG, MOE, planned


def _marked(jaxpr) -> dict[str, int]:
    """Elements of every tensor with a name, of the program and all that it calls."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            (result,) = equation.outvars
            found[equation.params["name"]] = math.prod(result.aval.shape)
        for inner in core.jaxprs_in_params(equation.params):
            found |= _marked(inner)
    return found


@pytest.mark.parametrize("capacity", [None, 1.5])
@pytest.mark.parametrize("cfg", [CFG, MOE], ids=["dense", "experts"])
def test_widths_are_those_of_the_tensors_that_the_model_marks(cfg, capacity):
    if cfg.moe is not None:
        cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, capacity_factor=capacity))
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    run = lambda params, tokens: transformer.apply(cfg, params, tokens).hidden_BTD  # noqa: E731
    marked = _marked(jax.make_jaxpr(run)(transformer.shapes(cfg), tokens).jaxpr)
    widths = layer.tensor_widths(planned("fsdp=1", "cpu-1", cfg=cfg))
    expected = {name for name in remat.TENSORS if cfg.moe or not name.startswith("expert")}
    assert set(marked) == expected
    # Kernels mark their log-sum-exp too, in float32: two elements for each of 4 heads.
    widths["attention_out"] -= 2 * 4
    for name, elements in marked.items():
        assert widths[name] * 512 == elements, name


@pytest.mark.parametrize("cfg", [CFG, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("policy", [*remat.POLICIES, "save:k,v offload:layer_input"])
def test_every_policy_keeps_something_and_full_least(policy, cfg):
    device, host = layer.saved_elements(planned("fsdp=4", cfg=cfg, remat=policy))
    full, _ = layer.saved_elements(planned("fsdp=4", cfg=cfg, remat="full"))
    assert device + host >= full
    assert (host > 0) == ("offload" in policy)


def test_a_layer_of_a_device_shrinks_with_its_axes():
    whole = layer.tensor_widths(planned("fsdp=4", cfg=MOE))
    split = layer.tensor_widths(planned("fsdp=2,tensor=2", cfg=MOE))
    for name in ("q", "k", "v", "attention_out", "mlp_gate", "expert_gate"):
        assert split[name] == whole[name] / 2
    for name in ("layer_input", "attention_residual", "expert_rows"):
        assert split[name] == whole[name]
    # Over experts, a device may get every token of its group: 2 x min(2 choices, 4 experts held).
    assert layer.routed_rows(planned("fsdp=2,expert=2", cfg=MOE)) == 4
    assert layer.routed_rows(planned("expert=4", cfg=MOE)) == 8
