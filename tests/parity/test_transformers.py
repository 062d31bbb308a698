"""Logits, activations, gradients and greedy tokens against transformers, for every shape family."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qwen_jax.model import rope, transformer
from qwen_jax.ops.attention import api
from tests.parity import oracle
from train.losses import language_model

FAMILIES = oracle.families()
B, T = 2, 33
PROMPT, NEW = 9, 64


@functools.cache
def _pair(name: str) -> SimpleNamespace:
    """One family: its config, the oracle, our parameters and some tokens."""
    cfg = FAMILIES[name]
    theirs = oracle.build(cfg, seed=len(name))
    tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (B, T))
    return SimpleNamespace(
        cfg=cfg, theirs=theirs, params=oracle.params(theirs, cfg), tokens_BT=tokens_BT
    )


@pytest.fixture(params=list(FAMILIES))
def pair(request):
    return _pair(request.param)


@pytest.fixture(
    params=[
        "qwen2.5-0.5b",
        "qwen2.5-1.5b",
        "qwen2.5-7b",
        "qwen2.5-14b",
        # Eight heads a key-value head; the default run sees them in `test_logits`.
        pytest.param("qwen2.5-3b", marks=pytest.mark.slow),
        pytest.param("qwen2.5-72b", marks=pytest.mark.slow),
    ]
)
def shape(request):
    """One family for each (head size, heads per key-value head, tied or not): the slower tests."""
    return _pair(request.param)


def test_the_families_cover_what_the_presets_differ_in():
    covered = {
        (cfg.head_dim, cfg.num_query_groups, cfg.tie_word_embeddings, cfg.rms_norm_eps)
        for cfg in FAMILIES.values()
    }
    assert {c[0] for c in covered} == {64, 128}
    assert {c[1] for c in covered} == {7, 6, 8, 5}
    assert {c[2] for c in covered} == {True, False}
    assert {c[3] for c in covered} == {1e-6, 1e-5}
    assert {cfg.rope_theta for cfg in FAMILIES.values()} == {1e6, 1e7}


def test_parameter_tree_is_the_models_own(pair):
    expected = transformer.shapes(pair.cfg)
    assert jax.tree.structure(pair.params) == jax.tree.structure(expected)
    assert jax.tree.map(jnp.shape, pair.params) == jax.tree.map(jnp.shape, expected)


def test_logits(pair):
    oracle.assert_close(
        _logits(pair.cfg, pair.params, pair.tokens_BT), oracle.logits(pair.theirs, pair.tokens_BT)
    )


def test_activations_of_every_layer(shape):
    with torch.no_grad():
        out = shape.theirs.model(
            torch.from_numpy(shape.tokens_BT), output_hidden_states=True, use_cache=False
        )
    ours = _residual_stream(shape.cfg, shape.params, shape.tokens_BT)
    # Their last entry has passed the final norm; the one before a layer is that layer's input.
    assert len(out.hidden_states) == len(ours) == shape.cfg.num_hidden_layers + 1
    for got, want in zip(ours[:-1], out.hidden_states[:-1], strict=True):
        oracle.assert_close(got, want.numpy())
    hidden_BTD = transformer.apply(shape.cfg, shape.params, shape.tokens_BT).hidden_BTD
    oracle.assert_close(hidden_BTD, out.hidden_states[-1].numpy())


def test_gradients_of_every_parameter(shape):
    weights_BT = np.random.default_rng(1).integers(0, 2, (B, T)).astype(np.float32)
    targets_BT = np.roll(shape.tokens_BT, -1, axis=1)
    logits = shape.theirs(torch.from_numpy(shape.tokens_BT), use_cache=False).logits
    entropy = torch.nn.functional.cross_entropy(
        logits.reshape(B * T, -1), torch.from_numpy(targets_BT).reshape(-1), reduction="none"
    )
    weights = torch.from_numpy(weights_BT)
    loss = (entropy * weights.reshape(-1)).sum() / weights.sum()
    shape.theirs.zero_grad()
    loss.backward()
    want = oracle.gradients(shape.theirs, shape.cfg)

    @jax.jit
    @jax.value_and_grad
    def ours(params):
        hidden_BTD = transformer.apply(
            shape.cfg, params, jnp.asarray(shape.tokens_BT), remat_policy="full"
        ).hidden_BTD
        kernel_DV = transformer.output_kernel(shape.cfg, params)
        sums = language_model.cross_entropy(hidden_BTD, kernel_DV, targets_BT, weights_BT, chunk=16)
        return sums.loss / sums.weight

    got_loss, got = ours(shape.params)
    assert float(got_loss) == pytest.approx(loss.item(), rel=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        mine = functools.reduce(lambda tree, key: tree[key.key], path, got)
        norm, _ = oracle.difference(mine, leaf)
        assert norm < 1e-4, f"{jax.tree_util.keystr(path)}: relative norm {norm:.2e}"


def test_sixty_four_greedy_tokens(shape):
    prompts = shape.tokens_BT[:, :PROMPT]
    with torch.no_grad():
        want = shape.theirs.generate(
            torch.from_numpy(prompts),
            attention_mask=torch.ones(prompts.shape, dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
        ).numpy()
    assert want.shape == (B, PROMPT + NEW)
    assert len(np.unique(want[:, PROMPT:])) > 8, "the oracle says too little to be a test"
    np.testing.assert_array_equal(_greedy_by_full_forward(shape.cfg, shape.params, prompts), want)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda cfg: dataclasses.replace(cfg, rms_norm_eps=1e-6), id="eps"),
        pytest.param(lambda cfg: dataclasses.replace(cfg, rope_theta=1e5), id="theta"),
    ],
)
def test_the_comparison_sees_a_wrong_config(change):
    cfg = FAMILIES["qwen2.5-14b"]
    theirs = oracle.build(cfg)
    tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (B, T))
    got = _logits(change(cfg), oracle.params(theirs, cfg), tokens_BT)
    norm, largest = oracle.difference(got, oracle.logits(theirs, tokens_BT))
    assert min(norm, largest) > 1e-3


@pytest.mark.parametrize("name", ["q.bias", "k.bias", "v.bias", "input_norm.scale"])
def test_the_comparison_sees_a_parameter_that_is_ignored(name):
    cfg = FAMILIES["qwen2.5-0.5b"]
    theirs = oracle.build(cfg)
    tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (B, T))
    params = oracle.params(theirs, cfg)
    module, leaf = name.split(".")
    holder = params["layers"] if module == "input_norm" else params["layers"]["attention"]
    neutral = jnp.zeros_like if leaf == "bias" else jnp.ones_like
    holder[module][leaf] = neutral(holder[module][leaf])
    norm, largest = oracle.difference(
        _logits(cfg, params, tokens_BT), oracle.logits(theirs, tokens_BT)
    )
    assert min(norm, largest) > 1e-3


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg, params, tokens_BT):
    hidden_BTD = transformer.apply(cfg, params, tokens_BT).hidden_BTD
    return transformer.unembed(cfg, params, hidden_BTD)


def _residual_stream(cfg, params, tokens_BT):
    """The embeddings and the output of every layer, by running one block after another."""
    rotation = rope.rotation(cfg, jnp.broadcast_to(jnp.arange(T), (B, T)))

    def attend(q_BTNH, k_BTKH, v_BTKH):
        return api.attention(q_BTNH, k_BTKH, v_BTKH, mask=api.Mask(causal=True)), None

    @jax.jit
    def run(layer, x_BTD):
        block = transformer.definitions(cfg)["layers"].bind(layer)
        return block(x_BTD, rotation=rotation, attend=attend, layout=None)[0]

    stream = [transformer.embed(cfg, params, jnp.asarray(tokens_BT), dtype=jnp.float32)]
    for i in range(cfg.num_hidden_layers):
        stream.append(run(jax.tree.map(lambda w, i=i: w[i], params["layers"]), stream[-1]))
    return stream


def _greedy_by_full_forward(cfg, params, prompts):
    """Every token from a forward pass over the whole row, padded to one length: compiled once."""
    tokens_BT = np.zeros((B, PROMPT + NEW), np.int32)
    tokens_BT[:, :PROMPT] = prompts

    def step(i, tokens_BT):
        logits_BTV = _logits(cfg, params, tokens_BT)
        best_B = jnp.argmax(logits_BTV[:, i - 1], axis=-1)
        return tokens_BT.at[:, i].set(best_B.astype(jnp.int32))

    return jax.jit(lambda x: jax.lax.fori_loop(PROMPT, PROMPT + NEW, step, x))(tokens_BT)
