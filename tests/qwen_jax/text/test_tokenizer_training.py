"""Training of tokenizers: ids, determinism, and errors that name the limit."""

import dataclasses
import inspect
import textwrap

import pytest

from qwen_jax.text import tokenizer_training
from qwen_jax.text.tokenizer import formats

TEXTS = ["the cat sat on the mat with the other cat\n", "numbers 12 34 and naïve 漢字\n"] * 50
TEXTS.append(inspect.getsource(textwrap))
TRAINERS = [tokenizer_training.train_bpe, tokenizer_training.train_sentencepiece]


def test_bpe_numbers_bytes_merges_controls():
    tok = tokenizer_training.train_bpe(TEXTS, vocab_size=300)
    assert tok.vocab_size == 300
    assert [token.content for token in tok.control_tokens] == list(formats.QWEN_CONTROL_TOKENS)
    assert [token.id for token in tok.control_tokens] == list(range(278, 300))
    assert sorted(tok.token_bytes(i) for i in range(256)) == [bytes([i]) for i in range(256)]
    assert tok.token_id("!") == 0
    assert tok.eos_ids == (tok.pad_id,) == (278,)


def test_sentencepiece_fills_the_vocabulary():
    tok = tokenizer_training.train_sentencepiece(TEXTS, vocab_size=500, eos_token="<|im_end|>")
    assert tok.vocab_size == 500
    assert len(tok.control_tokens) == 22
    assert tok.eos_ids == (tok.token_id("<|im_end|>"),)
    assert tok.decode(tok.encode("12\t漢 \U0001f600")) == "12\t漢 \U0001f600"
    assert len(tok.encode("1234")) == 4


@pytest.mark.parametrize("train", TRAINERS)
def test_training_is_deterministic_and_takes_iterators(train):
    first = train(TEXTS, vocab_size=500)
    assert train(iter(TEXTS), vocab_size=500) == first
    assert train((text for text in TEXTS), vocab_size=500).fingerprint == first.fingerprint


def test_unigram_is_deterministic():
    first = tokenizer_training.train_sentencepiece(TEXTS, vocab_size=500, model_type="unigram")
    again = tokenizer_training.train_sentencepiece(TEXTS, vocab_size=500, model_type="unigram")
    assert dataclasses.asdict(again) == dataclasses.asdict(first)


@pytest.mark.parametrize("train", TRAINERS)
def test_long_and_strange_texts_are_used(train):
    # SentencePiece by itself would drop texts above 4192 bytes and texts with U+2585.
    tok = train([*TEXTS, "zyzzyva " * 2000 + "\u2585 \x00 \t end"], vocab_size=400)
    assert len(tok.encode(" zyzzyva zyzzyva")) <= 2


@pytest.mark.parametrize("train", TRAINERS)
@pytest.mark.parametrize("texts", [[], [""], iter(())])
def test_empty_corpus_is_refused(train, texts):
    with pytest.raises(ValueError, match="corpus is empty"):
        train(texts, vocab_size=1000)


@pytest.mark.parametrize(
    ("train", "minimum"),
    # 256 bytes + 22 control tokens; for SentencePiece also <unk> and the 4 characters of the text.
    [(tokenizer_training.train_bpe, 278), (tokenizer_training.train_sentencepiece, 283)],
)
def test_small_vocabulary_is_refused_with_the_minimum(train, minimum):
    with pytest.raises(ValueError, match=rf"vocab_size=277 is too small, the minimum.*{minimum}"):
        train(["abab c"] * 9, vocab_size=277)
    assert train(["abab c"] * 9, vocab_size=minimum).vocab_size == minimum


@pytest.mark.parametrize("train", TRAINERS)
def test_large_vocabulary_is_refused_with_the_maximum(train):
    with pytest.raises(ValueError, match=r"too large for this corpus, which yields \d+") as error:
        train(TEXTS, vocab_size=50000)
    maximum = int(str(error.value).split("yields ")[1].split()[0])
    assert train(TEXTS, vocab_size=maximum).vocab_size == maximum


@pytest.mark.parametrize("train", TRAINERS)
def test_bad_corpora_are_refused(train):
    with pytest.raises(ValueError, match="corpus is one str"):
        train("text", vocab_size=300)
    with pytest.raises(ValueError, match="text 1 of the corpus is a int"):
        train(["a", 1], vocab_size=300)
    with pytest.raises(ValueError, match="text 1 of the corpus has a lone surrogate"):
        train(["a", "b\ud800"], vocab_size=300)

    def failing():
        yield "text"
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        train(failing(), vocab_size=300)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="eos_token='x' is no control token"):
        tokenizer_training.train_bpe(TEXTS, vocab_size=300, eos_token="x")
    with pytest.raises(ValueError, match="model_type='word'"):
        tokenizer_training.train_sentencepiece(TEXTS, vocab_size=300, model_type="word")
    with pytest.raises(ValueError, match="character_coverage=2"):
        tokenizer_training.train_sentencepiece(TEXTS, vocab_size=300, character_coverage=2)
