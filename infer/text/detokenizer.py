"""The detokenizer: an answer's tokens as text, up to a stop string."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

from configs.sampling import SamplingParams
from infer.engine.request import Event, TokenLogprobs
from infer.text.outputs import TextLogprobs, TokenText, Update
from infer.text.stop_strings import StopStrings
from qwen_jax.text.tokenizer.tokenizer import StreamDecoder, Tokenizer


class Choice:
    """The state of one streamed answer. Its text is the same however events divide the tokens."""

    def __init__(
        self,
        request_id: str,
        index: int,
        *,
        tokens: tuple[int, ...],
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        stop: Sequence[str] = (),
        echo: Literal["answer", "prompt_and_answer"] = "answer",
    ) -> None:
        """`tokens` are the prompt's; the answer ends before any of `stop`."""
        self.index = index
        self._request_id = request_id
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._prompt = tokens
        self._decoder = StreamDecoder(tokenizer, skip_special=True)
        self._stops = StopStrings(stop)
        # Text that is looked into, and tokens that are told apart, are decoded one by one.
        self._one_by_one = bool(stop) or sampling.logprobs is not None
        self._lead = tokenizer.decode(tokens) if echo == "prompt_and_answer" else ""
        self._decoded = len(self._lead)  # characters of the text, held back ones included
        self._shown = 0  # characters of the text that are out
        self._num_tokens = 0
        self._waiting: collections.deque[TextLogprobs] = collections.deque()  # for their text

    def take(self, event: Event) -> Update:
        """The event's tokens as text; a stop string adds the finish reason `stop`."""
        tokens, reason, texts = event.tokens, event.finish_reason, self._texts(event)
        # Of the first ones the last is token number min_tokens - 1: the answer may not end yet.
        early = max(0, self._sampling.min_tokens - 1 - self._num_tokens)
        shown = [self._lead, self._stops.skip("".join(texts[:early]))]
        text, end = self._stops.push("".join(texts[early:]))
        shown.append(text)
        if end is not None:
            reason, lengths = "stop", itertools.accumulate(map(len, texts[early:]))
            count = early + 1 + next(i for i, length in enumerate(lengths) if length >= end)
            tokens, texts = tokens[:count], texts[:count]
        elif reason is not None:
            shown.append(self._stops.finish())
        text, self._lead = "".join(shown), ""
        self._num_tokens += len(tokens)
        self._shown += len(text)
        self._wait(event, texts)
        return Update(
            id=self._request_id,
            index=self.index,
            text=text,
            tokens=tokens,
            logprobs=tuple(self._released(ended=reason is not None)),
            prompt_logprobs=self._prompt_logprobs(event.prompt_logprobs),
            weight_version=event.weight_version,
            finish_reason=reason,
        )

    def _texts(self, event: Event) -> list[str]:
        """The text that each token adds, or one text for all where single tokens do not matter."""
        push = self._decoder.push
        is_closed = event.finish_reason == "stop"
        tokens = event.tokens[:-1] if is_closed else event.tokens
        texts = [push((token,)) for token in tokens] if self._one_by_one else [push(tokens)]
        if is_closed or not texts:
            texts.append("")
        if event.finish_reason is not None:
            texts[-1] += self._decoder.finish()
        return texts

    def _wait(self, event: Event, texts: list[str]) -> None:
        """Queues the log-probabilities of the tokens until their texts are returned."""
        if self._sampling.logprobs is not None:
            special = self._tokenizer.special_ids
            last = len(event.tokens) - 1 if event.finish_reason == "stop" else None
            for number, (entry, text) in enumerate(zip(event.logprobs or (), texts, strict=False)):
                hidden = number == last or entry.token in special
                self._waiting.append(self._text_logprobs(entry, self._decoded, hidden=hidden))
                self._decoded += len(text)

    def _released(self, *, ended: bool) -> Iterator[TextLogprobs]:
        """The queued entries whose text was returned; at the end the rest too, as hidden."""
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
