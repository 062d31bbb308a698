"""Small tokenizers of either kind."""

import pytest

from qwen_jax.text import tokenizer_training
from tests.qwen_jax.text import tokenizer_oracle


@pytest.fixture(scope="session")
def bpe():
    return tokenizer_training.train_bpe(tokenizer_oracle.CORPUS, vocab_size=900)


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def pieces(request):
    return tokenizer_training.train_sentencepiece(
        tokenizer_oracle.CORPUS, vocab_size=600, model_type=request.param
    )
