"""Experts on eight devices: the numbers of one device, by the expected collectives.

Of a layer with experts, with every layer recomputed in the backward pass; what is sent under
`shard_map` has the empty scope:

fsdp    the experts' three matrices are gathered forward and again backward, and their gradients
        reduce-scattered; then summed over what is left of the batch's axes (`data` alone: an expert
        is on one device of the axis `expert`). Router and shared expert are as the other matrices,
        which `expert` splits as `fsdp` does.
tensor  one all-reduce more than a dense layer: the routed experts' sum. Backward: the gradients of
        the tokens sent, and of their weights.
expert, dropless    tokens, weights and choices are gathered, forward and again backward, and the
        sums reduce-scattered; backward, the gradient of the sums is gathered, those of tokens and
        weights are scattered.
expert, capacity    all-to-all: tokens and weights there, sums back; there again for recomputation;
        and the three gradients the other way.
The router's statistics are summed once, after the layers.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs.models.architecture import ModelConfig, MoEConfig
from partitioning import sharding
from qwen_jax.model import transformer
from tests.multidevice import cases, hlo
from train.core import step

MOE = MoEConfig(
    num_experts=12,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=48,
    router_aux_loss_coef=0.5,
    router_z_loss=0.1,
)
MODEL = dataclasses.replace(cases.MODEL, moe=MOE)


def changed(**fields) -> ModelConfig:
    return dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, **fields))


PADDED, CAPACITY = changed(pad_experts_to=16), changed(capacity_factor=1.0)
# Parts of a sequence drop other choices than the whole; with E / J even shares, none.
ROOMY = changed(capacity_factor=4.0)


def loss(params, tokens, targets, weights, segments, positions, *, cfg, layout, options):
    with jax.named_scope("model"):
        output = transformer.apply(
            cfg, params, tokens, segment_ids_BT=segments, positions_BT=positions, layout=layout,
            **options,
        )  # fmt: skip
    with jax.named_scope("loss"):
        sums = cases.language_model.cross_entropy(
            output.hidden_BTD,
            transformer.output_kernel(cfg, params),
            targets,
            weights,
            chunk=cases.CHUNK,
            layout=layout,
        )
        sums = step.Sums(sums.loss, sums.weight, {})
        sums = step.with_router(sums, cfg, output)
        return sums.loss / sums.weight, sums.router_load_LE


@functools.cache
def one_device(cfg: ModelConfig):
    run = functools.partial(loss, cfg=cfg, layout=None, options={})
    run = jax.jit(jax.value_and_grad(run, has_aux=True))
    return run(cases.random_params(cfg), *cases.batch())


@functools.cache
def program(text: str, cfg: ModelConfig) -> hlo.Program:
    placed = cases.layout(text)
    sharding.check_model(cfg, placed)
    of_params = sharding.shardings(transformer.axes(cfg), placed)
    of_batch = sharding.sharding(("batch", "length"), placed)
    run = functools.partial(loss, cfg=cfg, layout=placed, options={"remat_policy": "full"})
    jitted = jax.jit(
        jax.value_and_grad(run, has_aux=True),
        in_shardings=(of_params, *[of_batch] * 5),
        out_shardings=(None, of_params),
    )
    return hlo.compile_and_read(jitted.lower(transformer.shapes(cfg), *cases.batch()), placed.mesh)


MATRICES = {
    ("", "looped", "all-gather", "fsdp"): 6,
    # Gradients: of the experts' three over fsdp; of the seven others, one axis after the other.
    ("", "looped", "reduce-scatter", "fsdp"): 3 + 7,
    ("", "looped", "reduce-scatter", "expert"): 7,
    # Four of attention, three of the shared expert, the router.
    ("model", "looped", "all-gather", "fsdp+expert"): 8,
    ("model'", "looped", "all-gather", "fsdp+expert"): 8,
    # Embedding and output kernel, as in a dense model.
    ("model", "once", "all-gather", "fsdp+expert"): 1,
    ("model", "once", "all-to-all", "fsdp+expert"): 1,
    ("model'", "once", "all-to-all", "fsdp+expert"): 1,
    ("loss", "once", "all-gather", "fsdp+expert"): 1,
    ("", "once", "reduce-scatter", "fsdp"): 1,
    ("", "once", "reduce-scatter", "expert"): 1,
}
DROPLESS = MATRICES | {
    ("", "looped", "all-gather", "expert"): 7,
    ("", "looped", "reduce-scatter", "expert"): 3 + 7,  # rows with their choices; gradients
    ("", "looped", "all-reduce", "tensor"): 2,
    ("model", "once", "all-reduce", "tensor"): 1,
    ("model", "looped", "all-reduce", "tensor"): 3,
    ("model'", "looped", "all-reduce", "tensor"): 7,
    ("loss", "looped", "all-reduce", "tensor"): 2,
    ("loss", "looped", "all-gather", "tensor"): 2,
    # Router, shared gate, three biases, two norms.
    ("model'", "looped", "all-reduce", "fsdp+expert"): 7,
    ("model'", "once", "all-reduce", "fsdp+expert"): 1,  # final norm
    # Loss, weight, and the router's statistics.
    ("loss", "once", "all-reduce", "fsdp+expert"): 7,
}
WITH_CAPACITY = MATRICES | {
    ("", "looped", "all-to-all", "expert"): 8,
    # Gradients of matrices over the devices that share them first, the slices over data; what is
    # whole everywhere, the router's too, over all at once.
    ("", "looped", "all-reduce", "data"): 3 + 7,
    ("", "once", "all-reduce", "data"): 1,
    ("model'", "looped", "all-reduce", "data+fsdp+expert"): 7,
    ("model'", "once", "all-reduce", "data"): 1,
    ("model'", "once", "all-reduce", "data+fsdp+expert"): 1,
    ("loss", "once", "all-reduce", "data+fsdp+expert"): 7,
}
DEFAULT = (("expert=2,fsdp=2,tensor=2", PADDED), ("data=2,expert=2,fsdp=2", CAPACITY))
SELDOM = (
    ("expert=8", PADDED),
    ("expert=4,fsdp=2", MODEL),
    ("fsdp=4,tensor=2", MODEL),
    ("expert=2,context=2,tensor=2", MODEL),
    ("context=2,expert=4", ROOMY),
)


@pytest.mark.parametrize(
    ("mesh", "cfg"),
    [
        *DEFAULT,
        *[pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM],
    ],
    ids=[mesh for mesh, _ in DEFAULT + SELDOM],
)
def test_same_loss_load_and_gradients_as_one_device(mesh, cfg):
    (want_loss, want_load), want = one_device(cfg)
    (got_loss, got_load), got = program(mesh, cfg).run(cases.random_params(cfg), *cases.batch())
    assert float(got_loss) == pytest.approx(float(want_loss), rel=1e-5)
    np.testing.assert_array_equal(got_load, want_load)
    for (path, theirs), ours in zip(
        jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True
    ):
        gap = np.linalg.norm(np.asarray(ours) - np.asarray(theirs)) / np.linalg.norm(theirs)
        assert gap < 1e-5, f"{jax.tree_util.keystr(path)}: relative norm {gap:.2e}"


@pytest.mark.parametrize(
    ("case", "expected"),
    [(DEFAULT[0], DROPLESS), (DEFAULT[1], WITH_CAPACITY)],
    ids=["dropless", "capacity"],
)
def test_exactly_the_expected_collectives(case, expected):
    found = program(*case)
    # Sums over mesh axes of size 1, which XLA drops later, are none.
    counted = {key: number for key, number in found.count().items() if key[-1]}
    assert counted == expected
    assert "rematerialization" not in found.warnings, found.warnings


def test_experts_that_do_not_divide_are_refused_with_a_remedy():
    with pytest.raises(
        ValueError,
        match=r"num_experts=12 is not divisible by mesh axis expert=8; use 1, 2, 3, 4, 6, or set "
        r"pad_experts_to=16",
    ):
        sharding.check_model(MODEL, cases.layout("expert=8"))
    sharding.check_model(PADDED, cases.layout("expert=8"))
