"""Every format of files, and the configuration beside it."""

import base64
import dataclasses
import json

import pytest
import sentencepiece
import transformers

from qwen_jax.text import tokenizer_training
from qwen_jax.text.tokenizer import backends, tokenizer
from tests.qwen_jax.text import tokenizer_oracle


def write_formats(bpe, folder):
    """Write the vocabulary of `bpe` in each format, without and with a tokenizer_config.json."""
    model = bpe.backend.tokenizer_json()["model"]
    ranks = [
        f"{base64.b64encode(backends.token_to_bytes(token)).decode()} {index}"
        for token, index in model["vocab"].items()
    ]
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"])
    for name in ("bare", "configured"):
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / name / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "tiktoken").mkdir()
    (folder / "tiktoken" / "small.tiktoken").write_text("\n".join(ranks))
    bpe.save(folder / "saved")
    config = (folder / "saved" / "tokenizer_config.json").read_text(encoding="utf-8")
    (folder / "configured" / "tokenizer_config.json").write_text(config, encoding="utf-8")


def test_every_format_gives_the_same_tokenizer(bpe, tmp_path):
    write_formats(bpe, tmp_path)
    assert tokenizer.load(tmp_path / "saved") == bpe
    assert tokenizer.load(tmp_path / "configured") == bpe
    for name in (
        "saved/tokenizer.json",
        "bare",
        "bare/vocab.json",
        "bare/merges.txt",
        "tiktoken",
        "tiktoken/small.tiktoken",
    ):
        loaded = tokenizer.load(tmp_path / name)
        assert loaded.fingerprint == bpe.fingerprint
        assert loaded.control_tokens == bpe.control_tokens
        assert loaded.eos_ids == bpe.eos_ids
        assert loaded.backend == bpe.backend


def load_ranks(folder, *tokens):
    single = [bytes([byte]) for byte in range(256)]
    lines = [f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate([*single, *tokens])]
    (folder / "some.tiktoken").write_text("\n".join(lines))
    return tokenizer.load(folder)


def test_merges_of_a_rank_file_follow_the_ranks(tmp_path):
    def merges(*tokens):
        return load_ranks(tmp_path, *tokens).backend.tokenizer_json()["model"]["merges"]

    # Two cuts of "abc" into known tokens: the lower rank is merged first.
    assert merges(b"ab", b"bc", b"abc")[-1] == ["ab", "c"]
    assert merges(b"bc", b"ab", b"abc")[-1] == ["a", "bc"]
    assert merges(b"bc", b"ab", b"bcd", b"abcd")[-1] == ["a", "bcd"]
    # No cut at all; and an only cut, a+bcd, which merging "ab" first never reaches.
    for tokens in ([b"ab", b"bc", b"abcd"], [b"ab", b"bc", b"bcd", b"abcd"]):
        with pytest.raises(ValueError, match="abcd.*is not made of two tokens"):
            load_ranks(tmp_path, *tokens)
    with pytest.raises(ValueError, match="byte tokens are missing"):
        (tmp_path / "some.tiktoken").write_text("IQ== 0")
        tokenizer.load(tmp_path)


def test_bytes_without_a_token_are_refused_where_they_occur(bpe, tmp_path):
    """Vocabularies trained without the whole alphabet load; the library would drop such bytes."""
    content = bpe.backend.tokenizer_json()
    lost = {backends.bytes_to_token(bytes([b])) for b in (0x04, 0xE2, 0xFF)}
    model = content["model"]
    kept = [m for m in model["merges"] if not any(char in part for part in m for char in lost)]
    vocabulary = {t: i for t, i in model["vocab"].items() if not lost.intersection(t)}
    content["model"] = model | {"vocab": vocabulary, "merges": kept}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = tokenizer.load(tmp_path)
    assert loaded.decode(loaded.encode("plain text, ünicode")) == "plain text, ünicode"
    for text, byte in (("a\x04b", "0x04"), ("5 €", "0xE2")):
        for encode in (loaded.encode, lambda t: loaded.encode_batch(["fine", t])):
            with pytest.raises(ValueError, match=f"no token for byte {byte}"):
                encode(text)


def test_roles_come_from_the_config_files(bpe, tmp_path):
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|fim_pad|>", "bos_token": None}
    chat = dataclasses.replace(bpe, chat_template="from the config")
    chat.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("from the file")
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [bpe.token_id("<|im_end|>"), bpe.token_id("<|endoftext|>")]})
    )
    loaded = tokenizer.load(tmp_path)
    assert loaded.eos_ids == (bpe.token_id("<|im_end|>"), bpe.token_id("<|endoftext|>"))
    assert loaded.pad_id == bpe.token_id("<|fim_pad|>")
    assert loaded.bos_id is None
    assert loaded.chat_template == "from the file"
    loaded.save(tmp_path / "again")
    assert tokenizer.load(tmp_path / "again") == loaded
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert reference.eos_token == "<|im_end|>"
    assert reference.chat_template == "from the file"


def test_saved_sentencepiece_equals_transformers(tmp_path):
    tok = tokenizer_training.train_sentencepiece(tokenizer_oracle.CORPUS, vocab_size=600)
    reference = tokenizer_oracle.load(tok, tmp_path)
    assert len(reference) == tok.vocab_size
    assert (reference.eos_token, reference.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    for text in [*tokenizer_oracle.CORPUS, *tokenizer_oracle.AWKWARD]:
        ids = tok.encode(text, special="control")
        assert reference(text).input_ids == ids
        assert reference.decode(ids) == tok.decode(ids)
    assert tokenizer.load(tmp_path) == tok


def test_sentencepiece_dummy_prefix_stands_only_at_the_start(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tokenizer_oracle.CORPUS),
        model_prefix=str(tmp_path / "prefix"),
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<|im_end|>"],
        max_sentence_length=10**6,
        minloglevel=2,
    )
    tok = tokenizer.load(tmp_path / "prefix.model")
    end = tok.token_id("<|im_end|>")
    plain = tok.encode("The fox<|im_end|>The fox")
    assert end not in plain
    ids = tok.encode("The fox<|im_end|>The fox", special="control")
    assert ids.count(end) == 1
    assert [tok.decode(ids), tok.decode(plain)] == ["The fox<|im_end|>The fox"] * 2
    assert (tok.eos_ids, tok.bos_id) == ((tok.token_id("</s>"),), tok.token_id("<s>"))
