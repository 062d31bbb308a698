"""Readers of tokenizer files.

They are tokenizer.json, vocab.json + merges.txt, a tiktoken rank file or a SentencePiece model, and
the tokenizer_config.json that may lie beside any of them.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.text.tokenizer import backends, rank_files
from qwen_jax.text.tokenizer.backends import Backend, ByteLevelBPE, SentencePiece


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class ControlToken:
    """A token that text cannot spell: it is parsed only on request.

    `special` tokens are those that `decode(..., skip_special=True)` leaves out; Qwen's tool-call
    and fill-in-the-middle tokens are not, because they carry meaning in an answer.
    """

    id: int
    content: str
    special: bool


# Qwen2.5's control tokens in the order of their ids, 151643 to 151664.
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_NOT_SPECIAL = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
QWEN_CONTROL_TOKENS = _SPECIAL + _NOT_SPECIAL


def is_special(content: str) -> bool:
    """Say whether decoding may skip a control token, where its file does not."""
    return content not in _NOT_SPECIAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """The files of one tokenizer: encoder, control tokens, and the parsed tokenizer_config.json."""

    backend: Backend
    control_tokens: tuple[ControlToken, ...]
    config: Mapping[str, Any]
    chat_template: str | None
    generation_eos_ids: tuple[int, ...]


def read(path: str | Path) -> Loaded:
    """Read a tokenizer from a folder or from one of its files; see `tokenizer.load`."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no tokenizer at {path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    config = _read_json(folder / "tokenizer_config.json")
    _refuse_flags(config, name=str(folder / "tokenizer_config.json"))
    named = {
        int(index): entry for index, entry in (config.get("added_tokens_decoder") or {}).items()
    }
    backend, own = _reader(path)(named)
    generation_eos = _read_json(folder / "generation_config.json").get("eos_token_id") or []
    return Loaded(
        backend=backend,
        control_tokens=_merge_control_tokens(own, named, backend=backend, name=str(path)),
        config=config,
        chat_template=_chat_template(config, folder=folder),
        generation_eos_ids=tuple(
            generation_eos if isinstance(generation_eos, list) else [generation_eos]
        ),
    )


_Named = Mapping[int, Mapping[str, Any]]
_Read = tuple[Backend, list[ControlToken]]


