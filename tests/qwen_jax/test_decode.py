"""Decoding over the cache computes what the whole forward pass computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import qwen2_5, schema
from qwen_jax import decode, generation, kv_cache, model

SMALL = dataclasses.replace(
    qwen2_5.tiny(),
    vocab_size=384,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    head_dim=16,
    max_position_embeddings=256,
)
UNTIED = dataclasses.replace(SMALL, tie_word_embeddings=False, head_dim=8, rms_norm_eps=1e-5)
PREFILL = jax.jit(decode.prefill, static_argnums=0)
STEP = jax.jit(decode.decode_step, static_argnums=0)


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def random_params(cfg: schema.Model, seed: int = 0) -> dict:
    """Unlike the initialiser's: biases count, and layers outweigh embeddings."""

    rng = np.random.default_rng(seed)

    def leaf(path, x: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 0.02 if path[-1].key == "weight" else 0.2
        noise = rng.normal(0, scale, x.shape).astype(np.float32)
        return jnp.asarray(1 + noise if path[-1].key == "scale" else noise)

    return jax.tree_util.tree_map_with_path(leaf, model.shapes(cfg))


def prepared(cfg: schema.Model, form: str) -> dict:
    return decode.prepare(cfg, random_params(cfg), dtype=jnp.float32, form=form)


def tokens_of(cfg: schema.Model, *shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(1, cfg.vocab_size, shape, np.int32)


def decode_all(cfg, params, tokens_BT, lengths_B, *, length: int) -> list[np.ndarray]:
    """Each row's logits at positions lengths_B - 1 .. T - 1, from prefill and decode steps."""
    cache = kv_cache.create(
        cfg,
        num_slots=len(tokens_BT),
        length=length,
        dtype=jnp.float32,
        stacked=isinstance(params["layers"], dict),
    )
    T = tokens_BT.shape[1]
    visible = np.arange(T)[None, :] < lengths_B[:, None]
    logits_BV, cache = PREFILL(cfg, params, np.where(visible, tokens_BT, 0), lengths_B, cache)
    rows = [[row] for row in np.asarray(logits_BV)]
    while (np.asarray(cache.lengths_B) < T).any():
        at_B = np.asarray(cache.lengths_B)
        active_B = at_B < T
        here_B = tokens_BT[np.arange(len(tokens_BT)), np.minimum(at_B, T - 1)]
        logits_BV, cache = STEP(cfg, params, here_B, cache, active_B=active_B)
        for row in np.flatnonzero(active_B):
            rows[row].append(np.asarray(logits_BV[row]))
    return [np.stack(row) for row in rows]


@pytest.mark.parametrize(
    ("cfg", "form"),
    [(SMALL, "stacked"), (UNTIED, "unstacked"), (SMALL, "fused"), (UNTIED, "fused")],
    ids=["tied-stacked", "untied-unstacked", "tied-fused", "untied-fused"],
)
def test_prefill_and_decode_equal_the_forward_pass(cfg, form):
    tokens_BT = tokens_of(cfg, 3, 24)
    hidden_BTD = model.apply(cfg, random_params(cfg), tokens_BT).hidden_BTD
    want_BTV = np.asarray(model.unembed(cfg, random_params(cfg), hidden_BTD))
    lengths_B = np.array([1, 11, 23], np.int32)
    rows = decode_all(cfg, prepared(cfg, form), tokens_BT, lengths_B, length=32)
    scale = np.abs(want_BTV).max()
    for got_TV, length, want_TV in zip(rows, lengths_B, want_BTV, strict=True):
        np.testing.assert_allclose(got_TV, want_TV[length - 1 :], rtol=0, atol=3e-6 * scale)


def test_padding_and_cache_length_do_not_matter():
    params = prepared(SMALL, "fused")
    tokens_BT = tokens_of(SMALL, 2, 12)
    lengths_B = np.array([5, 9], np.int32)
    (a0, a1) = decode_all(SMALL, params, tokens_BT, lengths_B, length=12)
    (b0, b1) = decode_all(SMALL, params, tokens_BT, lengths_B, length=64)
    (c1,) = decode_all(SMALL, params, tokens_BT[1:], lengths_B[1:], length=12)
    scale = np.abs(a0).max()
    for a, b in ((a0, b0), (a1, b1), (a1, c1)):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * scale)


def test_what_lies_beyond_a_length_is_never_read():
    params = prepared(SMALL, "unstacked")
    cache = kv_cache.create(SMALL, num_slots=2, length=16, dtype=jnp.float32, stacked=False)
    tokens_BT = tokens_of(SMALL, 2, 6)
    _, cache = PREFILL(SMALL, params, tokens_BT, np.array([6, 4]), cache)

    def poison(x_BKSH):
        beyond_BS = np.arange(16)[None, :] >= np.array([6, 4])[:, None]
        return jnp.where(beyond_BS[:, None, :, None], 1e4, x_BKSH)

    poisoned = kv_cache.Cache(
        tuple(map(poison, cache.k_LBKSH)), tuple(map(poison, cache.v_LBKSH)), cache.lengths_B
    )
    want, _ = STEP(SMALL, params, np.array([3, 4]), cache)
    got, _ = STEP(SMALL, params, np.array([3, 4]), poisoned)
    np.testing.assert_array_equal(got, want)


def test_inactive_rows_keep_their_length_even_when_full():
    params = prepared(SMALL, "stacked")
    cache = kv_cache.create(SMALL, num_slots=2, length=6, dtype=jnp.float32)
    _, cache = PREFILL(SMALL, params, tokens_of(SMALL, 2, 6), np.array([6, 3]), cache)
    _, after = STEP(SMALL, params, np.array([1, 1]), cache, active_B=np.array([False, True]))
    np.testing.assert_array_equal(after.lengths_B, [6, 4])
    np.testing.assert_array_equal(after.k_LBKSH[:, 0], cache.k_LBKSH[:, 0])


def test_prefill_refuses_a_cache_that_does_not_fit():
    params = prepared(SMALL, "stacked")
    cache = kv_cache.create(SMALL, num_slots=2, length=8, dtype=jnp.float32)
    with pytest.raises(ValueError, match="2 slots and 8 positions cannot hold prompts .* 2 x 9"):
        decode.prefill(SMALL, params, tokens_of(SMALL, 2, 9), np.array([9, 9]), cache)
    with pytest.raises(ValueError, match="stacked=False"):
        decode.prefill(
            SMALL, prepared(SMALL, "fused"), tokens_of(SMALL, 2, 8), np.array([8, 8]), cache
        )
    with pytest.raises(ValueError, match="max_position_embeddings=256"):
        decode.prefill(SMALL, params, tokens_of(SMALL, 2, 257), np.array([9, 9]), cache)


def test_prepare_consumes_and_refuses():
    params = random_params(SMALL)
    embed, kernel = params["embed"]["weight"], params["layers"]["mlp"]["gate"]["kernel"]
    result = decode.prepare(SMALL, params, dtype=jnp.bfloat16, form="fused")
    assert kernel.is_deleted() and embed.is_deleted()
    assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype(jnp.bfloat16)}
    assert len(result["layers"]) == SMALL.num_hidden_layers
    with pytest.raises(ValueError, match="unknown form 'scanned'"):
        decode.prepare(SMALL, random_params(SMALL), dtype=jnp.float32, form="scanned")


