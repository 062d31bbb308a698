"""A trained checkpoint against transformers: perplexity of a text, and greedy answers.

QWEN_JAX_PERPLEXITY_TEXT names a text file to use instead of Python's own reference, and
QWEN_JAX_PERPLEXITY_TOKENS how many of its tokens (0: all).
"""

import json
import math
import os
from pathlib import Path
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from configs.models import huggingface
from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint import load
from qwen_jax.model import transformer
from qwen_jax.text.chat import encoding as chat
from qwen_jax.text.tokenizer import tokenizer
from tests.support import answers, real_checkpoint
from train.losses import language_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # minutes of one core for the oracle
B, T = 4, 512
NEW = 64

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "How many days has a leap year?",
    "Translate 'good morning' into Spanish.",
    "What is 12 + 30?",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "Explain photosynthesis to a child.",
    "List the planets of the solar system.",
    "What does a compiler do?",
    "Write a Python function that reverses a string.",
    "Why is the sky blue?",
    "Suggest a name for a cat.",
    "What is the boiling point of water?",
    "Summarise the story of Cinderella.",
    "What is the opposite of 'generous'?",
    "Tell me a short joke.",
    "Which is larger, a whale or an elephant?",
    "Describe Mount Everest — altitude, place, first ascent…",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return real_checkpoint.build(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def cfg(folder) -> ModelConfig:
    return huggingface.read_model(json.loads((folder / "config.json").read_text()))


@pytest.fixture(scope="module")
def params(folder) -> dict:
    return load.load_params(folder, dtype="float32")


def _text() -> str:
    """The text of a named file, or of Python's own reference, which comes with it."""
    if path := os.environ.get("QWEN_JAX_PERPLEXITY_TEXT"):
        return Path(path).read_text(encoding="utf-8")
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def _rows(folder) -> tuple[np.ndarray, np.ndarray]:
    """Token rows [R, T + 1] that overlap by one, and weights [R, T] that leave out the padding."""
    ids = tokenizer.load(folder).encode(_text())
    limit = int(os.environ.get("QWEN_JAX_PERPLEXITY_TOKENS", 8192))
    ids = np.array(ids[: limit or None])
    assert len(ids) > 2000, "too little text to judge"
    count = -(-(len(ids) - 1) // (B * T)) * B
    padded = np.zeros(count * T + 1, np.int64)
    padded[: len(ids)] = ids
    rows = np.stack([padded[i * T : i * T + T + 1] for i in range(count)])
    weights = (np.arange(count * T) < len(ids) - 1).astype(np.float32).reshape(count, T)
    return rows, weights


def test_perplexity(folder, theirs, cfg, params):
    rows, weights = _rows(folder)

    @jax.jit
    def ours(params, tokens_BT, targets_BT, weights_BT):
        hidden_BTD = transformer.apply(cfg, params, tokens_BT).hidden_BTD
        kernel_DV = transformer.output_kernel(cfg, params)
        return language_model.cross_entropy(
            hidden_BTD, kernel_DV, targets_BT, weights_BT, chunk=128
        ).cross_entropy

    got = want = 0.0
    for i in range(0, len(rows), B):
        tokens, targets, weight = rows[i : i + B, :-1], rows[i : i + B, 1:], weights[i : i + B]
        got += float(ours(params, jnp.asarray(tokens), jnp.asarray(targets), jnp.asarray(weight)))
        with torch.no_grad():
            logits = theirs(torch.from_numpy(tokens), use_cache=False).logits
        for row, target, w in zip(logits, targets, weight, strict=True):
            # In float64: torch's float32 sum over the vocabulary loses 1e-4 of the perplexity.
            entropy = torch.nn.functional.cross_entropy(
                row.double(), torch.from_numpy(target), reduction="none"
            )
            want += float((entropy * torch.from_numpy(w)).sum())
    got, want = math.exp(got / weights.sum()), math.exp(want / weights.sum())
    print(f"perplexity over {int(weights.sum())} tokens: ours {got:.6f}, transformers {want:.6f}")
    assert 2 < want < 100, "a trained model on a real text"
    assert got == pytest.approx(want, rel=1e-4)


def test_greedy_answers_are_the_same_text(folder, theirs, cfg, params):
    """20 prompts in one batch here, each alone there; texts by each side's own tokenizer."""
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tokenizer.load(folder)
    prompts, want = [], []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = chat.encode(messages, tokenizer=ours, add_generation_prompt=True, mask="none")
        their_ids = their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert list(ids.token_ids) == list(their_ids)
        prompts.append(ids.token_ids)
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([their_ids]),
                attention_mask=torch.ones(1, len(their_ids), dtype=torch.long),
                max_new_tokens=NEW,
                do_sample=False,
            )
        want.append(out[0, len(their_ids) :].tolist())
    engine = answers.engine(cfg, params, num_slots=8, max_length=256, eos_ids=cfg.eos_token_ids)
    got = answers.greedy(engine, prompts, max_tokens=NEW)
    assert len(want) == 20 and len({tuple(w) for w in want}) == 20
    for question, mine, their in zip(QUESTIONS, got, want, strict=True):
        assert mine == their, question
        text = ours.decode(mine, skip_special=True)
        assert text == their_tokenizer.decode(their, skip_special_tokens=True), question
        assert text.strip()