def _reader(path: Path) -> Callable[[_Named], _Read]:
    """Choose the format: by name for a file, in a fixed order of preference for a folder."""
    if path.is_file():
        if path.name in ("vocab.json", "merges.txt"):
            return lambda named: _read_vocab_merges(path.parent, named)
        readers = {
            ".json": _read_tokenizer_json,
            ".tiktoken": _read_tiktoken,
            ".model": _read_sentencepiece,
        }
        if path.suffix not in readers:
            raise ValueError(
                f"{path} is no tokenizer file; known are tokenizer.json, vocab.json and merges.txt "
                "(side by side), *.tiktoken and *.model"
            )
        return lambda named: readers[path.suffix](path, named)
    models = sorted(path.glob("*.model"))
    tiktokens = sorted(path.glob("*.tiktoken"))
    tokenizer_json = path / "tokenizer.json"
    if tokenizer_json.exists() and not (models and not _looks_byte_level(tokenizer_json)):
        return lambda named: _read_tokenizer_json(tokenizer_json, named)
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return lambda named: _read_vocab_merges(path, named)
    for files, reader in ((tiktokens, _read_tiktoken), (models, _read_sentencepiece)):
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{path} holds several tokenizers ({names}); name the file")
        if files:
            return lambda named, file=files[0], reader=reader: reader(file, named)
    raise ValueError(
        f"no tokenizer in {path}: expected tokenizer.json, vocab.json and merges.txt, *.tiktoken "
        "or *.model"
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def _refuse_flags(config: Mapping[str, Any], *, name: str) -> None:
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space"):
        if config.get(key):
            raise ValueError(
                f"{name}: {key}=true is not supported, encoding adds nothing to a text; set it to "
                "false and write the token into the chat template or the data"
            )


def _chat_template(config: Mapping[str, Any], *, folder: Path) -> str | None:
    """Return chat_template.jinja where there is one, as transformers does, or the config's."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        if len(template) != 1:
            names = [entry.get("name") for entry in template]
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} has {len(template)} chat templates {names}; "
                "leave one, or write it to chat_template.jinja"
            )
        template = template[0]["template"]
    return template


def _control_token(index: int, entry: Mapping[str, Any], *, name: str) -> ControlToken:
    content = entry["content"]
    for flag in ("lstrip", "rstrip", "single_word"):
        if entry.get(flag):
            raise ValueError(f"{name}: added token {content!r} has {flag}=true, unsupported")
    return ControlToken(id=index, content=content, special=bool(entry.get("special")))


def _merge_control_tokens(
    own: list[ControlToken], named: _Named, *, backend: Backend, name: str
) -> tuple[ControlToken, ...]:
    """Add the tokens of tokenizer_config.json that the vocabulary file lacks."""
    by_content = {token.content: token for token in own}
    regular = {index: token for token, index in backend.vocabulary.items()}
    for index, entry in named.items():
        token = _control_token(index, entry, name=name)
        known = by_content.get(token.content)
        if known is not None and known.id != index:
            raise ValueError(
                f"{name}: token {token.content!r} has id {known.id}, but tokenizer_config.json "
                f"says {index}; the two files belong to different tokenizers"
            )
        by_content[token.content] = token
    tokens = tuple(sorted(by_content.values()))
    for token, following in zip(tokens, tokens[1:], strict=False):
        if token.id == following.id:
            raise ValueError(
                f"{name}: id {token.id} belongs to both {token.content!r} and {following.content!r}"
            )
    for token in tokens:
        if regular.get(token.id, token.content) != token.content:
            raise ValueError(
                f"{name}: id {token.id} belongs to control token {token.content!r} and to regular "
                f"token {regular[token.id]!r}"
            )
        if len(token.content) < 2:
            raise ValueError(
                f"{name}: added token {token.content!r} is shorter than 2 characters, so text "
                "could not be kept from spelling it"
            )
    return tokens


def _qwen_control_tokens(vocabulary: Mapping[str, int]) -> list[ControlToken]:
    """Number Qwen's control tokens after a vocabulary that does not name its own."""
    free = max(vocabulary.values(), default=-1) + 1
    tokens = []
    for content in QWEN_CONTROL_TOKENS:
        index = vocabulary.get(content)
        if index is None:
            index, free = free, free + 1
        tokens.append(ControlToken(id=index, content=content, special=is_special(content)))
    return tokens


def _looks_byte_level(path: Path) -> bool:
    pre_tokenizer = _read_json(path).get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return any(step.get("type") == "ByteLevel" for step in steps)


def _check_byte_level(content: dict, *, name: str) -> dict:
    """Return a tokenizer.json's contents in a normal form, without its control tokens.

    Raises `ValueError` for anything that is not deterministic byte-level BPE, and for a
    post-processor that adds tokens, which `Tokenizer.encode` never does.
    """
    model = content.get("model") or {}
    pre_tokenizer = content.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    if model.get("type", "BPE") != "BPE" or not byte_level or "vocab" not in model:
        raise ValueError(
            f"{name} is not byte-level BPE (model {model.get('type')!r}, pre-tokenizer "
            f"{pre_tokenizer.get('type')!r}); give the SentencePiece *.model file instead"
        )
    for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{name}: {key}={model[key]!r} of the BPE model is not supported")
    post_processor = content.get("post_processor") or {}
    if post_processor.get("type", "ByteLevel") != "ByteLevel":
        raise ValueError(
            f"{name}: post-processor {post_processor['type']!r} adds tokens to every text, which "
            "is not supported; remove it and add the tokens where they are wanted"
        )
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return content | {
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "model": model | {"merges": merges},
    }


def _byte_level(content: dict, *, name: str) -> ByteLevelBPE:
    content = _check_byte_level(content, name=name)
    backend = ByteLevelBPE(json.dumps(content, ensure_ascii=False))
    try:
        backend.vocabulary  # noqa: B018  builds the encoder, which checks the merges
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{name} cannot be read as a tokenizer: {error}") from None
    return backend


def _read_tokenizer_json(path: Path, named: _Named) -> _Read:
    content = _read_json(path)
    own = [
        _control_token(entry["id"], entry, name=str(path))
        for entry in content.get("added_tokens") or []
    ]
    return _byte_level(content, name=str(path)), own


def _read_vocab_merges(folder: Path, named: _Named) -> _Read:
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} has no {name}; vocab.json and merges.txt go together")
    vocabulary = _read_json(folder / "vocab.json")
    merges = []
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if (number == 1 and line.startswith("#version")) or not line:
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise ValueError(f"{folder / 'merges.txt'}:{number}: {line!r} is not two tokens")
        merges.append((pair[0], pair[1]))
    content = backends.byte_level_json(vocabulary=vocabulary, merges=merges)
    backend = _byte_level(content, name=str(folder / "vocab.json"))
    return backend, [] if named else _qwen_control_tokens(vocabulary)


def _read_tiktoken(path: Path, named: _Named) -> _Read:
    ranks = rank_files.read(path)
    vocabulary = {backends.bytes_to_token(token): rank for token, rank in ranks.items()}
    merges = rank_files.merges(ranks, name=str(path))
    content = backends.byte_level_json(vocabulary=vocabulary, merges=merges)
    backend = _byte_level(content, name=str(path))
    for token, rank in ranks.items():
        # The only split of a token may still be one that merging never reaches.
        if not backend.is_reachable(backends.bytes_to_token(token)):
            raise ValueError(rank_files.no_merge(str(path), token, rank))
    return backend, [] if named else _qwen_control_tokens(vocabulary)


def _read_sentencepiece(path: Path, named: _Named) -> _Read:
    names = frozenset(entry["content"] for entry in named.values()) | {*QWEN_CONTROL_TOKENS}
    try:
        source = backends.retype_as_control(path.read_bytes(), pieces=names)
        backend = SentencePiece(source)
        backend.encode("")  # builds the encoder, which checks the rest
        pieces = backends.control_pieces(source)
    except Exception as error:  # protobuf and the library have no common class for a damaged file
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
    own = [
        ControlToken(id=index, content=piece, special=is_special(piece))
        for piece, index in pieces.items()
    ]
    return backend, own
