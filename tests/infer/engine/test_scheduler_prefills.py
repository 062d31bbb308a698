"""Prompts share prefills with others of their length, and alternate with those that decode."""

import pytest

from infer.engine.scheduler import Decode, Prefill
from tests.infer.engine.test_scheduler import ids, make_request, make_scheduler, prefills


@pytest.mark.parametrize(
    ("rounds", "prefill_tokens", "expected"),
    [(1, 512, "DPDPDPDP"), (3, 512, "PPDPPPDP"), (1, 128, "DPDPDPDP")],
)
def test_what_decodes_waits_for_so_many_prefills(rounds, prefill_tokens, expected):
    scheduler = make_scheduler(prefill_rounds=rounds, prefill_tokens=prefill_tokens)
    scheduler.add(make_request("a", 10))
    scheduler.next()
    scheduler.started(0)
    scheduler.add(make_request("b", 128 * 9))
    kinds = "".join("D" if isinstance(scheduler.next(), Decode) else "P" for _ in range(8))
    assert kinds == expected


def test_what_decodes_waits_for_one_large_prefill_or_several_small_ones():
    scheduler = make_scheduler(prefill_chunk=1024, prefill_tokens=4096)
    scheduler.add(make_request("a", 10))
    scheduler.next()
    scheduler.started(0)
    assert isinstance(scheduler.next(), Decode)
    for length in (60, 120, 250, 380, 500, 760, 1020, 2000):
        scheduler.add(make_request(str(length), length))
    sizes = []
    while isinstance(program := scheduler.next(), Prefill):
        sizes.append(program.num_rows * program.length)
    assert sizes == [64, 128, 256, 384, 512, 768]  # each counts as 512 or more


def test_a_short_prompt_does_not_wait_for_all_of_a_long_one():
    scheduler = make_scheduler()
    scheduler.add(make_request("long", 128 * 20))
    scheduler.next()
    scheduler.add(make_request("short", 10))
    assert "short" in ids(scheduler.next()) + ids(scheduler.next())


def test_short_prompts_do_not_keep_a_long_one_from_being_read():
    scheduler = make_scheduler()
    scheduler.add(make_request("long", 128 * 20))
    turns = 0
    for i in range(100):
        scheduler.add(make_request(f"short {i}", 10))
        program = scheduler.next()
        turns += "long" in ids(program)
        for chunk in program.chunks:
            if chunk.is_last:
                scheduler.finished(chunk.slot)
        if scheduler.state("long") is None:
            break
    assert (i, turns) == (38, 20)  # every other turn


def test_prompts_of_similar_length_are_read_together():
    scheduler = make_scheduler(num_slots=9)
    for id, length in (("a", 60), ("b", 120), ("c", 50), ("d", 100), ("e", 64)):
        scheduler.add(make_request(id, length))
    programs = prefills(scheduler)
    assert [(ids(p), p.num_rows, p.length) for p in programs] == [
        (["a", "c", "e"], 4, 64),
        (["d", "b"], 2, 128),
    ]


def test_rows_that_would_be_empty_read_shorter_prompts():
    scheduler = make_scheduler()
    for id, length in (("a", 120), ("b", 120), ("c", 120), ("d", 5), ("e", 60)):
        scheduler.add(make_request(id, length))
    program = scheduler.next()
    assert (ids(program), program.num_rows) == (["a", "b", "c", "e"], 4)


@pytest.mark.parametrize(("num", "rows"), [(5, [4, 1]), (6, [8]), (7, [8])])
def test_expensive_padding_is_left_out(num, rows):
    """Up to a quarter of the rows is not: another prefill reads the weights again."""
    scheduler = make_scheduler(prefill_chunk=1024, prefill_tokens=8192)
    for i in range(num):
        scheduler.add(make_request(str(i), 1000))
    assert [program.num_rows for program in prefills(scheduler)] == rows


def test_with_one_bucket_a_prompt_is_cut_at_the_same_places_whatever_is_cached():
    scheduler = make_scheduler(buckets="one")
    for id in "ab":
        scheduler.add(make_request(id, 200, first=0))
        chunks = [chunk for program in prefills(scheduler) for chunk in program.chunks]
        assert {chunk.start for chunk in chunks} <= {0, 128}
    assert chunks[0].num_cached == 128


def test_fresh_is_when_nothing_is_before():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 200))
    assert [program.fresh for program in prefills(scheduler)] == [True, False]
