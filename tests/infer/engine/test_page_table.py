"""Pages are owned once, shared only when written, and evicted last used first out."""

import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from infer.engine.page_table import PageTable
from tests.infer.engine import simulator

PAGE = 4


def _table(num_pages: int = 16, granularity: int = PAGE) -> PageTable:
    return PageTable(num_pages, page_size=PAGE, granularity=granularity)


def _leave(table: PageTable, tokens: range | list[int]) -> tuple[int, ...]:
    """Reads a prompt, leaves it in the cache, and says where."""
    reservation = table.reserve(tokens, capacity=len(tokens))
    table.share(reservation, len(tokens))
    table.release(reservation)
    return reservation.pages


def _promised(table: PageTable, tokens: range | list[int]) -> int:
    """Tokens that others write of this prompt, right after those that can be shared now."""
    for most in range(len(tokens)):
        found = table.reserve(tokens, capacity=len(tokens), most_promised=most)
        if found is not None:
            table.release(found)
            return most
    raise AssertionError("too few pages")


def test_what_decides_on_the_host_needs_no_jax():
    engine = "infer.engine.scheduler, infer.engine.request_state, infer.engine.page_table"
    modules = f"{engine}, infer.speculation.prompt_lookup, infer.speculation.proposers"
    code = f"import sys, {modules}; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_prompts_that_begin_alike_share_whole_pages():
    table = _table()
    first = table.reserve(range(10), capacity=13)
    assert (len(first.pages), first.num_cached) == (4, 0)
    table.share(first, 10)
    second = table.reserve([*range(9), 99, 98], capacity=11)
    assert second.num_cached == 8
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] not in first.pages
    assert table.free_pages == 16 - 4 - 1


def test_a_flush_forgets_every_prompt():
    table = _table()
    _leave(table, range(10))
    assert table.cached_pages == 2
    table.flush()
    assert (table.free_pages, table.cached_pages) == (16, 0)
    held = table.reserve(range(10), capacity=10)
    assert held.num_cached == 0
    with pytest.raises(AssertionError, match="3 pages are reserved"):
        table.flush()
    table.release(held)
    simulator.audit(table, [])


def test_a_page_counts_from_its_beginning_not_by_its_own_tokens():
    table = _table()
    _leave(table, [1, 1, 1, 1, 2, 2, 2, 2, 3])
    assert table.reserve([9, 9, 9, 9, 2, 2, 2, 2, 3], capacity=9).num_cached == 0
    assert table.reserve([2, 2, 2, 2, 1, 1, 1, 1, 3], capacity=9).num_cached == 0


def test_tokens_are_compared_not_only_their_hashes():
    alike = [0, 0, 0, -1], [0, 0, 0, -2]  # hash(-1) == hash(-2)
    assert hash(tuple(alike[0])) == hash(tuple(alike[1]))
    table = _table()
    _leave(table, alike[0])
    assert table.reserve([*alike[1], 5], capacity=5).num_cached == 0
    assert table.reserve([*alike[0], 5], capacity=5).num_cached == 4


def test_nothing_is_shared_before_it_is_written():
    table = _table()
    first = table.reserve(range(10), capacity=10)
    assert table.reserve(range(10), capacity=10).num_cached == 0
    table.share(first, 7)  # one page and some of the next
    assert table.reserve(range(10), capacity=10).num_cached == 4
    assert _promised(table, range(10)) == 4
    table.share(first, 10)
    assert table.reserve(range(10), capacity=10).num_cached == 8
    assert _promised(table, range(10)) == 0


def test_a_promise_ends_with_the_request_that_made_it():
    table = _table()
    first = table.reserve(range(13), capacity=13)
    assert _promised(table, range(20)) == 12
    assert _promised(table, [*range(6), *range(50, 60)]) == 4
    assert _promised(table, range(12)) == 8  # its last token must be read in any case
    table.share(first, 4)
    table.release(first)
    assert _promised(table, range(20)) == 0
    assert table.reserve(range(20), capacity=20).num_cached == 4


def test_the_last_token_is_always_read():
    table = _table()
    _leave(table, range(8))
    assert table.reserve(range(8), capacity=8).num_cached == 4
    assert table.reserve(range(9), capacity=9).num_cached == 8


def test_two_that_write_the_same_keep_their_own_copies():
    table = _table()
    first = table.reserve(range(9), capacity=9)
    second = table.reserve(range(9), capacity=9)
    assert not set(first.pages) & set(second.pages)
    table.share(second, 9)  # the block is promised by the first, which has not written it
    assert _promised(table, range(9)) == 8
    table.share(first, 9)
    table.release(second)
    assert (table.free_pages, table.cached_pages) == (16 - 3, 0)
    assert table.reserve(range(9), capacity=9).pages[:2] == first.pages[:2]


def test_no_tokens_share_nothing():
    table = _table()
    _leave(table, range(9))
    reservation = table.reserve((), capacity=9)
    assert reservation.num_cached == 0
    table.share(reservation, 9)
    table.release(reservation)
    assert table.cached_pages == 8 // PAGE


def test_the_unused_for_longest_goes_first_and_its_end_before_its_beginning():
    table = _table(num_pages=6)
    _leave(table, range(8))
    _leave(table, range(100, 108))
    assert (table.free_pages, table.cached_pages) == (2, 4)
    table.release(table.reserve(range(9), capacity=9))  # used again: the other one is older now
    table.release(table.reserve((), capacity=12))  # takes one cached page
    assert table.reserve(range(100, 110), capacity=10).num_cached == 4
    table = _table(num_pages=6)
    _leave(table, range(8))
    _leave(table, range(100, 108))
    table.release(table.reserve((), capacity=16))
    assert table.reserve(range(9), capacity=9).num_cached == 0
    assert table.cached_pages == 2


