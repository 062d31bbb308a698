"""The two encoders behind `qwen_jax.text.tokenizer.tokenizer`: byte-level BPE and SentencePiece.

A backend knows regular tokens only: control tokens are cut out of the text before it is asked, so
it cannot produce one. Both are frozen dataclasses of their serialised form, pickled as that form
alone.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

_SPACE = "\u2581"  # SentencePiece writes a space as this character
_PIECE = sentencepiece_model_pb2.ModelProto.SentencePiece

# Pre-tokenisation of Qwen2 and Qwen2.5 (tokenizer.json, "pre_tokenizer"): contractions, words with
# at most one leading symbol, single digits, symbols, line breaks, white space.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}
QWEN_NORMALIZER = {"type": "NFC"}
QWEN_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": QWEN_SPLIT},
            "behavior": "Isolated",
            "invert": False,
        },
        _BYTE_LEVEL,
    ],
}


class Backend(Protocol):
    """The interface of an encoder that `tokenizer.Tokenizer` uses."""

    def encode(self, text: str, *, at_start: bool = True) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    @property
    def vocabulary(self) -> Mapping[str, int]: ...
    @property
    def token_bytes(self) -> Mapping[int, bytes]: ...
    @property
    def has_dummy_prefix(self) -> bool: ...
    @property
    def is_qwen(self) -> bool: ...
    def canonical(self) -> bytes: ...
    def tokenizer_json(self) -> dict: ...


def byte_alphabet() -> list[str]:
    """Return the printable character that stands for each byte in byte-level BPE.

    Printable Latin-1 bytes stand for themselves; the others are numbered from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_CHAR_OF_BYTE = dict(enumerate(byte_alphabet()))
_BYTE_OF_CHAR = {ord(char): byte for byte, char in _CHAR_OF_BYTE.items()}


def bytes_to_token(data: bytes) -> str:
    """Spell raw bytes in the byte-level alphabet."""
    return data.decode("latin-1").translate(_CHAR_OF_BYTE)


