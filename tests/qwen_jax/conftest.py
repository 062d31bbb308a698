"""Small tokenizers of either kind."""

import pytest

from qwen_jax import tokenizer_train
from tests.qwen_jax import tokenizer_oracle


@pytest.fixture(scope="session")
def bpe():
    return tokenizer_train.train_bpe(tokenizer_oracle.CORPUS, vocab_size=900)


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def pieces(request):
    return tokenizer_train.train_sentencepiece(
        tokenizer_oracle.CORPUS, vocab_size=600, model_type=request.param
    )
