"""Training of tokenizers from an iterator of texts: byte-level BPE and SentencePiece."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import sentencepiece
import tokenizers

from qwen_jax.text.chat import jinja_template as templates
from qwen_jax.text.tokenizer import backends, formats
from qwen_jax.text.tokenizer.formats import QWEN_CONTROL_TOKENS, ControlToken
from qwen_jax.text.tokenizer.tokenizer import Tokenizer

_UNUSABLE = "\u2585"  # SentencePiece's trainer drops every sentence that holds this character


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    min_frequency: int = 2,
    eos_token: str = "<|endoftext|>",
    chat_template: str = templates.CHATML_TEMPLATE,
) -> Tokenizer:
    """Train byte-level BPE with Qwen's splitting and NFC; the same texts give the same tokenizer.

    Ids: 256 bytes, then merges seen at least `min_frequency` times, then the 22 control tokens,
    which end at `vocab_size - 1`. `ValueError` for an empty corpus, a `vocab_size` below 278 and a
    corpus with too few different words to fill `vocab_size`.
    """
    num_controls = len(QWEN_CONTROL_TOKENS)
    if vocab_size < 256 + num_controls:
        raise ValueError(
            f"vocab_size={vocab_size} is too small, the minimum is {256 + num_controls}: 256 bytes "
            f"and {num_controls} control tokens"
        )
    empty = backends.byte_level_json(
        vocabulary={char: i for i, char in enumerate(sorted(backends.byte_alphabet()))},
        merges=[],
    )
    trained = tokenizers.Tokenizer.from_str(json.dumps(empty))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - num_controls,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=backends.byte_alphabet(),
    )
    corpus = _Corpus(texts)
    trained.train_from_iterator(iter(corpus), trainer=trainer)
    corpus.check()
    model = json.loads(trained.to_str())["model"]
    num_tokens = len(model["vocab"]) + num_controls
    if num_tokens < vocab_size:
        raise ValueError(_too_large(vocab_size, num_tokens))
    content = backends.byte_level_json(vocabulary=model["vocab"], merges=model["merges"])
    backend = backends.ByteLevelBPE(json.dumps(content, ensure_ascii=False))
    first = len(model["vocab"])
    ids = {token: first + i for i, token in enumerate(QWEN_CONTROL_TOKENS)}
    return _with_roles(backend, ids=ids, eos_token=eos_token, chat_template=chat_template)


def train_sentencepiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    character_coverage: float = 0.9995,
    eos_token: str = "<|endoftext|>",
    chat_template: str = templates.CHATML_TEMPLATE,
) -> Tokenizer:
    """Train SentencePiece without normalisation, with byte fallback and single digits.

    Ids: `<unk>`, the 22 control tokens, 256 bytes, then pieces; white space is kept as it is, so
    text survives a round trip, save U+2581, which SentencePiece reads as a space.
    `character_coverage` is the share of the corpus' characters that get a piece, the others are
    spelled in bytes. `ValueError` for an empty corpus and a `vocab_size` that is too small or too
    large for it.
    """
    if model_type not in ("bpe", "unigram"):
        raise ValueError(f"model_type={model_type!r} must be 'bpe' or 'unigram'")
    if not 0 < character_coverage <= 1:
        raise ValueError(f"character_coverage={character_coverage} must be in (0, 1]")
    corpus = _Corpus(texts, separator=_UNUSABLE)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=list(QWEN_CONTROL_TOKENS),
            max_sentence_length=2**30,  # bytes; longer ones would be dropped in silence
            num_threads=1,  # the order of floating-point sums must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        corpus.check()
        raise ValueError(_explain(str(error), vocab_size=vocab_size)) from None
    corpus.check()
    backend = backends.SentencePiece(model.getvalue())
    ids = backends.control_pieces(backend.source)
    return _with_roles(backend, ids=ids, eos_token=eos_token, chat_template=chat_template)


def _with_roles(
    backend: backends.Backend, *, ids: dict[str, int], eos_token: str, chat_template: str
) -> Tokenizer:
    if eos_token not in ids:
        raise ValueError(f"eos_token={eos_token!r} is no control token; use one of {list(ids)}")
    tokens = [
        ControlToken(id=index, content=token, special=formats.is_special(token))
        for token, index in ids.items()
    ]
    return Tokenizer(
        backend=backend,
        control_tokens=tuple(sorted(tokens)),
        eos_ids=(ids[eos_token],),
        pad_id=ids["<|endoftext|>"],
        chat_template=chat_template,
    )


class _Corpus:
    """An iterable of texts that remembers what was wrong with them.

    The trainers iterate inside native code, which hides exceptions raised there: an error ends
    the iteration early, and `check` raises it.
    """

    def __init__(self, texts: Iterable[str], *, separator: str = "") -> None:
        self._texts, self._separator = texts, separator
        self._num_texts = 0
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            if isinstance(self._texts, str):
                raise ValueError("the corpus is one str; give an iterable of texts, such as [text]")
            for number, text in enumerate(self._texts):
                for part in self._parts(text, number=number):
                    self._num_texts += 1
                    yield part
        except Exception as error:
            self._error = error

    def _parts(self, text: str, *, number: int) -> list[str]:
        if not isinstance(text, str):
            raise ValueError(f"text {number} of the corpus is a {type(text).__name__}, not str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {number} of the corpus has a lone surrogate at character {error.start}; "
                "decode the source with errors='replace'"
            ) from None
        parts = text.split(self._separator) if self._separator else [text]
        return [part for part in parts if part]

    def check(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._num_texts:
            raise ValueError("the corpus is empty: it has no text to train a tokenizer on")


def _too_large(vocab_size: int, largest: int) -> str:
    return (
        f"vocab_size={vocab_size} is too large for this corpus, which yields {largest} tokens; use "
        f"vocab_size={largest} or more text"
    )


def _explain(message: str, *, vocab_size: int) -> str:
    """The reason why SentencePiece's trainer refused, with a remedy."""
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too small, the minimum for this corpus is {found[1]}: "
            f"<unk>, {len(QWEN_CONTROL_TOKENS)} control tokens, 256 bytes and its characters; "
            "raise it or lower character_coverage"
        )
    if found := re.search(r"set it to a value <= (\d+)", message):
        return _too_large(vocab_size, int(found[1]))
    return f"SentencePiece cannot train on this corpus: {message}"
