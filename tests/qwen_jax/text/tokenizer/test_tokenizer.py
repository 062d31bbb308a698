"""Ids and text against transformers and sentencepiece, on awkward text; text as it comes."""

import dataclasses
import unicodedata

import hypothesis
import pytest
import sentencepiece
from hypothesis import strategies as st

from qwen_jax.text.tokenizer import formats, tokenizer
from tests.qwen_jax.text import tokenizer_oracle


@pytest.fixture(scope="module")
def control_oracle(bpe, tmp_path_factory):
    return tokenizer_oracle.load(bpe, tmp_path_factory.mktemp("control"))


@pytest.fixture(scope="module")
def text_oracle(bpe, tmp_path_factory):
    # transformers splits only tokens flagged special, so flag them all.
    tokens = tuple(dataclasses.replace(token, special=True) for token in bpe.control_tokens)
    all_special = dataclasses.replace(bpe, control_tokens=tokens)
    return tokenizer_oracle.load(
        all_special, tmp_path_factory.mktemp("text"), split_special_tokens=True
    )


@tokenizer_oracle.fuzz
@hypothesis.given(text=tokenizer_oracle.texts)
def test_bpe_ids_and_text_equal_transformers(bpe, control_oracle, text_oracle, text):
    check_against_transformers(bpe, control_oracle, text_oracle, text)


@pytest.mark.parametrize("text", tokenizer_oracle.AWKWARD)
def test_bpe_on_awkward_text_equals_transformers(bpe, control_oracle, text_oracle, text):
    check_against_transformers(bpe, control_oracle, text_oracle, text)


def check_against_transformers(bpe, control_oracle, text_oracle, text):
    plain, control = bpe.encode(text), bpe.encode(text, special="control")
    assert plain == text_oracle(text).input_ids
    assert control == control_oracle(text).input_ids
    assert not set(plain) & set(bpe.control_ids.values())
    assert bpe.decode(plain) == unicodedata.normalize("NFC", text)
    assert bpe.decode(control) == control_oracle.decode(control)
    assert bpe.decode(control, skip_special=True) == control_oracle.decode(
        control, skip_special_tokens=True
    )


def test_encode_batch_equals_encode(bpe, pieces):
    for tok in (bpe, pieces):
        for special in ("text", "control"):
            want = [tok.encode(text, special=special) for text in tokenizer_oracle.AWKWARD]
            assert tok.encode_batch(tokenizer_oracle.AWKWARD, special=special) == want


@tokenizer_oracle.fuzz
@hypothesis.given(text=tokenizer_oracle.texts)
def test_sentencepiece_ids_equal_the_library(pieces, text):
    reference = sentencepiece.SentencePieceProcessor(model_proto=pieces.backend.source)
    ids = pieces.encode(text)
    assert ids == reference.encode(text)
    assert not set(ids) & set(pieces.control_ids.values())
    assert pieces.decode(ids) == text.replace("\u2581", " ")
    control = pieces.encode(text, special="control")
    assert pieces.decode(control) == text.replace("\u2581", " ")
    spelled = formats.QWEN_CONTROL_TOKENS
    assert any(token in text for token in spelled) == bool(
        set(control) & set(pieces.control_ids.values())
    )


def test_special_ids_are_those_that_decoding_skips(bpe):
    ids = bpe.encode("<|im_start|>a<tool_call>b</tool_call><|im_end|>", special="control")
    assert bpe.decode(ids, skip_special=True) == "a<tool_call>b</tool_call>"
    assert len(bpe.special_ids) == 14
    assert len(bpe.control_tokens) == 22


@tokenizer_oracle.fuzz
@hypothesis.given(data=st.data())
def test_stream_equals_decode(bpe, pieces, data):
    tok = data.draw(st.sampled_from([bpe, pieces]))
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size + 5), max_size=30))
    skip = data.draw(st.booleans())
    stream = tokenizer.StreamDecoder(tok, skip_special=skip)
    chunks = [stream.push([index]) for index in ids]
    assert "".join([*chunks, stream.finish()]) == tok.decode(ids, skip_special=skip)


@tokenizer_oracle.fuzz
@hypothesis.given(text=tokenizer_oracle.texts)
def test_stream_never_splits_a_character(bpe, text):
    stream = tokenizer.StreamDecoder(bpe)
    chunks = [stream.push([index]) for index in bpe.encode(text)]
    assert stream.finish() == ""
    # A split character would show as U+FFFD, and as a chunk that is no prefix of the rest.
    assert "".join(chunks) == unicodedata.normalize("NFC", text)


@tokenizer_oracle.fuzz
@hypothesis.given(ids=st.lists(st.integers(0, 910), max_size=20))
def test_decoding_broken_utf8_equals_transformers(bpe, control_oracle, ids):
    assert bpe.decode(ids) == control_oracle.decode(ids)
