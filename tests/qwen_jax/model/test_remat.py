"""What is recomputed changes memory, never numbers."""

import collections
import dataclasses
import functools
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import qwen2_5, qwen2_moe
from configs.models import remat as policies
from configs.models.architecture import ModelConfig
from qwen_jax.model import remat, stack, transformer
from qwen_jax.ops.attention import api, splash

# Every size differs, so that a shape says what it is.
CFG = dataclasses.replace(
    qwen2_5.tiny(),
    vocab_size=64,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
)
B, T = 3, 24
TOKENS = np.random.default_rng(0).integers(0, CFG.vocab_size, (B, T))
SHAPES = {
    "q": (B, T, 6, 10),
    "k": (B, T, 2, 10),
    "v": (B, T, 2, 10),
    "attention_out": (B, T, 6, 10),
    "attention_residual": (B, T, 40),
    "mlp_gate": (B, T, 56),
    "mlp_up": (B, T, 56),
    "mlp_hidden": (B, T, 56),
    "layer_input": (B, T, 40),
}
# Three of twelve experts a token, and a shared one.
MOE = dataclasses.replace(qwen2_moe.tiny(), vocab_size=64, num_hidden_layers=2)
ROWS = -(-B * T * 3 // 16) * 16  # expert_parallel pads them to whole tiles
EXPERT_SHAPES = {"expert_rows": (ROWS, 128), "expert_gate": (ROWS, 96), "expert_up": (ROWS, 96)}
MIXED = "save:q,mlp_hidden offload:attention_out,layer_input"


def _loss(policy: str, layer_loop: str, cfg: ModelConfig = CFG):
    def loss(params):
        options = {"remat_policy": policy, "layer_loop": layer_loop}
        hidden_BTD = transformer.apply(cfg, params, jnp.asarray(TOKENS), **options).hidden_BTD
        return jnp.sum(jnp.sin(hidden_BTD))

    return loss


@functools.cache
def _compiled(policy: str, layer_loop: str):
    step = jax.jit(jax.value_and_grad(_loss(policy, layer_loop)))
    return step.lower(transformer.shapes(CFG)).compile()


@functools.cache
def _kept(policy: str, cfg: ModelConfig = CFG) -> dict[str, collections.Counter]:
    """Shapes of what the scan's backward pass is given for all layers, by the memory they lie in.

    Kept tensors of layers are stacked, so parameters and rotations are told apart by their shape.
    """
    trace = jax.make_jaxpr(lambda params: jax.vjp(_loss(policy, "scan", cfg), params)[1])
    found = {"Device": collections.Counter(), "Host": collections.Counter()}
    for aval in trace(transformer.shapes(cfg)).out_avals:
        if aval.shape[:3] == (2, B, T) or aval.shape[1:] in EXPERT_SHAPES.values():
            found[aval.memory_space.name][aval.shape[1:]] += 1
    return found


@functools.cache
def _params():
    return transformer.init(CFG, jax.random.key(0))


@pytest.mark.parametrize(
    ("policy", "layer_loop"),
    [
        ("none", "unrolled"),
        ("dots", "scan"),
        pytest.param("dots", "unrolled", marks=pytest.mark.slow),
        ("full", "scan"),
        pytest.param("full", "unrolled", marks=pytest.mark.slow),
        ("minimal", "scan"),
        (MIXED, "scan"),
        pytest.param(MIXED, "unrolled", marks=pytest.mark.slow),
        *(
            pytest.param(name, "scan", marks=pytest.mark.slow)
            for name in policies.LISTS
            if name not in ("full", "minimal")
        ),
    ],
)
def test_every_policy_gives_the_same_loss_and_gradients(policy, layer_loop):
    want_loss, want = _compiled("none", "scan")(_params())
    loss, got = _compiled(policy, layer_loop)(_params())
    assert float(loss) == pytest.approx(float(want_loss), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(ours - theirs) < 2e-6 * np.linalg.norm(theirs)


def test_policies_keep_less_and_less():
    kept = [
        _compiled(policy, "scan").memory_analysis().temp_size_in_bytes
        for policy in ("none", "dots", "full")
    ]
    assert kept[0] > kept[1] > kept[2]


def test_full_keeps_the_layers_input_alone():
    assert _kept("full") == {"Device": {SHAPES["layer_input"]: 1}, "Host": {}}


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "layer_input"])
def test_every_tensor_can_be_kept_on_either_side(name):
    one = collections.Counter([SHAPES[name]])
    assert _kept(f"save:{name}") == {"Device": _kept("full")["Device"] + one, "Host": {}}
    assert _kept(f"offload:{name}") == {"Device": _kept("full")["Device"], "Host": one}


