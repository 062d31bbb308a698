"""Every request is admitted, read and answered in bounded time, in shapes known beforehand."""

import dataclasses
import zlib

import hypothesis
import pytest
from hypothesis import strategies as st

from configs.engine import EngineConfig
from configs.sampling import SamplingParams
from infer.engine import buckets
from infer.engine import scheduler as scheduler_lib
from infer.engine.page_table import PageTable
from infer.engine.request import Request
from infer.engine.scheduler import Prefill, Scheduler
from tests.infer.engine import simulator

SETTINGS = EngineConfig(
    num_slots=12, page_size=16, prefill_chunk=128, prefill_tokens=512, decode_steps=4
)


def _settings(**changes) -> EngineConfig:
    return dataclasses.replace(SETTINGS, **changes)


def make_scheduler(num_pages: int = 1000, **changes) -> Scheduler:
    settings = _settings(**changes)
    granularity = buckets.granularity(settings)
    pages = PageTable(num_pages, page_size=settings.page_size, granularity=granularity)
    return Scheduler(settings, pages)


def make_request(id: str, length: int, *, max_tokens: int = 4, first: int | None = None) -> Request:
    """Prompts differ in their first token, and so in all their pages, unless `first` is given."""
    start = zlib.crc32(id.encode()) if first is None else first
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(id=id, tokens=(start, *range(1, length)), sampling=sampling)


def ids(program: Prefill) -> list[str]:
    return [chunk.request.id for chunk in program.chunks]


def prefills(scheduler: Scheduler) -> list[Prefill]:
    """All prefills there are, of requests that never decode."""
    programs = []
    while (program := scheduler.next()) is not None:
        programs.append(program)
    return programs


# Whole runs


