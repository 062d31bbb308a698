"""A tokenizer of bytes, and corpora written into a temporary folder."""

import dataclasses
import json

import pytest


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    vocab_size: int = 260
    pad_id: int | None = 257
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = (256,)

    def encode(self, text):
        return list(text.encode())


END = 256


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes texts as `name` and gives the path."""

    def write(name, texts):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return write


@pytest.fixture
def numbered(write_jsonl):
    """A JSONL file of documents "<tag><number> ..." with lengths of 1 to some 40 tokens."""

    def write(name, count, tag="d"):
        return write_jsonl(name, [f"{tag}{i} " + "x" * (i * 7 % 40) for i in range(count)])

    return write
