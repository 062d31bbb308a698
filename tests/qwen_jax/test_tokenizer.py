"""Tokenizers against transformers and sentencepiece, on awkward text, in every file format."""

import argparse
import base64
import dataclasses
import inspect
import json
import os
import pickle
import subprocess
import sys
import unicodedata

import hypothesis
import pytest
import sentencepiece
import transformers
from hypothesis import strategies as st

from qwen_jax import tokenizer, tokenizer_backends, tokenizer_formats, tokenizer_train

CORPUS = [
    inspect.getsource(argparse),
    "The quick brown fox doesn't jump; they'll've jumped 1234567890 times.\r\n\r\n\tTabs   too.",
    "Ελληνικά, кириллица, עברית, العربية, हिन्दी, ไทย, 汉字漢字, かな, 한국어, ქართული.",
    "naïve café e\u0301 ﬁ Å 👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈",
] * 2
AWKWARD = [
    "",
    " ",
    "don't I'LL we've 'ſ",
    "1234567890 3.14 ٣٤٥",
    "a\r\nb\r\n\r\nc\rd\n",
    "x" + " " * 300 + "y" + "\n" * 70 + "\t" * 9,
    "e\u0301 \u1112\u1161\u11ab \u212b ﬁ",
    "👩‍👩‍👧‍👦 🇩🇪🇫🇷 🏳️‍🌈 ✌🏽",
    "\x00\x07\x1b[0m\x7f\x85\u2028\u200d\ufeff\ufdd0\U0010ffff",
    "Ελλάδα Россия ישראל العربية हिन्दी ไทย 汉字 かな 한국어 ქართ",
    "<|im_end|>",
    "a <|im_start|>user\nhi<|im_end|> b<|endoftext|>",
    "<tool_call>{}</tool_call> <|fim_prefix|>x<|fim_middle|>",
    "<<|im_end|>> <|im_<|im_end|>end|> <|im_end|>\u0338 <|im_ end|>",
]
characters = st.characters(exclude_categories=("Cs",))
texts = st.lists(
    st.one_of(st.sampled_from(AWKWARD), st.text(characters, max_size=6)), max_size=8
).map("".join)
fuzz = hypothesis.settings(max_examples=150, deadline=None)


@pytest.fixture(scope="module")
def bpe():
    return tokenizer_train.train_bpe(CORPUS, vocab_size=900)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def pieces(request):
    return tokenizer_train.train_sentencepiece(CORPUS, vocab_size=600, model_type=request.param)


def oracle(tok, folder, **options):
    tok.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def control_oracle(bpe, tmp_path_factory):
    return oracle(bpe, tmp_path_factory.mktemp("control"))


@pytest.fixture(scope="module")
def text_oracle(bpe, tmp_path_factory):
    # transformers splits only tokens flagged special, so flag them all.
    tokens = tuple(dataclasses.replace(token, special=True) for token in bpe.control_tokens)
    all_special = dataclasses.replace(bpe, control_tokens=tokens)
    return oracle(all_special, tmp_path_factory.mktemp("text"), split_special_tokens=True)


@fuzz
@hypothesis.given(text=texts)
def test_bpe_ids_and_text_equal_transformers(bpe, control_oracle, text_oracle, text):
    check_against_transformers(bpe, control_oracle, text_oracle, text)


@pytest.mark.parametrize("text", AWKWARD)
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
            want = [tok.encode(text, special=special) for text in AWKWARD]
            assert tok.encode_batch(AWKWARD, special=special) == want


@fuzz
@hypothesis.given(text=texts)
def test_sentencepiece_ids_equal_the_library(pieces, text):
    reference = sentencepiece.SentencePieceProcessor(model_proto=pieces.backend.source)
    ids = pieces.encode(text)
    assert ids == reference.encode(text)
    assert not set(ids) & set(pieces.control_ids.values())
    assert pieces.decode(ids) == text.replace("\u2581", " ")
    control = pieces.encode(text, special="control")
    assert pieces.decode(control) == text.replace("\u2581", " ")
    spelled = tokenizer_formats.QWEN_CONTROL_TOKENS
    assert any(token in text for token in spelled) == bool(
        set(control) & set(pieces.control_ids.values())
    )