def test_cached_pages_that_a_prompt_needs_are_not_counted_as_room():
    table = _table(num_pages=4)
    _leave(table, range(12))
    assert (table.free_pages, table.cached_pages) == (1, 3)
    assert table.reserve(range(9), capacity=20 - 4).pages is not None
    table = _table(num_pages=4)
    _leave(table, range(12))
    held = table.reserve((), capacity=4)
    assert table.reserve(range(13), capacity=16) is None  # three are cached, the fourth is held
    assert table.reserve(range(13), capacity=13) is None
    assert table.cached_pages == 3  # a reservation that failed evicted nothing
    table.release(held)
    assert table.reserve(range(13), capacity=13).num_cached == 12


def test_all_cached_pages_can_be_given_out():
    table = _table(num_pages=4)
    _leave(table, range(16))
    assert (table.free_pages, table.cached_pages) == (0, 4)
    reservation = table.reserve(range(50, 60), capacity=16)
    assert sorted(reservation.pages) == [0, 1, 2, 3]
    assert table.cached_pages == 0


def test_granularity_shares_several_pages_at_a_time():
    table = _table(granularity=2 * PAGE)
    pages = _leave(table, range(22))  # 6 pages, of which 4 are shared
    assert (table.free_pages, table.cached_pages) == (12, 4)
    again = table.reserve(range(17), capacity=18)
    assert (again.num_cached, again.pages[:4]) == (16, pages[:4])
    assert table.reserve(range(16), capacity=18).num_cached == 8


def test_what_cannot_be_is_refused():
    table = _table(num_pages=4)
    with pytest.raises(ValueError, match="17 positions need 5 pages of 4, and there are 4; short"):
        table.reserve(range(3), capacity=17)
    with pytest.raises(ValueError, match="capacity=2 must be at least 1 and hold the prompt's 3"):
        table.reserve(range(3), capacity=2)
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        table.reserve((), capacity=0)
    with pytest.raises(ValueError, match="granularity=6 must be a positive multiple of page_siz"):
        _table(granularity=6)
    with pytest.raises(ValueError, match="num_pages=0 and page_size=4 must be positive"):
        _table(num_pages=0)


def test_pages_are_released_once():
    table = _table()
    reservation = table.reserve(range(5), capacity=5)
    table.release(reservation)
    with pytest.raises(AssertionError, match="twice"):
        table.release(reservation)
    with pytest.raises(AssertionError, match="after their release"):
        table.share(reservation, 5)


class Pages(stateful.RuleBasedStateMachine):
    """Random reservations beside a list of what each page holds."""

    @stateful.initialize(num_pages=st.integers(1, 14), blocks=st.integers(1, 3))
    def start(self, num_pages: int, blocks: int) -> None:
        self.table = _table(num_pages, granularity=blocks * PAGE)
        self.held: list = []  # (reservation, tokens, how many are written)
        self.contents: dict[int, list[int]] = {}  # page -> all tokens up to its end

    @stateful.rule(
        tokens=st.lists(st.integers(0, 1), max_size=30),
        more=st.integers(1, 20),
        most_promised=st.none() | st.integers(0, 12),
    )
    def reserve(self, tokens: list[int], more: int, most_promised: int | None) -> None:
        capacity = len(tokens) + more
        room = self.table.free_pages + self.table.cached_pages
        needed = self.table.pages_for(capacity)
        if needed > self.table.num_pages:
            return
        reservation = self.table.reserve(tokens, capacity=capacity, most_promised=most_promised)
        if reservation is None:
            unwritten = sum(len(entry[0]._promised) for entry in self.held)
            assert needed > room - len(tokens) // PAGE or (most_promised is not None and unwritten)
            return
        assert len(set(reservation.pages)) == needed
        cached = reservation.num_cached
        assert cached % self.table.granularity == 0
        assert cached < max(1, len(tokens))
        for i in range(cached // PAGE):
            assert self.contents[reservation.pages[i]] == tokens[: (i + 1) * PAGE]
        self._write(reservation, tokens, cached, cached)
        self.held.append([reservation, tokens, cached])

    @stateful.precondition(lambda self: self.held)
    @stateful.rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.held))
        reservation, tokens, written = entry
        until = data.draw(st.integers(written, len(tokens)))
        self._write(reservation, tokens, written, until)
        self.table.share(reservation, until)
        entry[2] = until

    def _write(self, reservation, tokens: list[int], start: int, until: int) -> None:
        for i in range(start // PAGE, len(reservation.pages)):
            page = reservation.pages[i]
            others = [r.pages for r, *_ in self.held if r is not reservation]
            assert not any(page in pages for pages in others)
            self.contents[page] = tokens[: min(until, (i + 1) * PAGE)]

    @stateful.precondition(lambda self: self.held)
    @stateful.rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.held) - 1))
        self.table.release(self.held.pop(i)[0])

    @stateful.invariant()
    def every_page_has_one_place(self) -> None:
        if hasattr(self, "table"):
            simulator.audit(self.table, [reservation for reservation, *_ in self.held])


TestPages = Pages.TestCase
TestPages.settings = hypothesis.settings(max_examples=80, stateful_step_count=30, deadline=None)
