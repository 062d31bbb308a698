"""Experts against transformers' Qwen2Moe: logits, activations, losses, gradients, greedy tokens."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_moe import modeling_qwen2_moe

from qwen_jax.model import module, moe, rope, stack, transformer
from qwen_jax.ops.attention import api
from tests.parity import moe_oracle, oracle
from tests.support import answers
from train.losses import language_model

B, T = 2, 33
PROMPT, NEW = 9, 16


@functools.cache
def _pair(name: str) -> SimpleNamespace:
    cfg = moe_oracle.MODELS[name]
    theirs = moe_oracle.build(cfg, seed=len(name))
    params = moe_oracle.params_from(dict(theirs.named_parameters()), cfg)
    tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (B, T))
    return SimpleNamespace(cfg=cfg, theirs=theirs, params=params, tokens_BT=tokens_BT)


@pytest.fixture(
    params=[
        "as published",
        "renormalised",
        "every second layer",
        pytest.param("one dense layer", marks=pytest.mark.slow),
    ]
)
def pair(request):
    return _pair(request.param)


@pytest.fixture(
    params=[
        "every second layer",
        pytest.param("as published", marks=pytest.mark.slow),
        pytest.param("renormalised", marks=pytest.mark.slow),
        pytest.param("one dense layer", marks=pytest.mark.slow),
    ]
)
def shape(request):
    """Those of the slower tests."""
    return _pair(request.param)


def test_parameter_tree_is_the_models_own(pair):
    expected = transformer.shapes(pair.cfg)
    assert jax.tree.map(jnp.shape, pair.params) == jax.tree.map(jnp.shape, expected)


def test_logits(pair):
    output = transformer.apply(pair.cfg, pair.params, pair.tokens_BT)
    got = transformer.unembed(pair.cfg, pair.params, output.hidden_BTD)
    oracle.assert_close(got, oracle.logits(pair.theirs, pair.tokens_BT))


def test_activations_of_every_layer(shape):
    with torch.no_grad():
        out = shape.theirs.model(
            torch.from_numpy(shape.tokens_BT), output_hidden_states=True, use_cache=False
        )
    stream = _residual_stream(shape.cfg, shape.params, shape.tokens_BT)
    assert len(out.hidden_states) == len(stream) + 1 == shape.cfg.num_hidden_layers + 1
    for got, want in zip(stream, out.hidden_states[:-1], strict=True):
        oracle.assert_close(got, want.numpy())


def test_gradients_of_every_parameter_with_the_balance_loss(shape):
    targets_BT = np.roll(shape.tokens_BT, -1, axis=1)
    tokens = torch.from_numpy(shape.tokens_BT)
    out = shape.theirs(tokens, use_cache=False, output_router_logits=True)
    entropy = torch.nn.functional.cross_entropy(
        out.logits.reshape(B * T, -1), torch.from_numpy(targets_BT).reshape(-1)
    )
    loss = entropy + shape.cfg.moe.router_aux_loss_coef * out.aux_loss
    shape.theirs.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in shape.theirs.named_parameters()}
    want = moe_oracle.params_from(gradients, shape.cfg)

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        output = transformer.apply(
            shape.cfg, params, jnp.asarray(shape.tokens_BT), remat_policy="full"
        )
        kernel_DV = transformer.output_kernel(shape.cfg, params)
        sums = language_model.cross_entropy(
            output.hidden_BTD, kernel_DV, targets_BT, jnp.ones((B, T)), chunk=16
        )
        router = moe.losses(shape.cfg.moe, output.router)
        return sums.loss / sums.weight + router.weighted(shape.cfg.moe)

    got_loss, got = ours(shape.params)
    assert float(got_loss) == pytest.approx(loss.item(), rel=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        mine = functools.reduce(lambda tree, key: tree[key.key], path, got)
        norm, _ = oracle.difference(mine, leaf)
        assert norm < 1e-4, f"{jax.tree_util.keystr(path)}: relative norm {norm:.2e}"


@pytest.mark.parametrize("padded", [5, pytest.param(0, marks=pytest.mark.slow)])
def test_balance_loss_is_transformers_load_balancing_loss(padded):
    pair = _pair("as published")
    mask_BT = np.ones((B, T), np.int64)
    mask_BT[1, T - padded :] = 0
    with torch.no_grad():
        out = pair.theirs(
            torch.from_numpy(pair.tokens_BT),
            attention_mask=torch.from_numpy(mask_BT),
            output_router_logits=True,
            use_cache=False,
        )
        logits = tuple(router.reshape(B * T, -1) for router in out.router_logits)
        want = modeling_qwen2_moe.load_balancing_loss_func(
            logits, pair.cfg.moe.num_experts, pair.cfg.moe.num_experts_per_tok,
            torch.from_numpy(mask_BT) if padded else None,
        )  # fmt: skip
    stats = transformer.apply(
        pair.cfg, pair.params, pair.tokens_BT, segment_ids_BT=jnp.asarray(mask_BT)
    ).router
    got = moe.losses(pair.cfg.moe, stats)
    assert float(got.balance) == pytest.approx(want.item(), rel=1e-5)
    log_z = torch.stack(logits).reshape(-1, B, T, pair.cfg.moe.num_experts).logsumexp(-1)
    z = (log_z**2)[:, torch.from_numpy(mask_BT) == 1].mean()
    assert float(got.z) == pytest.approx(z.item(), rel=1e-5)
    assert float(jnp.sum(got.load_LE)) == mask_BT.sum() * 3 * 3  # layers, choices


def test_greedy_tokens_of_an_engine(shape):
    prompts = shape.tokens_BT[:, :PROMPT]
    with torch.no_grad():
        want = shape.theirs.generate(
            torch.from_numpy(prompts),
            attention_mask=torch.ones(prompts.shape, dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            output_router_logits=False,
        ).numpy()
    assert len(np.unique(want[:, PROMPT:])) > 8, "the oracle says too little to be a test"
    engine = answers.engine(shape.cfg, shape.params)
    assert answers.greedy(engine, prompts, max_tokens=NEW) == want[:, PROMPT:].tolist()


@pytest.mark.parametrize(
    "change",
    [{"norm_topk_prob": True}, {"num_experts_per_tok": 2}],
    ids=["renormalised", "fewer choices"],
)
def test_the_comparison_sees_a_wrong_config(change):
    pair = _pair("as published")
    cfg = moe_oracle.changed(**change)
    output = transformer.apply(cfg, pair.params, pair.tokens_BT)
    got = transformer.unembed(cfg, pair.params, output.hidden_BTD)
    norm, largest = oracle.difference(got, oracle.logits(pair.theirs, pair.tokens_BT))
    assert min(norm, largest) > 1e-3


def _residual_stream(cfg, params, tokens_BT):
    """The embeddings and the output of every layer but the last, one block after another."""
    rotation = rope.rotation(cfg, jnp.broadcast_to(jnp.arange(T), (B, T)))

    def attend(q_BTNH, k_BTKH, v_BTKH):
        return api.attention(q_BTNH, k_BTKH, v_BTKH, mask=api.Mask(causal=True)), None

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, layer, x_BTD):
        block = transformer.definitions(cfg)[name].bind(layer)
        return block(x_BTD, rotation=rotation, attend=attend, layout=None)[0]

    stream = [transformer.embed(cfg, params, jnp.asarray(tokens_BT), dtype=jnp.float32)]
    layers = stack.in_order(cfg, params, module.unstack)
    for name, layer in zip(stack.order(cfg)[:-1], layers[:-1], strict=True):
        stream.append(run(name, layer, stream[-1]))
    return stream