def token_to_bytes(token: str) -> bytes:
    """Read a byte-level token back as raw bytes; `ValueError` where it is not byte-level."""
    try:
        # Alphabet -> the code points 0..255, which Latin-1 writes as those bytes.
        return token.translate(_BYTE_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(f"token {token!r} is not spelled in the byte-level alphabet") from None


def byte_level_json(
    *,
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    normalizer: dict | None = QWEN_NORMALIZER,
    pre_tokenizer: dict = QWEN_PRE_TOKENIZER,
) -> dict:
    """Build the contents of a tokenizer.json, without control tokens, from a BPE vocabulary."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "merges": [list(merge) for merge in merges],
        },
    }


class _PickledAsSource:
    """A mixin that pickles `source` only; derived values are computed again on first use."""

    def __getstate__(self) -> dict:
        return {"source": self.source}


@dataclasses.dataclass(frozen=True)
class ByteLevelBPE(_PickledAsSource):
    """Byte-level BPE run by the `tokenizers` library; `source` is a tokenizer.json."""

    source: str

    @functools.cached_property
    def _impl(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.source)

    @functools.cached_property
    def vocabulary(self) -> Mapping[str, int]:
        return self._impl.get_vocab(with_added_tokens=False)

    @functools.cached_property
    def token_bytes(self) -> Mapping[int, bytes]:
        return {index: token_to_bytes(token) for token, index in self.vocabulary.items()}

    @property
    def has_dummy_prefix(self) -> bool:
        return False

    @functools.cached_property
    def is_qwen(self) -> bool:
        content = json.loads(self.source)
        return (content["normalizer"], content["pre_tokenizer"]) == (
            QWEN_NORMALIZER,
            QWEN_PRE_TOKENIZER,
        )

    @functools.cached_property
    def _missing(self) -> frozenset[int]:
        """Bytes without a token: none in Qwen's vocabulary, some in vocabularies trained without
        the whole alphabet. The library drops them from a text and says nothing."""
        return frozenset(b for b, char in _CHAR_OF_BYTE.items() if char not in self.vocabulary)

    def _check_bytes(self, text: str) -> None:
        """Raises `ValueError` for a text with a byte that the vocabulary cannot spell."""
        if not self._missing:
            return
        normalizer = self._impl.normalizer
        text = text if normalizer is None else normalizer.normalize_str(text)
        for char in text:
            if lost := self._missing.intersection(char.encode()):
                raise ValueError(
                    f"the vocabulary has no token for byte 0x{min(lost):02X} of {char!r}; remove "
                    f"this character from the text, or use a tokenizer with all 256 byte tokens"
                )

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        self._check_bytes(text)
        return self._impl.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            self._check_bytes(text)
        encoded = self._impl.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def is_reachable(self, token: str) -> bool:
        """Say whether merging the bytes of a token yields it whole."""
        return len(self._impl.model.tokenize(token)) == 1

    def canonical(self) -> bytes:
        """Return everything that ids depend on, the same for every file format."""
        content = json.loads(self.source)
        model = content["model"]
        parts = [
            sorted(model["vocab"].items(), key=lambda item: item[1]),
            model["merges"],
            bool(model.get("ignore_merges")),
            content["normalizer"],
            content["pre_tokenizer"],
        ]
        return json.dumps(parts, sort_keys=True).encode()

    def tokenizer_json(self) -> dict:
        return json.loads(self.source)


@dataclasses.dataclass(frozen=True)
class SentencePiece(_PickledAsSource):
    """A SentencePiece model, BPE or unigram; `source` is the serialised `*.model`."""

    source: bytes

    @functools.cached_property
    def proto(self) -> sentencepiece_model_pb2.ModelProto:
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(self.source)
        return proto

    @functools.cached_property
    def _impl(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.source)

    @functools.cached_property
    def _impl_inside(self) -> sentencepiece.SentencePieceProcessor:
        """The processor of the same model, without the space that it adds before a text."""
        proto = sentencepiece_model_pb2.ModelProto()
        proto.CopyFrom(self.proto)
        proto.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    @functools.cached_property
    def vocabulary(self) -> Mapping[str, int]:
        return {piece.piece: index for index, piece in enumerate(self.proto.pieces)}

    @functools.cached_property
    def token_bytes(self) -> Mapping[int, bytes]:
        """Bytes by id; SentencePiece's own control pieces stand for no text."""
        table = {}
        for index, piece in enumerate(self.proto.pieces):
            if piece.type == _PIECE.BYTE:
                table[index] = bytes([int(piece.piece[3:-1], 16)])
            elif piece.type == _PIECE.UNKNOWN:
                table[index] = self.proto.trainer_spec.unk_surface.encode()
            elif piece.type != _PIECE.CONTROL:
                table[index] = piece.piece.replace(_SPACE, " ").encode()
        return table

    @property
    def has_dummy_prefix(self) -> bool:
        return self.proto.normalizer_spec.add_dummy_prefix

    @property
    def is_qwen(self) -> bool:
        return False

    def encode(self, text: str, *, at_start: bool = True) -> list[int]:
        use_prefix = at_start or not self.has_dummy_prefix
        return (self._impl if use_prefix else self._impl_inside).encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._impl.encode(list(texts))

    def canonical(self) -> bytes:
        """Return everything that ids depend on; the trainer's paths and notes are left out."""
        proto = self.proto
        normalizer = proto.normalizer_spec
        parts = [
            proto.trainer_spec.model_type,
            proto.trainer_spec.byte_fallback,
            proto.trainer_spec.treat_whitespace_as_suffix,
            normalizer.precompiled_charsmap.hex(),
            normalizer.add_dummy_prefix,
            normalizer.remove_extra_whitespaces,
            normalizer.escape_whitespaces,
            [(piece.piece, piece.type, piece.score) for piece in proto.pieces],
        ]
        return json.dumps(parts).encode()

    def tokenizer_json(self) -> dict:
        """Translate the model for the `tokenizers` library, as near as that can follow it.

        BPE: where two ways to build one piece compete, SentencePiece takes the leftmost and
        `tokenizers` the one of lower rank. Unigram: scores are summed in another precision, so near
        ties can differ, and `split_special_tokens` does not keep control tokens from being parsed.
        Raises `ValueError` for white-space handling that the library cannot express.
        """
        proto = self.proto
        normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
        regular = [p.piece for p in proto.pieces if p.type == _PIECE.USER_DEFINED]
        if normalizer.remove_extra_whitespaces or trainer.treat_whitespace_as_suffix or regular:
            raise ValueError(
                "this SentencePiece model cannot be written as a tokenizer.json: "
                f"remove_extra_whitespaces={normalizer.remove_extra_whitespaces}, "
                f"treat_whitespace_as_suffix={trainer.treat_whitespace_as_suffix}, "
                f"user-defined pieces {regular[:3]}; all three must be off. Copy its *.model file"
            )
        steps: list[dict] = []
        if normalizer.precompiled_charsmap:
            charsmap = tokenizers.normalizers.Precompiled(normalizer.precompiled_charsmap)
            steps.append(json.loads(charsmap.__getstate__()))
        if normalizer.add_dummy_prefix:
            steps.append({"type": "Prepend", "prepend": _SPACE})
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
        decoders: list[dict] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if normalizer.add_dummy_prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self._model_json(),
        }

    def _model_json(self) -> dict:
        proto = self.proto
        unknown = next(i for i, p in enumerate(proto.pieces) if p.type == _PIECE.UNKNOWN)
        byte_fallback = proto.trainer_spec.byte_fallback
        if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
            vocabulary = [[piece.piece, piece.score] for piece in proto.pieces]
            return {
                "type": "Unigram",
                "unk_id": unknown,
                "vocab": vocabulary,
                "byte_fallback": byte_fallback,
            }
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": proto.pieces[unknown].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "ignore_merges": False,
            "vocab": dict(self.vocabulary),
            "merges": self._merges(),
        }

    def _merges(self) -> list[tuple[str, str]]:
        """List every way to join two pieces into a third, the best third first."""
        normal = {p.piece: p.score for p in self.proto.pieces if p.type == _PIECE.NORMAL}
        ranked = []
        for piece, score in normal.items():
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in normal and right in normal:
                    rank = (-score, self.vocabulary[left], self.vocabulary[right])
                    ranked.append((rank, (left, right)))
        return [merge for _, merge in sorted(ranked)]


def retype_as_control(source: bytes, *, pieces: frozenset[str]) -> bytes:
    """Return a SentencePiece model whose named user-defined pieces are control pieces.

    SentencePiece finds user-defined pieces in any text; control pieces only where asked.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(source)
    for piece in proto.pieces:
        if piece.type == _PIECE.USER_DEFINED and piece.piece in pieces:
            piece.type = _PIECE.CONTROL
    return proto.SerializeToString()


def control_pieces(source: bytes) -> dict[str, int]:
    """Return the control pieces of a SentencePiece model by name, `ValueError` if it is none."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(source)
    return {p.piece: i for i, p in enumerate(proto.pieces) if p.type == _PIECE.CONTROL}


def longest_first(names: Sequence[str]) -> re.Pattern[str]:
    """Compile a pattern that finds the leftmost, then longest, of some exact strings."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
