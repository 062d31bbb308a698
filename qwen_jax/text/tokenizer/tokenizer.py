"""Tokenizers: Qwen's byte-level BPE and SentencePiece behind one interface.

Text that comes from outside is encoded with `special="text"`, the default: a control token spelled
inside it stays text. `special="control"` parses control tokens and is for text we wrote ourselves.
"""

import codecs
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen_jax import storage
from qwen_jax.text.tokenizer import backends, formats
from qwen_jax.text.tokenizer.backends import Backend
from qwen_jax.text.tokenizer.formats import ControlToken

Special = Literal["text", "control"]

# Key of tokenizer_config.json for end tokens beyond its one eos_token, which has no standard place.
_ALL_EOS = "all_eos_tokens"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A vocabulary, its control tokens, and the roles that some of them play.

    `eos_ids` holds the tokens that end a generation, the one named eos_token first.
    `control_tokens` are all tokens that text cannot spell; `special_ids` those of them that
    decoding can skip. Instances are immutable, comparable, and pickled as their vocabulary alone.
    """

    backend: Backend
    control_tokens: tuple[ControlToken, ...]
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    bos_id: int | None = None
    chat_template: str | None = None
    model_max_length: int | None = None  # tokens; kept for transformers, not enforced

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: the largest id plus one."""
        regular = max(self.backend.vocabulary.values(), default=-1)
        return max([regular, *(token.id for token in self.control_tokens)]) + 1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self.control_tokens if token.special)

    @functools.cached_property
    def control_ids(self) -> Mapping[str, int]:
        """Ids of the control tokens by their spelling."""
        return {token.content: token.id for token in self.control_tokens}

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Finds the spelling of a control token in text: the leftmost, then the longest."""
        return backends.longest_first(list(self.control_ids))

    @functools.cached_property
    def _bytes_by_id(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for index, data in self.backend.token_bytes.items():
            table[index] = data
        for token in self.control_tokens:
            table[token.id] = token.content.encode()
        return table

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that ids depend on: vocabulary, merges, rules, control tokens.

        The same vocabulary has one fingerprint from whichever file format it was read.
        """
        controls = [[token.id, token.content] for token in self.control_tokens]
        digest = hashlib.sha256(self.backend.canonical())
        digest.update(json.dumps(controls).encode())
        return digest.hexdigest()

    def token_id(self, token: str) -> int:
        """Return the id of a token given as the vocabulary spells it; `ValueError` if unknown."""
        index = self.control_ids.get(token, self.backend.vocabulary.get(token))
        if index is None:
            raise ValueError(f"the tokenizer has no token {token!r}; use encode() for text")
        return index

    def token_bytes(self, index: int) -> bytes:
        """Return the bytes that a token adds to the text; none for an id without a token."""
        if index < 0:
            raise ValueError(f"token id {index} is negative")
        return self._bytes_by_id[index] if index < self.vocab_size else b""

    def encode(self, text: str, *, special: Special = "text") -> list[int]:
        """Encode one text; nothing (no bos, no eos) is added to it.

        `special="text"` leaves control tokens spelled in `text` as ordinary text, all of them, also
        those that transformers parses in spite of `split_special_tokens=True` (`<tool_call>`).
        `special="control"` gives them their ids. Raises `ValueError` for lone surrogates.
        """
        _check_text(text)
        if _check_special(special) == "text":
            return self.backend.encode(text)
        ids, end = [], 0
        for match in self.control_pattern.finditer(text):
            ids += self.encode_segment(text[end : match.start()], at_start=end == 0)
            ids.append(self.control_ids[match[0]])
            end = match.end()
        return ids + self.encode_segment(text[end:], at_start=end == 0)

    def encode_segment(self, text: str, *, at_start: bool) -> list[int]:
        """Encode plain text that stands before, between or after control tokens."""
        _check_text(text)
        return self.backend.encode(text, at_start=at_start) if text else []

    def encode_batch(self, texts: Sequence[str], *, special: Special = "text") -> list[list[int]]:
        """Encode several texts as `encode` does, in parallel where the library can."""
        if isinstance(texts, str):
            raise ValueError("encode_batch takes a sequence of texts, got one str; use encode")
        for number, text in enumerate(texts):
            _check_text(text, name=f"text {number} of the batch")
        if _check_special(special) == "text":
            return self.backend.encode_batch(texts)
        return [self.encode(text, special=special) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD.

        An id without a token, such as a padding row of the embedding, decodes to nothing, as in
        transformers; a negative one is a `ValueError`.
        """
        decoder = StreamDecoder(self, skip_special=skip_special)
        return decoder.push(ids) + decoder.finish()

    def save(self, folder: str | Path) -> None:
        """Write files that `load` and transformers' `AutoTokenizer` read.

        tokenizer.json, tokenizer_config.json (with the chat template) and, for SentencePiece,
        tokenizer.model. `ValueError` where a SentencePiece model has no equal tokenizer.json.
        """
        folder = Path(folder)
        content = self.backend.tokenizer_json()
        entries = [_added_token(token) for token in self.control_tokens]
        content["added_tokens"] = entries
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.backend, backends.SentencePiece):
            _write(folder / "tokenizer.model", self.backend.source)
        _write(folder / "tokenizer.json", _json_bytes(content, indent=None))
        _write(folder / "tokenizer_config.json", _json_bytes(self._config(entries), indent=2))

    def _config(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        spelling = {token.id: token.content for token in self.control_tokens}
        spelling |= {
            index: token
            for token, index in self.backend.vocabulary.items()
            if index in (*self.eos_ids, self.pad_id, self.bos_id) and index not in spelling
        }
        eos = [spelling[index] for index in self.eos_ids]
        config: dict[str, Any] = {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(entry["id"]): {key: entry[key] for key in entry if key != "id"}
                for entry in entries
            },
            "bos_token": spelling.get(self.bos_id),
            "clean_up_tokenization_spaces": False,
            "eos_token": eos[0] if eos else None,
            "errors": "replace",
            "pad_token": spelling.get(self.pad_id),
            "split_special_tokens": False,
            # Qwen2Tokenizer imposes Qwen's splitting on any vocabulary; only Qwen's may name it.
            "tokenizer_class": (
                "Qwen2Tokenizer" if self.backend.is_qwen else "PreTrainedTokenizerFast"
            ),
            "unk_token": None,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        if self.model_max_length is not None:
            config["model_max_length"] = self.model_max_length
        if len(eos) > 1:
            config[_ALL_EOS] = eos
        return config


class StreamDecoder:
    """Decodes ids as they are generated, never splitting a character.

    The concatenation of everything `push` and `finish` return is `decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.backend.has_dummy_prefix

    def push(self, ids: Iterable[int]) -> str:
        """Take more ids and return the characters that are now complete."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        data = b"".join(self._tokenizer.token_bytes(i) for i in ids if i not in self._skipped)
        if self._strip_space and data:
            # SentencePiece put a space before the text; only the very first byte can be it.
            data, self._strip_space = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Return the remaining text: U+FFFD for a character that never became complete."""
        return self._utf8.decode(b"", final=True)


def load(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder or from one of its files.

    In a folder the first of these is used: tokenizer.json (byte-level BPE), vocab.json +
    merges.txt, one *.tiktoken rank file, one SentencePiece *.model; a tokenizer.json that is not
    byte-level gives way to the *.model. Beside the file, tokenizer_config.json (roles, added
    tokens, chat template), chat_template.jinja and the eos ids of generation_config.json are
    honoured. Formats that carry no splitting rule and no control tokens get Qwen's. `ValueError`
    names what cannot be read.
    """
    with storage.local(storage.folder(path)) as files_here:
        files = formats.read(files_here)
    controls = {token.content: token.id for token in files.control_tokens}

    def role(key: str, default: str | None) -> int | None:
        token = files.config.get(key, default)
        token = token["content"] if isinstance(token, dict) else token
        if token is None:
            return None
        index = controls.get(token, files.backend.vocabulary.get(token))
        if index is None:
            raise ValueError(f"{path}: {key}={token!r} of tokenizer_config.json is not a token")
        return index

    def default(*names: str) -> str | None:
        return next((name for name in names if name in controls), None)

    eos = role("eos_token", default("<|endoftext|>", "</s>"))
    others = [
        controls.get(token, files.backend.vocabulary.get(token))
        for token in files.config.get(_ALL_EOS, [])
    ]
    eos_ids = [eos, *others, *files.generation_eos_ids]
    max_length = files.config.get("model_max_length")
    tokenizer = Tokenizer(
        backend=files.backend,
        control_tokens=files.control_tokens,
        eos_ids=tuple(dict.fromkeys(index for index in eos_ids if index is not None)),
        pad_id=role("pad_token", default("<|endoftext|>", "<pad>")),
        bos_id=role("bos_token", default("<s>")),
        chat_template=files.chat_template,
        # transformers writes 1e30 for "no limit".
        model_max_length=int(max_length) if max_length and max_length < 1e15 else None,
    )
    _check_ids(tokenizer, name=str(path))
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, *, num_rows: int) -> None:
    """Raise `ValueError` where a model's embedding has fewer rows than the tokenizer has ids."""
    if num_rows < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={num_rows} of the model is too small for the tokenizer, whose ids go up "
            f"to {tokenizer.vocab_size - 1}; use a model with at least {tokenizer.vocab_size} rows "
            "or the tokenizer that the model was trained with"
        )


def _check_ids(tokenizer: Tokenizer, *, name: str) -> None:
    """Check the eos ids, and that plain text cannot yield the id of a control token."""
    for index in tokenizer.eos_ids:
        if not 0 <= index < tokenizer.vocab_size:
            raise ValueError(
                f"{name}: eos id {index} of generation_config.json is not in the vocabulary of "
                f"{tokenizer.vocab_size} ids"
            )
    for token in tokenizer.control_tokens:
        if token.id in tokenizer.backend.encode(token.content):
            raise ValueError(
                f"{name}: plain text spells control token {token.content!r} (id {token.id}); its "
                "merges must not be part of the vocabulary"
            )


def _check_text(text: str, *, name: str = "text") -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} is a {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which UTF-8 cannot represent; decode the source with "
            "errors='replace'"
        ) from None


def _check_special(special: str) -> str:
    if special not in ("text", "control"):
        raise ValueError(f"special={special!r} must be 'text' or 'control'")
    return special


def _added_token(token: ControlToken) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token.id, "content": token.content, **flags, "special": token.special}


def _json_bytes(content: dict[str, Any], *, indent: int | None) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    """Write a file completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _make_forks_serial() -> None:
    """Have forked children encode batches without threads.

    A child inherits the thread pool but not its threads: left to itself the library prints
    a warning, or with TOKENIZERS_PARALLELISM=true waits for ever. The parent keeps its setting.
    """
    name, saved = "TOKENIZERS_PARALLELISM", []

    def before() -> None:
        saved.append(os.environ.get(name))
        os.environ[name] = "false"

    def after_in_parent() -> None:
        value = saved.pop()
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value

    os.register_at_fork(before=before, after_in_parent=after_in_parent)


_make_forks_serial()
