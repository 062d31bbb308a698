"""A device that only pretends, so that what a scheduler makes it do can be checked.

Its "keys and values" of a position are a hash of all tokens up to it, and the next token is made of
that hash. So a page that was given to two, read before it was written or written after it was
shared shows as a cell that is not what the request's own tokens make of it, and an answer can be
compared with the same request's alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from infer.engine.request import Request
from infer.engine.scheduler import Chunk, Decode, Prefill

VOCABULARY = 1000
END = 7  # drawn once in VOCABULARY / ENDS tokens, on average
ENDS = 40


def chain(tokens: Iterable[int], *, start: int = 0) -> list[int]:
    """The hash of all tokens up to each position."""
    hashes = []
    for token in tokens:
        start = hash((start, token))
        hashes.append(start)
    return hashes


def draw(state: int) -> int:
    """The token that follows."""
    token = state % VOCABULARY
    return END if token < ENDS else token


def alone(request: Request) -> tuple[int, ...]:
    """What the device answers to this request."""
    state = chain(request.tokens)[-1]
    answer: list[int] = []
    while len(answer) < request.sampling.max_tokens and END not in answer[-1:]:
        answer.append(draw(state))
        state = hash((state, answer[-1]))
    return tuple(answer)


@dataclass
class _Row:
    """A slot on the device: its cells so far, what it drew, and how much more it may draw."""

    request: Request
    pages: tuple[int, ...]
    hashes: list[int]
    last: int
    left: int


class Device:
    """Pages of cells, and a row of state for each slot. Programs run as soon as they are given."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.cells: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self.rows: dict[int, _Row] = {}
        self.written: set[int] = set()  # pages that the last program wrote

    def prefill(self, program: Prefill) -> dict[int, list[int]]:
        """Tokens drawn by slot."""
        self.written = set()
        return {chunk.slot: self._read(chunk) for chunk in program.chunks if self._write(chunk)}

    def _write(self, chunk: Chunk) -> bool:
        hashes = chain(chunk.request.tokens[: chunk.start + len(chunk.tokens)])
        assert chunk.tokens == chunk.request.tokens[chunk.start : len(hashes)]
        self._check(chunk.pages, hashes[: chunk.start])
        for position in range(chunk.start, len(hashes)):
            self._put(chunk.pages, position, hashes[position])
        return chunk.is_last

    def _read(self, chunk: Chunk) -> list[int]:
        request = chunk.request
        hashes = chain(request.tokens)
        self._check(chunk.pages, hashes)
        if request.sampling.max_tokens == 0:
            self.rows.pop(chunk.slot, None)
            return []
        token = draw(hashes[-1])
        left = 0 if token == END else request.sampling.max_tokens - 1
        self.rows[chunk.slot] = _Row(request, chunk.pages, hashes, token, left)
        return [token]

    def decode(self, program: Decode) -> dict[int, list[int]]:
        self.written = set()
        drawn: dict[int, list[int]] = {}
        for slot in program.slots:
            row = self.rows[slot]
            drawn[slot] = []
            for _ in range(min(program.num_steps, row.left)):
                row.hashes.append(hash((row.hashes[-1], row.last)))
                self._put(row.pages, len(row.hashes) - 1, row.hashes[-1])
                row.last = draw(row.hashes[-1])
                drawn[slot].append(row.last)
                row.left -= 1
                if row.last == END:
                    row.left = 0
                    break
            self._check(row.pages, row.hashes)
        return drawn

    def _put(self, pages: Sequence[int], position: int, value: int) -> None:
        page = pages[position // self.page_size]
        self.written.add(page)
        self.cells[page][position % self.page_size] = value

    def _check(self, pages: Sequence[int], hashes: Sequence[int]) -> None:
        for i, first in enumerate(range(0, len(hashes), self.page_size)):
            expected = hashes[first : first + self.page_size]
            assert self.cells[pages[i]][: len(expected)] == expected, (
                f"page {pages[i]} holds another's"
            )