@pytest.mark.parametrize("name", EXPERT_SHAPES)
def test_what_experts_read_and_make_can_be_kept(name):
    one = collections.Counter([EXPERT_SHAPES[name]])
    device = _kept("full", MOE)["Device"]
    assert _kept(f"save:{name}", MOE) == {"Device": device + one, "Host": {}}
    assert _kept(f"offload:{name}", MOE) == {"Device": device, "Host": one}


def test_products_of_experts_are_products():
    got = _kept("dots", MOE)["Device"]
    assert got[EXPERT_SHAPES["expert_gate"]] == 2 and not got[EXPERT_SHAPES["expert_rows"]]


def test_every_tensor_is_tried_here():
    assert {*SHAPES, *EXPERT_SHAPES} == set(policies.TENSORS)


def test_the_layers_input_leaves_the_device():
    assert _kept("offload:layer_input") == {"Device": {}, "Host": {SHAPES["layer_input"]: 1}}


@pytest.mark.parametrize("policy", policies.LISTS)
def test_a_named_list_keeps_what_it_says(policy):
    chosen = policies.tensors(policy)
    device = {*chosen.save, "layer_input"} - {*chosen.offload}
    assert _kept(policy) == {
        "Device": collections.Counter(SHAPES[name] for name in device if name in SHAPES),
        "Host": collections.Counter(SHAPES[name] for name in chosen.offload if name in SHAPES),
    }


@pytest.mark.parametrize(
    ("policy", "runs"), [("full", 2), ("dots", 1), ("save_attention", 1), ("offload_minimal", 1)]
)
def test_the_flash_kernel_runs_again_only_where_its_output_is_not_kept(policy, runs):
    """Splash, in the traced program; XLA removes the calls of which nothing is read."""

    def attend(x_BTNH):
        mask = api.Mask(causal=True)
        return splash.attention(jnp.sin(x_BTNH), x_BTNH, x_BTNH, mask=mask, interpret=True)

    layer = remat.wrap(attend, policy)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(layer(x))))
    jaxpr = jax.make_jaxpr(gradient)(jnp.ones((1, 128, 1, 128)))
    assert _forward_kernels(jaxpr.jaxpr) == runs


def _forward_kernels(jaxpr) -> int:
    """Forward kernels of which something is read."""
    found = 0
    read = {id(v) for e in jaxpr.eqns for v in e.invars} | {id(v) for v in jaxpr.outvars}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            forward = re.match("splash_mha_fwd", str(equation.params["name"]))
            found += bool(forward) and any(id(v) in read for v in equation.outvars)
            continue
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += _forward_kernels(inner)
    return found


def test_unrolled_layers_are_held_to_the_policy():
    """But for `dots`, no recomputation may be merged with the forward pass."""
    for policy, held in (("full", True), ("minimal", True), ("dots", False)):
        loss = jax.grad(_loss(policy, "unrolled"))
        text = jax.jit(loss).lower(transformer.shapes(CFG)).as_text()
        assert ("optimization_barrier" in text) == held, policy


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown remat policy 'some'; known: none, dots, full"):
        remat.wrap(lambda x: x, "some")
    with pytest.raises(ValueError, match="unknown layer_loop 'rolled'; known: scan, unrolled"):
        stack.run(CFG, {}, {}, 0, layer_loop="rolled")