def test_saved_sentencepiece_equals_transformers(tmp_path):
    tok = tokenizer_train.train_sentencepiece(CORPUS, vocab_size=600)
    reference = oracle(tok, tmp_path)
    assert len(reference) == tok.vocab_size
    assert (reference.eos_token, reference.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    for text in [*CORPUS, *AWKWARD]:
        ids = tok.encode(text, special="control")
        assert reference(text).input_ids == ids
        assert reference.decode(ids) == tok.decode(ids)
    assert tokenizer.load(tmp_path) == tok


def test_sentencepiece_dummy_prefix_stands_only_at_the_start(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
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


@fuzz
@hypothesis.given(data=st.data())
def test_stream_equals_decode(bpe, pieces, data):
    tok = data.draw(st.sampled_from([bpe, pieces]))
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size + 5), max_size=30))
    skip = data.draw(st.booleans())
    stream = tokenizer.StreamDecoder(tok, skip_special=skip)
    chunks = [stream.push([index]) for index in ids]
    assert "".join([*chunks, stream.finish()]) == tok.decode(ids, skip_special=skip)


@fuzz
@hypothesis.given(text=texts)
def test_stream_never_splits_a_character(bpe, text):
    stream = tokenizer.StreamDecoder(bpe)
    chunks = [stream.push([index]) for index in bpe.encode(text)]
    assert stream.finish() == ""
    # A split character would show as U+FFFD, and as a chunk that is no prefix of the rest.
    assert "".join(chunks) == unicodedata.normalize("NFC", text)


@fuzz
@hypothesis.given(ids=st.lists(st.integers(0, 910), max_size=20))
def test_decoding_broken_utf8_equals_transformers(bpe, control_oracle, ids):
    assert bpe.decode(ids) == control_oracle.decode(ids)


