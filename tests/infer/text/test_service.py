"""Text over a fake engine: stop strings, logprobs, choices, cancellation, errors kept apart."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from infer.constraints.spec import ConstraintSpec
from infer.text.outputs import Answers
from infer.text.service import TextRequest
from infer.text.stop_strings import StopStrings
from tests.infer import fake_engine

SETTINGS = fake_engine.SETTINGS


@pytest.fixture(scope="module")
def words():
    return fake_engine.words()


def request(id: str = "r", prompt="hello", *, own: dict | None = None, **options) -> TextRequest:
    sampling = dataclasses.replace(SETTINGS, **(own or {}))
    return TextRequest(id=id, prompt=prompt, sampling=sampling, **options)


def finish(service) -> dict[str, Answers]:
    answers: dict[str, Answers] = {}
    while not service.idle:
        for update in service.step():
            assert not update.empty
            collected = answers.setdefault(update.id, Answers())
            assert collected.usage is None, "nothing comes after the usage"
            collected.add(update)
    assert all(a.usage is not None for a in answers.values())
    return answers


def answer(service, asked: TextRequest):
    service.submit(asked)
    [collected] = finish(service).values()
    return collected


def test_text_is_the_tokens_without_the_closing_one(words):
    text = "Grüße, 世界! <tool_call> a few words"
    collected = answer(fake_engine.service(text=text), request())
    [choice] = collected.choices
    assert (choice.text, choice.finish_reason) == (text, "stop")
    assert choice.tokens == [*words.encode(text), words.eos_ids[0]]
    assert collected.usage.prompt_tokens == len(words.encode("hello"))
    assert collected.usage.completion_tokens == len(choice.tokens)
    assert collected.usage.cached_tokens in (0, 4)


def test_half_a_character_at_the_end_is_replaced(words):
    service = fake_engine.service(text="ab世")
    cut = len(words.encode("ab世")) - 1
    [choice] = answer(service, request(own={"max_tokens": cut})).choices
    assert (choice.text, choice.finish_reason) == ("ab\ufffd", "length")


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    text=st.text("abc世", max_size=14),
    stops=st.lists(st.text("abc世", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
def test_stop_strings_end_the_text_where_they_are_first_complete(text, stops, cuts):
    want, found, end = text, False, 0
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            want, found = text[: end - max(map(len, complete))], True
            break
    search, shown, taken, stopped = StopStrings(stops), "", 0, None
    for cut in cuts * len(text):
        if taken == len(text) or stopped is not None:
            break
        piece, stopped = search.push(text[taken : taken + cut])
        taken += cut if stopped is None else stopped
        taken = min(taken, len(text))
        shown += piece
        assert want.startswith(shown), "shown text is never taken back"
    shown += "" if stopped is not None else search.finish()
    assert (shown, stopped is not None) == (want, found)
    assert taken == (end if found else len(text))


def test_text_is_held_back_no_longer_than_needed():
    search = StopStrings(["STOP", "\n\n"])
    pushed = [search.push(text) for text in ("ST", "x", "\n", "a\n", "ST", "OP more")]
    assert [shown for shown, _ in pushed] == ["", "STx", "", "\na", "\n", ""]
    assert [end for _, end in pushed] == [None] * 5 + [2]


def test_what_was_complete_before_the_text_could_end_does_not_end_it():
    search = StopStrings(["a", "abc"])
    assert search.skip("xa") == "x"
    assert search.push("by") == ("aby", None)
    assert search.push("xa") == ("x", 2)


@pytest.mark.parametrize("cuts", [(1,), (3, 1, 8), (64,)])
@pytest.mark.parametrize("stop", ["few wo", "世", "rds, 世 t", "w"])
def test_a_stop_string_ends_a_request_and_its_tokens(words, stop, cuts):
    text = "a few words, 世 to have a few wo"
    service = fake_engine.service(text=text, cuts=cuts)
    own = {"logprobs": 2}
    collected = answer(service, request(stop=(stop, "never"), own=own))
    [choice] = collected.choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    ids = words.encode(text)
    ends = [words.decode(ids[:count]) for count in range(len(ids) + 1)]
    count = next(i for i, begun in enumerate(ends) if stop in begun)
    assert choice.tokens == ids[:count]
    assert collected.usage.completion_tokens == count
    assert [entry.id for entry in choice.logprobs] == choice.tokens
    for entry in choice.logprobs:
        assert entry.hidden == (entry.offset >= len(choice.text))
    assert service.engine.idle


def test_text_before_min_tokens_cannot_stop(words):
    text = "xyxyxyxyxy"
    [free] = answer(fake_engine.service(text=text), request(stop=("y",))).choices
    assert free.text == "x"
    ids = words.encode(text)
    own = {"min_tokens": len(ids) - 1}
    [later] = answer(fake_engine.service(text=text), request(stop=("y",), own=own)).choices
    assert text.startswith(later.text) and len(later.tokens) >= len(ids) - 1
    assert later.finish_reason == "stop" and later.text.endswith("x")


def test_answers_do_not_depend_on_how_events_are_cut_or_on_neighbours(words):
    own = {"temperature": 1.0, "logprobs": 1}
    asked = [
        request(f"{i}", f"prompt {i}", own=own | {"seed": i, "min_tokens": i}) for i in range(12)
    ]
    asked = [dataclasses.replace(r, stop=("a", "e f"), n=1 + i % 3) for i, r in enumerate(asked)]
    seen = []
    for cuts, slots in (((1,), 1), ((3, 1, 8), 4), ((40,), 20)):
        service = fake_engine.service(cuts=cuts, num_slots=slots)
        for r in asked:
            service.submit(r)
        answers = finish(service)
        seen.append({id: (a.choices, a.usage) for id, a in answers.items()})
    assert seen[0] == seen[1] == seen[2]
    for r in asked:
        alone = answer(fake_engine.service(), r)
        assert (alone.choices, alone.usage) == seen[0][r.id]


def test_logprobs_become_text(words):
    text = "a 世"
    [choice] = answer(fake_engine.service(text=text), request(own={"logprobs": 3})).choices
    assert [entry.id for entry in choice.logprobs] == choice.tokens
    shown = [entry for entry in choice.logprobs if not entry.hidden]
    assert b"".join(entry.bytes for entry in shown) == text.encode()
    assert [entry.hidden for entry in choice.logprobs] == [False] * len(shown) + [True]
    context = words.encode("hello")
    for entry in choice.logprobs:
        assert entry.logprob == fake_engine.logprob(context, entry.id) == 2 * entry.drawn
        assert len(entry.top) == 3
        assert all(top.bytes == words.token_bytes(top.id) for top in entry.top)
        context = [*context, entry.id]
    # All bytes of the character begin at its place.
    assert [e.offset for e in shown] == sorted(e.offset for e in shown)
    assert shown[-1].offset == 2


def test_echo_gives_the_prompt_with_its_logprobs(words):
    own = {"logprobs": 1, "prompt_logprobs": 1}
    asked = request(prompt="hello 世", echo="prompt_and_answer", own=own)
    [choice] = answer(fake_engine.service(text="a few"), asked).choices
    assert choice.text == "hello 世a few"
    ids = words.encode("hello 世")
    assert [entry.id for entry in choice.prompt_logprobs] == ids
    assert choice.prompt_logprobs[0].logprob is None
    for i, entry in enumerate(choice.prompt_logprobs[1:], 1):
        assert entry.logprob == fake_engine.logprob(ids[:i], ids[i])
    assert choice.logprobs[0].offset == len("hello 世")
    scored = dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, max_tokens=0))
    [choice] = answer(fake_engine.service(), scored).choices
    assert (choice.text, choice.tokens, choice.finish_reason) == ("hello 世", [], "length")
    assert len(choice.prompt_logprobs) == len(ids)


def test_choices_have_seeds_of_their_own_and_the_first_is_the_one_alone(words):
    own = {"temperature": 1.0, "seed": 5}
    collected = answer(fake_engine.service(), request(n=3, own=own))
    assert [choice.index for choice in collected.choices] == [0, 1, 2]
    texts = {choice.text for choice in collected.choices}
    assert len(texts) == 3
    [alone] = answer(fake_engine.service(), request(own=own)).choices
    assert collected.choices[0].tokens == alone.tokens
    assert collected.usage.completion_tokens == sum(len(c.tokens) for c in collected.choices)
    assert collected.usage.prompt_tokens == len(words.encode("hello"))


def test_best_of_gives_the_likeliest(words):
    own = {"temperature": 1.0, "logprobs": 0}
    drawn = answer(fake_engine.service(), request(n=6, own=own))
    best = sorted(drawn.choices, key=lambda c: -c.mean_logprob)[:2]
    collected = answer(fake_engine.service(), request(n=2, best_of=6, own=own))
    assert [c.tokens for c in collected.choices] == [c.tokens for c in best]
    assert [c.logprobs for c in collected.choices] == [c.logprobs for c in best]
    assert [c.index for c in collected.choices] == [0, 1]
    assert collected.usage == drawn.usage
    quiet = answer(fake_engine.service(), request(n=2, best_of=6, own=own | {"logprobs": None}))
    assert [c.tokens for c in quiet.choices] == [c.tokens for c in best]
    assert not any(c.logprobs for c in quiet.choices)


def test_cancelling_ends_one_request_and_no_other(words):
    service = fake_engine.service(cuts=(2,), num_slots=2)
    for id in ("a", "b", "c"):
        service.submit(request(id, f"prompt {id}", n=2, own={"temperature": 1.0}))
    first = service.step()
    service.cancel("a")
    service.cancel("c")
    service.cancel("unknown")
    answers = finish(service)
    assert {c.finish_reason for c in answers["a"].choices} == {"cancelled"}
    assert {c.finish_reason for c in answers["c"].choices} == {"cancelled"}
    assert answers["c"].usage.completion_tokens == 0
    assert {c.finish_reason for c in answers["b"].choices} == {"length"}
    assert answers["a"].usage.completion_tokens == sum(
        len(update.tokens) for update in first if update.id == "a"
    )
    service.cancel("a")
    assert service.idle and service.engine.idle


BAD = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "x" * 2000}, "max_length=1024"),
    ({"prompt": (5, 10**6)}, "outside the vocabulary"),
    ({"prompt": "\ud800"}, "surrogate"),
    ({"prompt": ({"role": "user"},)}, "content"),
    ({"prompt": ({"role": "user", "content": "a"}, {"role": "x", "content": "b"})}, "role"),
    ({"constraint": ConstraintSpec("regex", "a+")}, "regex: no structured output"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_an_error_opens_nothing(words, options, message):
    service = fake_engine.service()
    service.submit(request("good"))
    with pytest.raises(ValueError, match=message):
        service.submit(request("bad", **options))
    with pytest.raises(ValueError, match="'good' is open already"):
        service.submit(request("good"))
    assert service.num_open == 1 and service.engine.num_submitted == 1
    assert set(finish(service)) == {"good"}


class Failing:
    """A constraint that allows everything, until it cannot go on."""

    def __init__(self, *, at: int) -> None:
        self.left = at

    def mask(self) -> np.ndarray:
        if self.left == 0:
            raise RuntimeError("the grammar is too much")
        return np.full(9, 2**32 - 1, np.uint32)

    def accept(self, token: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the token is not allowed")


def test_min_tokens_beside_a_constraint_are_refused():
    """A form that is complete allows nothing but the end, which min_tokens forbids."""
    with pytest.raises(ValueError, match="min_tokens=2 and a constraint"):
        request(constraint=ConstraintSpec("regex", "a"), own={"min_tokens": 2})


def test_a_constraint_that_fails_ends_its_answer_and_no_other(words):
    limits = iter([5, 99, 5])
    service = fake_engine.service(compile_constraint=lambda spec: Failing(at=next(limits)))
    spec = ConstraintSpec("json_object")
    service.submit(request("a", n=2, constraint=spec))
    service.submit(request("b", best_of=1, constraint=spec))
    service.submit(request("c"))
    answers = finish(service)
    failed, whole = answers["a"].choices
    assert (failed.finish_reason, failed.error) == ("cancelled", "the grammar is too much")
    assert (whole.finish_reason, whole.error) == ("length", None)
    assert answers["b"].choices[0].error is not None
    assert answers["c"].choices[0].finish_reason == "length"


def test_a_choice_that_is_refused_takes_the_others_back(words):
    made = []

    def compile_constraint(spec):
        made.append(spec)
        if len(made) == 3:
            raise ValueError("too much")
        return Failing(at=99)

    service = fake_engine.service(compile_constraint=compile_constraint)
    spec = ConstraintSpec("choice", ("a", "b"))
    with pytest.raises(ValueError, match="too much"):
        service.submit(request(n=4, constraint=spec))
    assert service.num_open == 0
    assert finish(service) == {}
    assert made == [spec] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n": 0}, "n=0"), ({"best_of": 1, "n": 2}, "best_of=1"), ({"stop": ("a", "")}, "stop")],
)
def test_requests_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        request(**options)


def test_prompts_of_all_kinds(words):
    service = fake_engine.service(bos_id=3)
    turns = ({"role": "user", "content": "hi"},)
    assert service.encode(request(prompt="hello")) == tuple(words.encode("hello"))
    assert service.encode(request(prompt="")) == service.encode(request(prompt=())) == (3,)
    assert service.encode(request(prompt=(1, 2))) == (1, 2)
    chat = service.encode(request(prompt=turns))
    assert words.decode(chat).endswith("<|im_start|>assistant\n")
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    assert "weather" in words.decode(service.encode(request(prompt=turns, tools=(tool,))))
    end = words.control_ids["<|im_end|>"]
    assert end not in service.encode(request(prompt="<|im_end|>"))
    assert service.encode(request(prompt="<|im_end|>", special="control")) == (end,)


def test_embeddings_are_the_engines(words):
    service = fake_engine.service()
    got = service.embed(["hello", words.encode("hello"), "other"])
    assert got.vectors_ND.shape == (3, 8)
    assert (got.vectors_ND[0] == got.vectors_ND[1]).all()
    assert got.num_tokens == 2 * len(words.encode("hello")) + len(words.encode("other"))
    with pytest.raises(ValueError, match="exceeds"):
        service.embed(["x" * 3000])
