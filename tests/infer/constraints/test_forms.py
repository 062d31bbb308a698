"""Every form of parameters, dense and with experts: an engine computes the whole forward pass."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.models import qwen2_5, qwen2_moe
from configs.models.architecture import ModelConfig
from qwen_jax.model import transformer
from tests.infer import whole_forward
from tests.support import answers

TIED = dataclasses.replace(qwen2_5.tiny(), vocab_size=331, num_hidden_layers=3, head_dim=16)
UNTIED = dataclasses.replace(TIED, tie_word_embeddings=False, head_dim=8, rms_norm_eps=1e-5)
MIXED = dataclasses.replace(
    qwen2_moe.tiny(),
    vocab_size=331,
    num_hidden_layers=3,
    moe=dataclasses.replace(qwen2_moe.tiny().moe, decoder_sparse_step=2, mlp_only_layers=()),
)


def _params(cfg: ModelConfig) -> dict:
    """Unlike the initialiser's: biases count, and layers outweigh embeddings."""
    rng = np.random.default_rng(0)

    def leaf(path, x):
        noise = rng.normal(0, 0.02 if path[-1].key == "weight" else 0.2, x.shape)
        return jax.numpy.asarray(1 + noise if path[-1].key == "scale" else noise, x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, transformer.shapes(cfg))


@pytest.mark.parametrize(
    ("cfg", "form"),
    [
        (TIED, "unstacked"),
        (UNTIED, "fused"),
        (MIXED, "fused"),
        pytest.param(TIED, "fused", marks=pytest.mark.slow),
        pytest.param(UNTIED, "unstacked", marks=pytest.mark.slow),
        pytest.param(MIXED, "unstacked", marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_logprobs_are_those_of_the_whole_forward_pass(cfg, form):
    params = _params(cfg)
    prompts = [np.random.default_rng(n).integers(1, cfg.vocab_size, n) for n in (1, 33, 70)]
    engine = answers.engine(cfg, params, form=form)
    asked = {"max_tokens": 9, "logprobs": 1, "prompt_logprobs": 1}
    for prompt, events in zip(prompts, answers.events(engine, prompts, **asked), strict=True):
        scored = [x for event in events for x in event.prompt_logprobs or ()]
        drawn = [x for event in events for x in event.logprobs or ()]
        tokens = [*prompt.tolist(), *(x.token for x in drawn)]
        assert [x.token for x in (*scored, *drawn)] == tokens[1:]
        raw_TV = jax.nn.log_softmax(whole_forward.logits(cfg, params, tokens[:-1]))
        want = np.take_along_axis(np.asarray(raw_TV), np.array(tokens[1:])[:, None], axis=1)[:, 0]
        got = np.array([x.raw for x in (*scored, *drawn)])
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-5)
        assert [x.token for x in drawn] == np.argmax(raw_TV[len(prompt) - 1 :], axis=-1).tolist()
