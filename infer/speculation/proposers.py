"""Proposers of draft tokens, which the model then checks in one pass. No jax.

Draft tokens are rows [R, T], -1 where there is none. They never change an answer: see
`qwen_jax.decode.programs.verify`. An engine asks for them where few enough requests decode at one
time and no grammar binds any of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from configs.engine import EngineConfig
from infer.speculation.prompt_lookup import PromptLookup


class Row(Protocol):
    """What a proposer reads of a decoding request, and, in the last two fields, its own notes."""

    slot: int
    pages: tuple[int, ...]
    prompt: tuple[int, ...]
    answer: list[int]  # tokens read from the device
    prompt_lookup: PromptLookup | None
    num_draft_read: int | None  # tokens that a draft model has read; None: as many as the model


class Proposer(Protocol):
    """Proposes draft tokens."""

    def needs_answers(self, rows: Sequence[Row]) -> bool:
        """Whether the tokens of all dispatches must be read before `propose` is called."""
        ...

    def propose(self, rows: Sequence[Row], *, num_rows: int, sampler: str) -> Any:
        """Draft tokens [num_rows, T], here or on the device; None where no row has any."""
        ...

    def skipped(self, rows: Sequence[Row]) -> None:
        """Notes that a dispatch without draft tokens draws tokens for these rows."""
        ...


class LookupProposer:
    """Draft tokens copied from what each request has read or written (`prompt_lookup.py`)."""

    def __init__(self, settings: EngineConfig) -> None:
        self._num_tokens = settings.guesses

    def needs_answers(self, rows: Sequence[Row]) -> bool:
        return True

    def propose(self, rows: Sequence[Row], *, num_rows: int, sampler: str) -> np.ndarray | None:
        draft_RT = np.full((num_rows, self._num_tokens), -1, np.int32)
        for index, row in enumerate(rows):
            if row.prompt_lookup is None:
                row.prompt_lookup = PromptLookup(row.prompt)
            num_known = len(row.prompt_lookup) - len(row.prompt)
            row.prompt_lookup.extend(row.answer[num_known:])
            tokens = row.prompt_lookup.propose(self._num_tokens)
            draft_RT[index, : len(tokens)] = tokens
        return draft_RT if np.any(draft_RT >= 0) else None

    def skipped(self, rows: Sequence[Row]) -> None:
        """Does nothing: the tokens are in the answers when `propose` reads them."""


@dataclass(frozen=True)
class DraftChunk:
    """Tokens that a draft model reads at positions from `start` on, into these pages."""

    pages: tuple[int, ...]
    start: int
    tokens: tuple[int, ...]


class DraftModel(Protocol):
    """A draft model on the engine's device."""

    def read_draft(self, chunks: Sequence[DraftChunk], *, num_rows: int, length: int) -> None:
        """Reads one chunk a row, padded to `num_rows` rows of `length` tokens."""
        ...

    def propose(self, slots: Sequence[int], *, num_rows: int, sampler: str) -> Any:
        """Draft tokens [num_rows, T] of these slots, on the device."""
        ...


class DraftModelProposer:
    """Draft tokens of a smaller model, which reads prompts with the model, on its device.

    Between rounds nothing comes to the host. Tokens that were drawn without the draft model,
    because too many requests ran or a grammar bound one, it reads when it is asked again.
    """

    def __init__(
        self,
        settings: EngineConfig,
        model: DraftModel,
        *,
        prefill_shapes: Sequence[tuple[int, int]],
    ) -> None:
        """`prefill_shapes` are the (rows, length) that the model reads chunks in."""
        self._most = settings.prefill_chunk
        self._model = model
        self._shapes = prefill_shapes

    def needs_answers(self, rows: Sequence[Row]) -> bool:
        return any(row.num_draft_read is not None for row in rows)

    def propose(self, rows: Sequence[Row], *, num_rows: int, sampler: str) -> Any:
        for chunks, rows_of_read, length in self._unread(rows):
            self._model.read_draft(chunks, num_rows=rows_of_read, length=length)
        slots = [row.slot for row in rows]
        return self._model.propose(slots, num_rows=num_rows, sampler=sampler)

    def skipped(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.num_draft_read is None:
                # It may have read what dispatches under way have drawn: reading again is right.
                row.num_draft_read = len(row.prompt) + max(0, len(row.answer) - 1)

    def _unread(self, rows: Sequence[Row]) -> Iterator[tuple[list[DraftChunk], int, int]]:
        """Chunks with rows and length of each read: all tokens that the draft model has not read.

        But for the last token of a request, which `propose` reads itself.
        """
        behind = {
            index: (*row.prompt, *row.answer)[:-1]
            for index, row in enumerate(rows)
            if row.num_draft_read is not None
        }
        while behind:
            longest = max(len(tokens) - rows[i].num_draft_read for i, tokens in behind.items())
            length, num_rows = self._shape(min(longest, self._most), len(behind))
            chunks = []
            for index, tokens in list(behind.items())[:num_rows]:
                row = rows[index]
                start = row.num_draft_read
                chunk = DraftChunk(row.pages, start, tokens[start : start + length])
                chunks.append(chunk)
                row.num_draft_read = start + len(chunk.tokens)
                if row.num_draft_read == len(tokens):
                    row.num_draft_read = None
                    del behind[index]
            yield chunks, num_rows, length

    def _shape(self, length: int, num_rows: int) -> tuple[int, int]:
        """The shortest length that holds so many tokens, and rows for so many or the most."""
        shortest = min(size for _, size in self._shapes if size >= length)
        counts = [count for count, size in self._shapes if size == shortest]
        return shortest, min((n for n in counts if n >= num_rows), default=max(counts))


def make(
    settings: EngineConfig, model: DraftModel, *, prefill_shapes: Sequence[tuple[int, int]]
) -> Proposer | None:
    """The proposer that the settings name, of which `model` has the draft model; None if none."""
    if settings.speculation == "off":
        return None
    if settings.speculation == "draft":
        return DraftModelProposer(settings, model, prefill_shapes=prefill_shapes)
    return LookupProposer(settings)
