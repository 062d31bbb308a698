"""Logprobs against torch, and a prompt's against a whole array of logits."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.decode import logprobs


@pytest.mark.parametrize("V", [5, 20, 127, 128, 200, 3000])
@pytest.mark.parametrize("kind", ["distinct", "ties", "bfloat16"])
def test_those_of_tokens_are_torchs(V, kind):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(V)
    logits_BV = 4 * rng.standard_normal((3, V)).astype(np.float32)
    logits_BV = np.round(logits_BV) + 0.0 if kind == "ties" else logits_BV  # no -0.0
    given = jnp.asarray(logits_BV, jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    logits_BV = np.array(given.astype(jnp.float32))
    scores_BV = np.where(logits_BV > 0.5, 2 * logits_BV, -np.inf).astype(np.float32)
    scores_BV[:, 0] = 1.0
    tokens_B = np.array([0, V - 1, V // 2])
    got = logprobs.of_tokens(given, scores_BV, tokens_B, greedy_B=np.array([False, False, True]))
    raw_BV = torch.log_softmax(torch.tensor(logits_BV), -1).numpy()
    drawn_BV = torch.log_softmax(torch.tensor(scores_BV), -1).numpy()
    rows = np.arange(3)
    np.testing.assert_allclose(got.raw, raw_BV[rows, tokens_B], atol=2e-6, rtol=1e-6)
    np.testing.assert_allclose(got.drawn[:2], drawn_BV[rows, tokens_B][:2], atol=2e-6, rtol=1e-6)
    # Of greedy's point mass, the token that was drawn is certain; one that may not be drawn never.
    assert got.drawn[2] == (0.0 if np.isfinite(scores_BV[2, tokens_B[2]]) else -np.inf)
    count = min(V, logprobs.J)
    order_BV = np.argsort(-logits_BV, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(got.top_ids[:, :count], order_BV)
    want = np.take_along_axis(raw_BV, order_BV, axis=-1)
    np.testing.assert_allclose(got.top[:, :count], want, atol=2e-6, rtol=1e-6)
    assert np.all(np.asarray(got.top[:, count:]) == -np.inf) and got.top.shape == (3, logprobs.J)


def test_masked_logits_have_no_probability():
    logits_BV = np.full((2, 40), -np.inf, np.float32)
    logits_BV[0, 30] = 7.0
    got = logprobs.of_tokens(logits_BV, logits_BV, np.array([30, 0]), greedy_B=np.zeros(2, bool))
    assert got.raw.tolist() == [0.0, -np.inf] and got.drawn.tolist() == [0.0, -np.inf]
    assert got.top[:, 0].tolist() == [0.0, -np.inf] and got.top_ids[0, 0] == 30


@pytest.mark.parametrize(("B", "T"), [(1, 7), (2, 600), (300, 3)])
def test_a_prompts_are_those_of_all_its_logits(B, T):
    rng = np.random.default_rng(0)
    hidden_BTD = rng.standard_normal((B, T, 8)).astype(np.float32)
    kernel_DV = rng.standard_normal((8, 50)).astype(np.float32)
    next_BT = rng.integers(0, 50, (B, T))
    got = logprobs.of_prompt(hidden_BTD, kernel_DV, next_BT, layout=None)
    logits_BTV = np.float64(hidden_BTD) @ np.float64(kernel_DV)
    want_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    want_BT = np.take_along_axis(want_BTV, next_BT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(got.raw, want_BT, atol=2e-5)
    np.testing.assert_array_equal(got.drawn, got.raw)
    assert got.top.shape == got.top_ids.shape == (B, T, logprobs.J)
    np.testing.assert_allclose(got.top[..., 0], want_BTV.max(-1), atol=2e-5)
