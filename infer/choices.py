"""One answer under way: its tokens become text, and stop strings end it."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infer.request import Event, TokenLogprobs
from infer.stop_strings import StopStrings
from infer.updates import TextLogprobs, TokenText, Update
from qwen_jax.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from infer.service import TextRequest


class Choice:
    """The state between an engine's events. What comes of them does not depend on their cuts."""

    def __init__(
        self, request: "TextRequest", index: int, *, tokens: tuple[int, ...], tokenizer: Tokenizer
    ) -> None:
        self.index = index
        self._request = request
        self._tokenizer = tokenizer
        self._prompt = tokens
        self._decoder = StreamDecoder(tokenizer, skip_special=True)
        self._stops = StopStrings(request.stop)
        # Text that is looked into, and tokens that are told apart, are decoded one by one.
        self._one_by_one = bool(request.stop) or request.sampling.logprobs is not None
        self._lead = tokenizer.decode(tokens) if request.echo == "prompt_and_answer" else ""
        self._decoded = len(self._lead)  # characters of the text, held back ones included
        self._shown = 0  # characters of the text that are out
        self._num_tokens = 0
        self._waiting: collections.deque[TextLogprobs] = collections.deque()  # for their text

    def take(self, event: Event) -> Update:
        """Its tokens as text. A reason that the event does not have is a stop string's."""
        shown, self._lead = [self._lead], ""
        tokens: list[int] = []
        reason, stopped = event.finish_reason, False
        for piece in self._pieces(event):
            tokens += piece.tokens
            self._num_tokens += len(piece.tokens)
            self._wait(piece)
            if self._num_tokens < self._request.sampling.min_tokens:
                shown.append(self._stops.skip(piece.text))
                continue
            text, stopped = self._stops.push(piece.text)
            shown.append(text)
            if stopped:
                reason = "stop"
                break
        if reason is not None and not stopped:
            shown.append(self._stops.finish())
        text = "".join(shown)
        self._shown += len(text)
        return Update(
            id=self._request.id,
            index=self.index,
            text=text,
            tokens=tuple(tokens),
            logprobs=tuple(self._released(ended=reason is not None)),
            prompt_logprobs=self._prompt_logprobs(event.prompt_logprobs),
            finish_reason=reason,
        )

    def _pieces(self, event: Event) -> Iterator["_Piece"]:
        """The event's tokens with their text; at least one piece, which may have no tokens."""
        count = max(1, len(event.tokens))
        size = 1 if self._one_by_one else count
        for start in range(0, count, size):
            part = event.tokens[start : start + size]
            ends = event.finish_reason is not None and start + size >= count
            is_closed = ends and event.finish_reason == "stop"
            text = self._decoder.push(part[:-1] if is_closed else part)
            text += self._decoder.finish() if ends else ""
            logprobs = (event.logprobs or ())[start : start + size]
            yield _Piece(part, text, logprobs, is_closed)

    def _wait(self, piece: "_Piece") -> None:
        if self._request.sampling.logprobs is not None:
            for entry in piece.logprobs:
                hidden = piece.is_closed or entry.token in self._tokenizer.special_ids
                self._waiting.append(self._text_logprobs(entry, self._decoded, hidden=hidden))
        self._decoded += len(piece.text)

    def _released(self, *, ended: bool) -> Iterator[TextLogprobs]:
        """Entries of tokens whose text is out; at the end the others too, being hidden."""
        while self._waiting:
            entry = self._waiting[0]
            if not entry.hidden and entry.offset >= self._shown:
                if not ended:
                    return
                entry = dataclasses.replace(entry, hidden=True)
            self._waiting.popleft()
            yield entry

    def _prompt_logprobs(self, given: Sequence[TokenLogprobs] | None) -> tuple[TextLogprobs, ...]:
        if given is None:
            return ()
        decoder, offset, entries = StreamDecoder(self._tokenizer), 0, []
        for token, entry in zip(self._prompt, (None, *given), strict=True):
            if entry is None:
                data = self._tokenizer.token_bytes(token)
                first = TextLogprobs(token, data, None, drawn=None, offset=0, hidden=False)
                entries.append(first)
            else:
                entries.append(self._text_logprobs(entry, offset, hidden=False))
            offset += len(decoder.push([token]))
        return tuple(entries)

    def _text_logprobs(self, entry: TokenLogprobs, offset: int, *, hidden: bool) -> TextLogprobs:
        return TextLogprobs(
            entry.token,
            self._tokenizer.token_bytes(entry.token),
            entry.raw,
            drawn=entry.drawn,
            offset=offset,
            hidden=hidden,
            top=tuple(
                TokenText(token, self._tokenizer.token_bytes(token), logprob)
                for token, logprob in entry.top
            ),
        )


@dataclass(frozen=True)
class _Piece:
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    is_closed: bool  # by its last token, which is not text