def write_formats(bpe, folder):
    """Write the vocabulary of `bpe` in each format, without and with a tokenizer_config.json."""
    model = bpe.backend.tokenizer_json()["model"]
    ranks = [
        f"{base64.b64encode(tokenizer_backends.token_to_bytes(token)).decode()} {index}"
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
    lost = {tokenizer_backends.bytes_to_token(bytes([b])) for b in (0x04, 0xE2, 0xFF)}
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


def test_special_ids_are_those_that_decoding_skips(bpe):
    ids = bpe.encode("<|im_start|>a<tool_call>b</tool_call><|im_end|>", special="control")
    assert bpe.decode(ids, skip_special=True) == "a<tool_call>b</tool_call>"
    assert len(bpe.special_ids) == 14
    assert len(bpe.control_tokens) == 22


def test_pickle_keeps_the_vocabulary_alone(bpe, pieces):
    for tok in (bpe, pieces):
        tok.decode(tok.encode("fill the caches"))
        copy = pickle.loads(pickle.dumps(tok))
        assert copy == tok
        assert copy.fingerprint == tok.fingerprint
        assert copy.encode("The fox") == tok.encode("The fox")
        assert len(pickle.dumps(tok)) < len(tok.backend.source) * 1.2 + 10_000


def test_fingerprint_tells_vocabularies_apart(bpe, pieces):
    other = tokenizer_train.train_bpe(CORPUS, vocab_size=901)
    fewer = dataclasses.replace(bpe, control_tokens=bpe.control_tokens[:-1])
    roles = dataclasses.replace(bpe, eos_ids=(), chat_template=None)
    prints = [tok.fingerprint for tok in (bpe, pieces, other, fewer)]
    assert len(set(prints)) == 4
    assert roles.fingerprint == bpe.fingerprint


FORKED = """
import os, sys
from qwen_jax import tokenizer
tok = tokenizer.load(sys.argv[1])
batch = ["some text"] * 200
want = tok.encode_batch(batch)
before = os.environ.get("TOKENIZERS_PARALLELISM")
child = os.fork()
if child == 0:
    os._exit(tok.encode_batch(batch) != want)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert os.environ.get("TOKENIZERS_PARALLELISM") == before
"""


@pytest.mark.parametrize("setting", [None, "true"])
def test_forked_child_encodes_batches_in_silence(bpe, tmp_path, setting):
    bpe.save(tmp_path)
    env = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    env |= {"TOKENIZERS_PARALLELISM": setting} if setting else {}
    command = [sys.executable, "-c", FORKED, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_check_vocabulary_names_the_rows_needed(bpe):
    tokenizer.check_vocabulary(bpe, num_rows=900)
    with pytest.raises(ValueError, match="vocab_size=899.*at least 900 rows"):
        tokenizer.check_vocabulary(bpe, num_rows=899)


def test_bad_arguments_are_refused(bpe):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at character 2"):
        bpe.encode("ab\ud800")
    with pytest.raises(ValueError, match="text 1 of the batch has the lone surrogate"):
        bpe.encode_batch(["a", "\udfff"])
    with pytest.raises(ValueError, match="text is a bytes"):
        bpe.encode(b"a")
    with pytest.raises(ValueError, match="got one str"):
        bpe.encode_batch("abc")
    with pytest.raises(ValueError, match="special='all'"):
        bpe.encode("a", special="all")
    with pytest.raises(ValueError, match="no token 'nonsense'"):
        bpe.token_id("nonsense")
    with pytest.raises(ValueError, match="-1 is negative"):
        bpe.decode([-1])


def broken(content, **changes):
    return json.dumps(content | changes)


def test_bad_files_are_refused(bpe, tmp_path):
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    good = json.loads(file.read_text(encoding="utf-8"))
    model, added = good["model"], good["added_tokens"]
    without_a = {token: index for token, index in model["vocab"].items() if token != "a"}
    spelled = model["vocab"] | {"<|im_end|>": 1000}
    cases = {
        "is not valid JSON": "{",
        "expected a JSON object": "[]",
        "not byte-level BPE": broken(good, pre_tokenizer={"type": "Whitespace"}),
        "dropout=0.1": broken(good, model=model | {"dropout": 0.1}),
        "Token .a. out of vocabulary": broken(good, model=model | {"vocab": without_a}),
        "post-processor 'TemplateProcessing'": broken(
            good, post_processor={"type": "TemplateProcessing"}
        ),
        "cannot be read as a tokenizer": broken(good, model=model | {"merges": [["q", "qqqq"]]}),
        "lstrip=true": broken(good, added_tokens=[added[0] | {"lstrip": True}]),
        "belong to different tokenizers": broken(good, added_tokens=[added[0] | {"id": 5000}]),
        "shorter than 2 characters": broken(
            good, added_tokens=[*added, added[0] | {"content": "x", "id": 6000}]
        ),
        "id 5 belongs to control token": broken(
            good, added_tokens=[*added, added[0] | {"content": "<new>", "id": 5}]
        ),
        "plain text spells control token": broken(
            good,
            model=model | {"vocab": spelled, "ignore_merges": True},
            pre_tokenizer=tokenizer_backends.QWEN_PRE_TOKENIZER["pretokenizers"][1],
            added_tokens=[
                token if token["content"] != "<|im_end|>" else token | {"id": 1000}
                for token in added
            ],
        ),
    }
    for message, text in cases.items():
        file.write_text(text, encoding="utf-8")
        if "plain text" in message:
            (tmp_path / "tokenizer_config.json").unlink()
        with pytest.raises(ValueError, match=message):
            tokenizer.load(tmp_path)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        tokenizer.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="expected tokenizer.json, vocab.json and merges.txt"):
        tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="has no merges.txt"):
        tokenizer.load(tmp_path / "vocab.json")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nab\n")
    with pytest.raises(ValueError, match="merges.txt:3: 'ab' is not two tokens"):
        tokenizer.load(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "a.tiktoken").write_text("IQ== 0\nnonsense\n")
    with pytest.raises(ValueError, match="a.tiktoken:2: 'nonsense'"):
        tokenizer.load(tmp_path)
    (tmp_path / "b.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(ValueError, match=r"several tokenizers \(a.tiktoken, b.tiktoken\)"):
        tokenizer.load(tmp_path)
    (tmp_path / "c.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="c.model is not a SentencePiece model"):
        tokenizer.load(tmp_path / "c.model")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="notes.txt is no tokenizer file"):
        tokenizer.load(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"add_bos_token": True}, "add_bos_token=true is not supported"),
        ({"add_prefix_space": True}, "add_prefix_space=true is not supported"),
        ({"eos_token": "<nothing>"}, "eos_token='<nothing>'.*is not a token"),
        ({"chat_template": [{"name": "a"}, {"name": "b"}]}, "2 chat templates"),
    ],
)
def test_bad_configs_are_refused(bpe, tmp_path, config, message):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        tokenizer.load(tmp_path)


def test_eos_id_out_of_range_is_refused(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 900}')
    with pytest.raises(ValueError, match="eos id 900"):
        tokenizer.load(tmp_path)