@pytest.mark.parametrize("stacked", [True, False])
def test_cache_bytes_are_counted(stacked):
    cache = kv_cache.create(SMALL, num_slots=3, length=10, dtype=jnp.bfloat16, stacked=stacked)
    held = sum(x.nbytes for x in jax.tree.leaves((cache.k_LBKSH, cache.v_LBKSH)))
    assert held == kv_cache.num_bytes(SMALL, num_slots=3, length=10, dtype=jnp.bfloat16)
    assert (cache.dtype, cache.num_slots, cache.length) == (jnp.bfloat16, 3, 10)


@pytest.mark.parametrize("cfg", [SMALL, UNTIED], ids=["tied", "untied"])
def test_greedy_tokens_are_those_of_transformers(cfg):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        rms_norm_eps=cfg.rms_norm_eps,
        tie_word_embeddings=cfg.tie_word_embeddings,
        max_position_embeddings=cfg.max_position_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    network = transformers.Qwen2ForCausalLM(config).eval()
    params = random_params(cfg, seed=3)
    missing, unexpected = network.load_state_dict(to_torch(torch, cfg, params), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    network.tie_weights()
    prompts = [tokens_of(cfg, 40)[:n] for n in (1, 13, 40)]
    settings = schema.Sampling(temperature=0.0, max_tokens=64)
    requests = [generation.request(cfg, p.tolist(), settings=settings) for p in prompts]
    params = decode.prepare(cfg, params, dtype=jnp.float32)
    got = {row: [] for row in range(3)}
    for piece in generation.generate(cfg, params, requests, eos_ids=(), dtype=jnp.float32):
        got[piece.row] += piece.tokens
    for row, prompt in enumerate(prompts):
        ids = torch.tensor(prompt[None].astype(np.int64))
        with torch.no_grad():
            want = network.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
            )
        assert got[row] == want[0, len(prompt) :].tolist()
        assert len(set(got[row])) > 3  # not a fixed point that any model would reach


def to_torch(torch, cfg: schema.Model, params: dict) -> dict:
    """The stacked tree under transformers' names: kernels become output-major."""
    layers, D = params["layers"], cfg.hidden_size
    state = {
        "model.embed_tokens.weight": params["embed"]["weight"],
        "model.norm.weight": params["norm"]["scale"],
    }
    if not cfg.tie_word_embeddings:
        state["lm_head.weight"] = params["lm_head"]["kernel"].T
    for i in range(cfg.num_hidden_layers):
        name = f"model.layers.{i}"
        attention, mlp = layers["attention"], layers["mlp"]
        for part in "qkv":
            state[f"{name}.self_attn.{part}_proj.weight"] = (
                attention[part]["kernel"][i].reshape(D, -1).T
            )
            state[f"{name}.self_attn.{part}_proj.bias"] = attention[part]["bias"][i].reshape(-1)
        state[f"{name}.self_attn.o_proj.weight"] = attention["o"]["kernel"][i].reshape(-1, D).T
        for part in ("gate", "up", "down"):
            state[f"{name}.mlp.{part}_proj.weight"] = mlp[part]["kernel"][i].T
        for part in ("input", "post_attention"):
            state[f"{name}.{part}_layernorm.weight"] = layers[f"{part}_norm"]["scale"][i]
    return {k: torch.tensor(np.array(v)) for k, v in state.items()}
