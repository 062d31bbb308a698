"""Prompt lookup finds what a search through all tokens finds."""

import hypothesis
import pytest
from hypothesis import strategies as st

from infer.speculation.prompt_lookup import PromptLookup


def _search(tokens: list[int], num_tokens: int, *, longest: int, shortest: int) -> tuple[int, ...]:
    """The definition, without an index."""
    for size in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[len(tokens) - size :]:
                guess = list(tokens)
                for i in range(num_tokens):
                    guess.append(guess[start + size + i])
                return tuple(guess[len(tokens) :])
    return ()


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    num_tokens=st.integers(0, 9),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_the_index_finds_what_a_search_finds(tokens, cuts, num_tokens, sizes):
    """At every length, whatever pieces the tokens come in."""
    shortest, longest = sorted(sizes)
    lookup = PromptLookup(longest=longest, shortest=shortest)
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), len(tokens)], strict=True):
        lookup.extend(tokens[first:last])
        seen = tokens[: len(lookup)]
        expected = _search(seen, num_tokens, longest=longest, shortest=shortest)
        assert lookup.propose(num_tokens) == expected
    assert len(lookup) == len(tokens)


def test_a_longer_match_wins_over_a_later_one():
    lookup = PromptLookup([1, 2, 3, 40, 41, 9, 3, 50, 1, 2, 3])
    assert lookup.propose(2) == (40, 41)


def test_the_latest_of_equal_matches_wins():
    assert PromptLookup([1, 2, 40, 1, 2, 50, 1, 2]).propose(1) == (50,)


def test_a_loop_goes_round():
    assert PromptLookup([7, 1, 2, 1, 2]).propose(5) == (1, 2, 1, 2, 1)
    assert PromptLookup([5, 5]).propose(3) == (5, 5, 5)


def test_what_is_new_has_no_guess():
    assert PromptLookup().propose(3) == ()
    assert PromptLookup([1, 2, 3]).propose(3) == ()
    assert PromptLookup([1, 2, 1], shortest=2).propose(3) == ()


@pytest.mark.parametrize(("longest", "shortest"), [(1, 2), (3, 0)])
def test_sizes_are_checked(longest, shortest):
    with pytest.raises(ValueError, match=f"shortest={shortest} and longest={longest} must be"):
        PromptLookup(longest=longest, shortest=shortest)
