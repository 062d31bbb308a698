"""A tiny random model with a byte tokenizer, ready to continue text."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import qwen2_5
from configs.sampling import SamplingParams
from infer.text import loading
from qwen_jax.decode import weights
from qwen_jax.model import transformer
from qwen_jax.text import tokenizer_training

CFG = dataclasses.replace(
    qwen2_5.tiny(),
    vocab_size=288,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    head_dim=8,
    max_position_embeddings=256,
)


@pytest.fixture(scope="session")
def loaded() -> loading.Loaded:
    leaves, tree = jax.tree.flatten(transformer.shapes(CFG))
    rng = np.random.default_rng(0)
    drawn = [jnp.asarray(rng.normal(0, 0.3, x.shape).astype(np.float32)) for x in leaves]
    words = tokenizer_training.train_bpe(["a few words, to have a corpus"], vocab_size=278)
    return loading.Loaded(
        cfg=CFG,
        params=weights.prepare(CFG, tree.unflatten(drawn), dtype=jnp.float32, form="unstacked"),
        tokenizer=words,
        defaults=SamplingParams(max_tokens=12, temperature=0.0),
        eos_ids=(5, *words.eos_ids),
        dtype=jnp.float32,
    )


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory, loaded) -> Path:
    """Another model of the same shape, as a Hugging Face folder with tokenizer and defaults."""
    for package in ("torch", "transformers"):
        pytest.importorskip(package)
    from tests.support import hf_folder

    return hf_folder.write(
        tmp_path_factory.mktemp("models") / "random",
        dataclasses.replace(loaded.cfg, eos_token_ids=(256,), bos_token_id=None, pad_token_id=256),
        tokenizer=loaded.tokenizer,
        generation={"do_sample": False, "eos_token_id": [256, 7], "max_new_tokens": 20},
        initializer_range=0.3,
    )
