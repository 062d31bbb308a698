"""An engine's greedy tokens are those that transformers generates."""

import numpy as np
import pytest
import torch

from tests.parity import oracle
from tests.support import answers

NEW = 48


@pytest.mark.parametrize("preset", ["qwen2.5-0.5b", "qwen2.5-7b"], ids=["tied", "untied"])
def test_greedy_tokens(preset):
    cfg = oracle.shrink(preset)
    theirs = oracle.build(cfg)
    prompts = [np.random.default_rng(n).integers(1, cfg.vocab_size, n) for n in (1, 13, 40)]
    got = answers.greedy(answers.engine(cfg, oracle.params(theirs, cfg)), prompts, max_tokens=NEW)
    for prompt, ours in zip(prompts, got, strict=True):
        ids = torch.from_numpy(prompt[None])
        with torch.no_grad():
            want = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip
        assert ours == want[0, len(prompt) :].tolist()
        assert len(set(ours)) > 3  # not a fixed point that any model would reach
