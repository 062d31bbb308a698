"""The owners of the cache's pages, and the prompts whose beginnings they hold. No jax.

A page holds the keys and values of `page_size` positions, in all layers. A request reserves all the
pages that it can ever need at once, so nothing that runs can run out of them. Prompts that begin
alike share pages, in blocks of `granularity` tokens:

- A block's key is the number of the block before it and its own tokens: a chain, as in vLLM's
  prefix cache, but the tokens themselves are compared, so two prompts never meet by a collision,
  and numbers are not used twice, so a block never follows one that took another's place.
- A block may be shared once its keys and values are written, and is never written after that.
- A block that nobody uses keeps its pages until others need them; the one unused for longest goes
  first. Users of a block use those before it too, so a block goes before the one it follows.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_START = 0  # the number that a prompt's first block follows
_ITEM = array("q").itemsize

Key = tuple[int, bytes]  # the number of the block before, and the tokens as 64-bit numbers


@dataclass(eq=False)
class _Block:
    number: int
    key: Key
    pages: tuple[int, ...]
    users: int = 0
    written: bool = False


@dataclass(eq=False, kw_only=True)
class Reservation:
    """The pages of one request: `pages[i]` holds positions from i * page_size on.

    The first `num_cached` tokens' pages are written already and must not be written again.
    """

    pages: tuple[int, ...]
    num_cached: int
    _chain: list[_Block]  # blocks from the prompt's beginning on that it uses and are written
    _private: set[int]  # its pages that nobody else may read
    _promised: deque[_Block] = field(default_factory=deque)  # what it is going to write, in order
    _released: bool = False


class PageTable:
    """Gives out `num_pages` pages; see the module's text.

    `granularity` (tokens, a multiple of `page_size`) is the unit of sharing: where chunks of a
    prompt start changes rounding, so runs that must not depend on the cache share whole chunks.
    """

    def __init__(self, num_pages: int, *, page_size: int, granularity: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages={num_pages} and page_size={page_size} must be positive")
        if granularity < 1 or granularity % page_size:
            raise ValueError(
                f"granularity={granularity} must be a positive multiple of page_size={page_size}"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.granularity = granularity
        self._free = list(reversed(range(num_pages)))  # the last one is given out first
        self._blocks: dict[Key, _Block] = {}
        self._unused: OrderedDict[int, _Block] = OrderedDict()  # by number; oldest first
        self._last_number = _START

    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def cached_pages(self) -> int:
        """Pages that nobody uses but may serve a prompt to come; given out when there is need."""
        return len(self._unused) * self._pages_per_block

    @property
    def _pages_per_block(self) -> int:
        return self.granularity // self.page_size

    def pages_for(self, capacity: int) -> int:
        """Number of pages that hold so many positions."""
        return -(-capacity // self.page_size)

    def reserve(
        self, tokens: Sequence[int], *, capacity: int, most_promised: int | None = None
    ) -> Reservation | None:
        """Pages for `capacity` positions of a request with prompt `tokens`; None if not now.

        Written blocks that the prompt begins with are shared, but never the whole prompt: its last
        token is always computed, because the next token is drawn from its output. The prompt's
        other whole blocks are promised to later prompts until `share` or `release`. The result is
        None, and nothing changes, where there are too few pages, and where other requests are
        writing more than `most_promised` of the tokens that follow those shared. A request without
        tokens shares nothing.
        Raises `ValueError` for a capacity that is not positive, below the prompt, or above all
        pages together.
        """
        if capacity < max(1, len(tokens)):
            raise ValueError(
                f"capacity={capacity} must be at least 1 and hold the prompt's {len(tokens)} tokens"
            )
        num_pages = self.pages_for(capacity)
        if num_pages > self.num_pages:
            raise ValueError(
                f"{capacity} positions need {num_pages} pages of {self.page_size}, and there are "
                f"{self.num_pages}; shorten the prompt, lower max_tokens or give more pages"
            )
        contents = self._contents(tokens)
        chain, promised = self._find(contents[: max(0, len(tokens) - 1) // self.granularity])
        if most_promised is not None and promised > most_promised:
            return None
        missing = num_pages - len(chain) * self._pages_per_block
        unused = sum(block.users == 0 for block in chain)
        if missing > self.free_pages + self.cached_pages - unused * self._pages_per_block:
            return None
        for block in chain:
            block.users += 1
            self._unused.pop(block.number, None)
        while missing > self.free_pages:
            self._evict()
        private = [self._free.pop() for _ in range(missing)]
        reservation = Reservation(
            pages=(*(page for block in chain for page in block.pages), *private),
            num_cached=len(chain) * self.granularity,
            _chain=chain,
            _private=set(private),
        )
        self._promise(reservation, contents)
        return reservation

    def share(self, reservation: Reservation, num_tokens: int) -> None:
        """Notes that the first `num_tokens` tokens' keys and values are written.

        Whole blocks of them may serve others from now on. A block that another request had already
        promised or written when this one came remains that one's; this copy is never shared.
        """
        assert not reservation._released, "pages shared after their release"
        while reservation._promised:
            if (len(reservation._chain) + 1) * self.granularity > num_tokens:
                return
            block = reservation._promised.popleft()
            block.written = True
            reservation._private -= set(block.pages)
            reservation._chain.append(block)

    def release(self, reservation: Reservation) -> None:
        """Gives the pages back; those of shared blocks keep their contents while there is room."""
        assert not reservation._released, "pages released twice"
        reservation._released = True
        for block in reservation._promised:
            del self._blocks[block.key]
        for block in reversed(reservation._chain):  # so that the last one is evicted first
            block.users -= 1
            if block.users == 0:
                self._unused[block.number] = block
        self._free += sorted(reservation._private, reverse=True)

    def flush(self) -> None:
        """Forgets the contents of all pages, of which none may be reserved."""
        in_use = self.num_pages - self.free_pages - self.cached_pages
        assert in_use == 0, f"{in_use} pages are reserved"
        for block in self._unused.values():
            self._free += reversed(block.pages)
        self._unused.clear()
        self._blocks.clear()

    def _contents(self, tokens: Sequence[int]) -> list[bytes]:
        """Tokens of each whole block, as bytes, which are hashed many times faster."""
        size = self.granularity * _ITEM
        raw = array("q", tokens).tobytes()
        return [raw[end - size : end] for end in range(size, len(raw) + 1, size)]

    def _find(self, contents: Sequence[bytes]) -> tuple[list[_Block], int]:
        """Written blocks that the contents begin with, and tokens after them under way."""
        chain: list[_Block] = []
        number, promised = _START, 0
        for content in contents:
            block = self._blocks.get((number, content))
            if block is None:
                break
            number = block.number
            if block.written:
                chain.append(block)
            else:
                promised += self.granularity
        return chain, promised

    def _promise(self, reservation: Reservation, contents: Sequence[bytes]) -> None:
        """Promises the whole blocks of a prompt that follow the shared ones.

        It ends at a block that another request has promised: later ones depend on that request.
        """
        chain = reservation._chain
        number = chain[-1].number if chain else _START
        for i in range(len(chain), len(contents)):
            key = (number, contents[i])
            if key in self._blocks:
                return
            self._last_number += 1
            number = self._last_number
            first = i * self._pages_per_block
            pages = reservation.pages[first : first + self._pages_per_block]
            block = _Block(number=number, key=key, pages=pages, users=1)
            self._blocks[key] = block
            reservation._promised.append(block)

    def _evict(self) -> None:
        _, block = self._unused.popitem(last=False)
        del self._blocks[block.key]
        self._free += reversed(block.pages)
