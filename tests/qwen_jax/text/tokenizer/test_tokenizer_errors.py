"""Arguments, files and configurations that are refused, and what is said of them."""

import json

import pytest

from qwen_jax.text.tokenizer import backends, tokenizer


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


def test_check_vocabulary_names_the_rows_needed(bpe):
    tokenizer.check_vocabulary(bpe, num_rows=900)
    with pytest.raises(ValueError, match="vocab_size=899.*at least 900 rows"):
        tokenizer.check_vocabulary(bpe, num_rows=899)


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
            pre_tokenizer=backends.QWEN_PRE_TOKENIZER["pretokenizers"][1],
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