@pytest.mark.parametrize("policy", ["fair", "longest_first"])
@pytest.mark.parametrize("buckets", ["few", "one"])
@pytest.mark.parametrize(("num_slots", "num_pages", "lag"), [(3, 25, 0), (12, 47, 2), (40, 200, 3)])
def test_random_traffic_is_answered_as_if_each_were_alone(
    policy, buckets, num_slots, num_pages, lag
):
    """Hundreds of requests that come in bursts, queue up, give up, and share prompts."""
    settings = _settings(num_slots=num_slots, policy=policy, buckets=buckets)
    jobs = simulator.traffic(
        num_slots, num_requests=600, longest=300, most_tokens=40, burst=0.9, cancelled=0.2
    )
    report = simulator.Simulation(settings, jobs, num_pages=num_pages, lag=lag).run()
    assert len(report.answers) > 400
    assert report.cancelled
    assert report.cached_tokens > 0.02 * report.prompt_tokens
    if buckets == "one":
        assert report.shapes == {(min(4, num_slots), 128), (num_slots,)}


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_any_settings_answer_all(data: st.DataObject):
    def draw(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    page_size = draw(1, 20)
    chunk = page_size * draw(1, 20)
    settings = EngineConfig(
        num_slots=draw(1, 9),
        page_size=page_size,
        prefill_chunk=chunk,
        prefill_tokens=chunk + draw(0, 3 * chunk),
        decode_steps=draw(1, 6),
        prefill_rounds=draw(1, 3),
        policy=data.draw(st.sampled_from(["fair", "longest_first"])),
        buckets=data.draw(st.sampled_from(["few", "one"])),
        prefix_cache=data.draw(st.sampled_from(["on", "off"])),
    )
    longest, most_tokens = draw(1, 200), draw(1, 20)
    least = -(-(longest + most_tokens - 1) // page_size)
    jobs = simulator.traffic(
        draw(0, 10**6),
        num_requests=draw(1, 40),
        longest=longest,
        most_tokens=most_tokens,
        burst=data.draw(st.sampled_from([0, 0.5, 1])),
    )
    pages = least + draw(0, 3 * least)
    simulator.Simulation(settings, jobs, num_pages=pages, lag=draw(0, 3)).run()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_long_random_traffic(seed):
    settings = _settings(
        num_slots=8 * (seed + 1),
        policy=("fair", "longest_first")[seed % 2],
        prefill_rounds=1 + seed % 3,
    )
    jobs = simulator.traffic(
        seed, num_requests=4000, longest=400, most_tokens=60, burst=0.97, cancelled=0.15
    )
    simulator.Simulation(settings, jobs, num_pages=60 * (seed + 1), lag=seed % 4).run()


# Admission


def test_small_requests_pass_a_large_one_that_does_not_fit_but_not_for_ever():
    scheduler = make_scheduler(num_pages=10, num_slots=3, prefix_cache="off")
    scheduler.add(make_request("running", 100, max_tokens=12))  # 7 of 10 pages
    prefills(scheduler)
    scheduler.add(make_request("large", 160, max_tokens=1))
    for i in range(9):
        scheduler.add(make_request(f"small {i}", 10))
    admitted = []
    for _ in range(9):
        admitted += [id for program in prefills(scheduler) for id in ids(program)]
        for id in admitted:
            scheduler.cancel(id)
    assert admitted == ["small 0", "small 1", "small 2"]  # as many as there are slots
    scheduler.cancel("running")
    order = [id for program in prefills(scheduler) for id in ids(program)]
    assert order[:2] == ["large"] * 2
    scheduler.cancel("large")
    assert prefills(scheduler)[0].chunks[0].request.id == "small 3"


def test_a_request_that_gave_up_waiting_holds_nobody_back():
    scheduler = make_scheduler(num_pages=10, num_slots=2, prefix_cache="off")
    scheduler.add(make_request("running", 100, max_tokens=12))
    prefills(scheduler)
    scheduler.add(make_request("large", 160, max_tokens=1))
    for i in range(4):
        scheduler.add(make_request(f"small {i}", 10))
    for i in range(2):
        prefills(scheduler)
        scheduler.cancel(f"small {i}")
    assert prefills(scheduler) == []
    assert scheduler.cancel("large") is None
    assert [ids(program) for program in prefills(scheduler)] == [["small 2"]]


def test_longest_first_goes_by_prompt_and_answer():
    scheduler = make_scheduler(policy="longest_first", num_slots=1)
    for id, length, max_tokens in (("a", 30, 9), ("b", 20, 90), ("c", 30, 9), ("d", 31, 9)):
        scheduler.add(make_request(id, length, max_tokens=max_tokens))
    order = []
    while not scheduler.idle:
        order += ids(scheduler.next())
        scheduler.cancel(order[-1])
    assert order == ["b", "d", "a", "c"]


def test_ageing_lets_a_short_request_into_a_line_of_long_ones():
    scheduler = make_scheduler(policy="longest_first", num_slots=1)
    scheduler.add(make_request("first", 50))
    scheduler.next()
    scheduler.add(make_request("short", 10))
    waited = 0
    running = "first"
    while running != "short":
        scheduler.add(make_request(f"long {waited}", 50))
        scheduler.cancel(running)
        running = ids(scheduler.next())[0]
        waited += running != "short"
    assert waited == scheduler_lib._PATIENCE["longest_first"]


def test_a_prompt_that_is_being_read_is_read_once():
    scheduler = make_scheduler()
    for id in "abc":
        scheduler.add(make_request(id, 200, first=0))
    programs = prefills(scheduler)
    assert [ids(program) for program in programs] == [["a"], ["a", "b", "c"]]
    read = dict.fromkeys("abc", 0)
    for program in programs:
        for chunk in program.chunks:
            read[chunk.request.id] += len(chunk.tokens)
    assert read == {"a": 200, "b": 200 - 128, "c": 200 - 128}


def test_who_waits_for_a_prompt_that_is_given_up_reads_it_itself():
    scheduler = make_scheduler()
    for id in "ab":
        scheduler.add(make_request(id, 300, first=0))
    assert ids(scheduler.next()) == ["a"]
    assert scheduler.cancel("a") == 0
    program = scheduler.next()
    assert (ids(program), program.chunks[0].num_cached) == (["b"], 128)


def test_who_was_overtaken_enough_waits_no_longer_for_a_prompt_to_be_written():
    scheduler = make_scheduler(num_slots=2)
    scheduler.add(make_request("a", 128 * 20, first=0))
    scheduler.add(make_request("b", 128 * 20, first=0))
    for i in range(3):
        scheduler.add(make_request(f"short {i}", 10))
    scheduler.next()
    for i in range(2):
        while f"short {i}" not in ids(scheduler.next()):
            pass
        scheduler.cancel(f"short {i}")
    chunks = [chunk for _ in range(2) for chunk in scheduler.next().chunks]
    assert {chunk.request.id for chunk in chunks} == {"a", "b"}
    assert 0 < max(chunk.num_cached for chunk in chunks) < 128 * 5


def test_short_prompts_do_not_wait_for_each_other():
    scheduler = make_scheduler()
    for id in "ab":
        scheduler.add(make_request(id, 60, first=0))
    assert ids(scheduler.next()) == ["a", "b"]


def test_a_prompt_with_logprobs_is_read_whole():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 200, first=0))
    prefills(scheduler)
    scored = dataclasses.replace(
        make_request("b", 200, first=0), sampling=SamplingParams(max_tokens=0, prompt_logprobs=0)
    )
    scheduler.add(scored)
    chunks = [chunk for program in prefills(scheduler) for chunk in program.chunks]
    assert [(chunk.start, len(chunk.tokens)) for chunk in chunks] == [(0, 128), (128, 72)]
    assert len(chunks[0].pages) == 13


