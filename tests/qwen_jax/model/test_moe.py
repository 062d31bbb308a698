"""Experts against a plain loop over them; capacity, losses, bias, and padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models.architecture import ModelConfig, MoEConfig
from partitioning import expert_parallel
from qwen_jax.model import moe, transformer

MOE = MoEConfig(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
)
CFG = ModelConfig(
    name="test", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    bos_token_id=None, eos_token_ids=(0,), pad_token_id=0, moe=MOE,
)  # fmt: skip
B, T = 2, 12


def changed(**fields) -> ModelConfig:
    return dataclasses.replace(CFG, moe=dataclasses.replace(MOE, **fields))


@functools.cache
def layer_params(cfg: ModelConfig) -> dict:
    part = transformer.definitions(cfg)["layers"]
    stacked = part.init(jax.random.key(0))
    return jax.tree.map(lambda x: 5 * x[0] + 0.1, stacked["moe"])


def apply(cfg, params, x_BTD, routing=moe.DROPLESS):
    whole = jax.tree.map(
        lambda x: x[0], transformer.definitions(cfg)["layers"].init(jax.random.key(0))
    )
    block = transformer.definitions(cfg)["layers"].bind({**whole, "moe": params})
    return block.feed_forward(x_BTD, layout=None, routing=routing)


def loop(cfg, params, x_BTD, *, kept_BTE=None):
    """The definition: every expert on every token, and those chosen weighted."""
    E, J = cfg.moe.num_experts, cfg.moe.num_experts_per_tok
    probabilities = jax.nn.softmax(x_BTD @ params["router"]["kernel"])
    threshold = jnp.sort(probabilities)[..., E - J][..., None]
    weights = jnp.where(probabilities >= threshold, probabilities, 0)
    if cfg.moe.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdims=True)
    if kept_BTE is not None:
        weights = weights * kept_BTE

    def swiglu(mlp, x):
        return (jax.nn.silu(x @ mlp["gate"]) * (x @ mlp["up"])) @ mlp["down"]

    kernels = {name: params["experts"][name]["kernel"] for name in ("gate", "up", "down")}
    y = sum(
        weights[..., e, None] * swiglu({n: k[e] for n, k in kernels.items()}, x_BTD)
        for e in range(E)
    )
    if "shared" in params:
        shared = {name: params["shared"][name]["kernel"] for name in kernels}
        gate = jax.nn.sigmoid(x_BTD @ params["shared_gate"]["kernel"])
        y = y + gate * swiglu(shared, x_BTD)
    return y


@functools.cache
def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (B, T, CFG.hidden_size))


@pytest.mark.parametrize(
    "cfg",
    [
        changed(pad_experts_to=8),
        changed(pad_experts_to=8, capacity_factor=100.0),
        pytest.param(CFG, marks=pytest.mark.slow),
        changed(norm_topk_prob=True, shared_expert_intermediate_size=0),
    ],
    ids=["padded", "padded, capacity", "not padded", "renormalised, not shared"],
)
def test_values_and_gradients_of_a_loop_over_experts(cfg):
    params, x_BTD = layer_params(cfg), inputs()
    routing = moe.Routing(capacity_factor=cfg.moe.capacity_factor)
    cotangent_BTD = jax.random.normal(jax.random.key(2), x_BTD.shape)

    def total(run):
        loss = lambda p, x: jnp.sum(run(p, x) * cotangent_BTD)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    got, ours = total(lambda p, x: apply(cfg, p, x, routing)[0])(params, x_BTD)
    want, theirs = total(functools.partial(loop, cfg))(params, x_BTD)
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()),
        ours,
        theirs,
    )
    stats = apply(cfg, params, x_BTD, routing)[1]
    assert float(stats.dropped_BP.sum()) == 0


def test_capacity_drops_the_latest_and_counts_them():
    cfg = changed(capacity_factor=0.75)
    params, x_BTD = layer_params(cfg), inputs()
    y_BTD, stats = apply(cfg, params, x_BTD, moe.Routing(capacity_factor=0.75))
    places = 3  # 0.75 x 12 tokens x 2 choices / 6 experts
    probabilities = jax.nn.softmax(x_BTD @ params["router"]["kernel"])
    chosen_BTE = np.asarray(probabilities >= jnp.sort(probabilities)[..., -2][..., None])
    kept_BTE = chosen_BTE & (np.cumsum(chosen_BTE, axis=1) <= places)
    want = loop(cfg, params, x_BTD, kept_BTE=kept_BTE)
    np.testing.assert_allclose(y_BTD, want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(stats.dropped_BP[:, 0], (chosen_BTE & ~kept_BTE).sum((1, 2)))
    assert 0 < float(stats.dropped_BP.sum()) < B * T * 2
    np.testing.assert_array_equal(stats.load_BPE[:, 0], chosen_BTE.sum(1))


def test_capacity_leaves_causality_whole():
    params = transformer.init(changed(capacity_factor=0.5), jax.random.key(0))
    tokens_BT = np.random.default_rng(0).integers(0, 64, (1, T))
    run = jax.jit(lambda t: transformer.apply(changed(capacity_factor=0.5), params, t).hidden_BTD)
    before = run(tokens_BT)
    tokens_BT[:, 8:] = (tokens_BT[:, 8:] + 17) % 64
    np.testing.assert_array_equal(run(tokens_BT)[:, :8], before[:, :8])


@pytest.mark.parametrize("factor", [None, 0.75])
def test_padding_is_neither_sent_nor_counted(factor):
    params, x_BTD = layer_params(CFG), inputs()
    real_BT = jnp.asarray(np.arange(T)[None] < np.array([[12], [7]]))
    y_BTD, stats = apply(CFG, params, x_BTD, moe.Routing(factor, real_BT))
    changed_BTD = jnp.where(real_BT[..., None], x_BTD, -x_BTD)
    again_BTD, others = apply(CFG, params, changed_BTD, moe.Routing(factor, real_BT))
    np.testing.assert_array_equal(np.asarray(y_BTD)[real_BT], np.asarray(again_BTD)[real_BT])
    jax.tree.map(np.testing.assert_array_equal, stats, others)
    assert float(stats.tokens_BP.sum()) == 19 and float(stats.load_BPE.sum()) == 38


def test_sort_gives_every_choice_its_row():
    random = np.random.default_rng(0)
    experts_MJ = jnp.asarray(random.permuted(np.tile(np.arange(7), (9, 1)), axis=1)[:, :3])
    routes = expert_parallel.sort(experts_MJ, num_experts=5, num_rows=32)
    counts = np.bincount(np.asarray(experts_MJ).ravel(), minlength=7)
    np.testing.assert_array_equal(routes.sizes_E, counts[:5])
    owner_R = np.repeat(np.arange(5), counts[:5])
    for m, j in np.ndindex(9, 3):
        row, expert = int(routes.slots_MJ[m, j]), int(experts_MJ[m, j])
        if expert >= 5:
            assert row == 32
        else:
            assert (routes.source_R[row], routes.order_R[row]) == (m, m * 3 + j)
            assert owner_R[row] == expert
    assert np.all(np.asarray(routes.source_R)[counts[:5].sum() :] == 9)


def test_top_is_a_sort():
    scores = jax.random.normal(jax.random.key(0), (3, 5, 11))
    np.testing.assert_array_equal(moe.top(scores, 4), jax.lax.top_k(scores, 4)[1])


def test_an_even_load_has_balance_j_and_one_expert_for_all_has_more():
    even = moe.Stats(
        load_BPE=jnp.full((1, 2, 1, 6), 4.0),
        probability_BPE=jnp.full((1, 2, 1, 6), 2.0),
        squared_log_z_BP=jnp.full((1, 2, 1), 12 * 9.0),
        entropy_BP=jnp.full((1, 2, 1), 12 * np.log(6.0)),
        dropped_BP=jnp.full((1, 2, 1), 6.0),
        tokens_BP=jnp.full((1, 2, 1), 12.0),
    )
    for scope in ("global_batch", "sequence"):
        got = moe.losses(dataclasses.replace(MOE, load_balance=scope), even)
        assert float(got.balance) == pytest.approx(2.0)
        assert float(got.z) == pytest.approx(9.0)
        assert float(got.metrics["router_imbalance"]) == 1.0
        assert float(got.metrics["router_entropy"]) == pytest.approx(np.log(6))
        assert float(got.metrics["router_dropped"]) == pytest.approx(0.25)
    # Two sequences, each with experts of its own: even together, uneven apart.
    halves = np.zeros((1, 2, 1, 6), np.float32)
    halves[0, 0, 0, :3] = halves[0, 1, 0, 3:] = 8.0
    apart = dataclasses.replace(
        even, load_BPE=jnp.asarray(halves), probability_BPE=jnp.asarray(halves / 2)
    )
    assert float(moe.losses(MOE, apart).balance) == pytest.approx(2.0)
    sequence = dataclasses.replace(MOE, load_balance="sequence")
    assert float(moe.losses(sequence, apart).balance) == pytest.approx(4.0)
    # Nothing of a row of padding counts.
    padded = jax.tree.map(lambda x: x.at[:, 1].set(0), apart)
    assert float(moe.losses(sequence, padded).balance) == pytest.approx(4.0)


def test_the_bias_steers_the_choice_and_nothing_else():
    logits_BTE = jax.random.normal(jax.random.key(0), (B, T, 6))
    bias_E = jnp.asarray([10.0, 0, 0, 0, 0, -10.0])

    def total(logits_BTE, bias_E):
        weights_BTJ, experts_BTJ, _ = moe.route(logits_BTE, MOE, bias_E=bias_E)
        return jnp.sum(weights_BTJ[..., 0]), (weights_BTJ, experts_BTJ)

    gradients, (weights_BTJ, experts_BTJ) = jax.grad(total, argnums=(0, 1), has_aux=True)(
        logits_BTE, bias_E
    )
    assert np.all(np.asarray(experts_BTJ[..., 0]) == 0) and not np.any(experts_BTJ == 5)
    probabilities = jax.nn.softmax(logits_BTE)
    np.testing.assert_allclose(weights_BTJ[..., 0], probabilities[..., 0], rtol=1e-6)
    assert not np.any(gradients[1]) and np.any(gradients[0])


def test_the_bias_moves_against_the_load():
    load_LE = jnp.asarray([[9.0, 3, 3, 1]])
    params = {"layers": {"moe": {"router": {"bias": jnp.zeros((1, 4)), "kernel": None}}}}
    moved = moe.with_updated_bias(params, load_LE, rate=0.5)
    np.testing.assert_array_equal(moved["layers"]["moe"]["router"]["bias"], [[-0.5, 0.5, 0.5, 0.5]])


@pytest.mark.parametrize("policy", ["dots", "save:expert_gate,expert_up"])
def test_what_experts_keep_for_the_backward_pass(policy):
    def loss(params):
        return jnp.sum(
            transformer.apply(CFG, params, jnp.ones((B, T), int), remat_policy=policy).hidden_BTD
        )

    kept = jax.make_jaxpr(lambda params: jax.vjp(loss, params)[1])(
        transformer.shapes(CFG)
    ).out_avals
    rows = sum(aval.shape == (2, B * T * 2, 24) for aval in kept)
    assert rows == 2, "gate and up of two layers, nothing else of the experts' width"