def test_admissions_that_are_held_wait_until_they_are_opened():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 300))
    assert ids(scheduler.next()) == ["a"]
    scheduler.hold_admissions()
    scheduler.add(make_request("b", 10))
    assert [ids(program) for program in prefills(scheduler)] == [["a"], ["a"]]
    scheduler.cancel("a")
    assert scheduler.next() is None and scheduler.num_waiting == 1
    scheduler.open_admissions()
    assert ids(scheduler.next()) == ["b"]


def test_pages_hold_all_but_the_last_token():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 10, max_tokens=7))  # 16 positions are written
    scheduler.add(make_request("b", 10, max_tokens=8))
    assert [len(chunk.pages) for chunk in scheduler.next().chunks] == [1, 2]


def test_what_cannot_be_served_is_refused_at_once():
    scheduler = make_scheduler(num_pages=4)
    scheduler.add(make_request("a", 60, max_tokens=5))
    with pytest.raises(ValueError, match="'a' is here already"):
        scheduler.add(make_request("a", 5))
    with pytest.raises(
        ValueError, match=r"'b' needs 65 positions \(prompt 60, max_tokens 6\).* 64"
    ):
        scheduler.add(make_request("b", 60, max_tokens=6))
    with pytest.raises(ValueError, match="'c' has an empty prompt"):
        scheduler.add(Request(id="c", tokens=(), sampling=SamplingParams()))
    scheduler.next()
    with pytest.raises(ValueError, match="'a' is here already"):
        scheduler.add(make_request("a", 5))
    assert scheduler.cancel("z") is None
    assert scheduler.cancel("a") == 0
    assert scheduler.idle


def test_the_first_prefill_does_not_wait_for_everybody_to_be_admitted():
    scheduler = make_scheduler(num_slots=100)
    for i in range(90):
        scheduler.add(make_request(str(i), 10))
    for admitted in (32, 64, 90):
        scheduler.next()
        assert scheduler.num_running == admitted


def test_shapes_are_few_and_cover_the_settings():
    shapes = buckets.shapes(_settings(num_slots=6, prefill_chunk=800, prefill_tokens=1700))
    assert shapes.decode == (1, 2, 4, 6)
    assert shapes.prefill == (
        (1, 64), (4, 64), (6, 64), (1, 128), (4, 128), (6, 128), (1, 256), (4, 256), (6, 256),
        (1, 384), (2, 384), (4, 384), (1, 512), (2, 512), (3, 512), (1, 800), (2, 800),
    )  # fmt: skip
    one = buckets.shapes(_settings(buckets="one"))
    assert (one.prefill, one.decode) == (((4, 128),), (12,))
    default = buckets.shapes(EngineConfig())
    assert default.decode == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert len(default.prefill) == 35


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": "many"}, "buckets='many' is unknown; known: few, one"),
        ({"prefill_rounds": 0}, "prefill_rounds=0 must be"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        _settings(**changes)
