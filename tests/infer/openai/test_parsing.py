"""Bodies of OpenAI's API: every parameter is honoured or refused."""

import dataclasses
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from configs.sampling import SamplingParams
from infer.constraints.spec import ConstraintSpec
from infer.openai import parameters, parsing

DEFAULTS = SamplingParams(max_tokens=99, temperature=0.7, top_k=20, top_p=0.8, seed=11)
TURNS = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
STRICT = {"type": "function", "function": {"name": "x", "strict": True}}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}

FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


def chat(**body) -> parsing.Call:
    return parsing.parse_chat({"messages": TURNS, **body}, id="c", defaults=DEFAULTS)


def completion(**body) -> parsing.Call:
    return parsing.parse_completion({"prompt": "p", **body}, id="c", defaults=DEFAULTS)


PARSERS = {"chat": chat, "completion": completion}

# Parameter, what becomes of `Sampling`.
SAMPLING = [
    ({"temperature": 0}, {"temperature": 0}),
    ({"top_p": 0.5}, {"top_p": 0.5}),
    ({"top_k": 3}, {"top_k": 3}),
    ({"min_p": 0.1}, {"min_p": 0.1}),
    ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
    ({"frequency_penalty": -1}, {"frequency_penalty": -1}),
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"max_tokens": 5}, {"max_tokens": 5}),
    ({"max_completion_tokens": 5}, {"max_tokens": 5}),
    ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": 5}),
    ({"min_tokens": 2}, {"min_tokens": 2}),
    ({"stop_token_ids": [7, 8]}, {"stop_token_ids": (7, 8)}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
    ({"prompt_logprobs": 2}, {"prompt_logprobs": 2}),
    ({"logit_bias": {"50": -100, "7": 2.5}}, {"logit_bias": ((7, 2.5), (50, -100.0))}),
    ({"seed": 3}, {"seed": 3}),
    ({"seed": -1}, {"seed": 2**32 - 1}),
    ({"temperature": None, "seed": None, "stop": None, "n": None, "tools": None}, {}),
]  # fmt: skip


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize(("body", "want"), SAMPLING)
def test_sampling_is_read_over_the_defaults(kind, body, want):
    [request] = PARSERS[kind](**body).requests
    assert request.sampling == dataclasses.replace(DEFAULTS, **want)
    assert (request.id, request.n, request.stop) == ("c", 1, ())


def test_every_field_of_sampling_can_be_said():
    covered = {name for _, want in SAMPLING for name in want} | {"logprobs"}
    assert covered == set(SamplingParams.__dataclass_fields__)


def test_what_is_not_sampling():
    call = chat(model="m", n=2, stop="x", stream=True, stream_options={"include_usage": True})
    [request] = call.requests
    assert (call.model, call.stream, call.usage, call.logprobs) == ("m", True, "last", "hidden")
    assert (request.n, request.stop, request.prompt) == (2, ("x",), tuple(TURNS))
    assert request.tools is None
    [request] = chat(tools=[TOOL], stop=["x", "y"]).requests
    assert (request.tools, request.stop) == ((TOOL,), ("x", "y"))
    assert chat(tools=[TOOL], tool_choice="none").requests[0].tools is None
    call = completion(best_of=3, n=2, return_token_ids=True)
    assert (call.requests[0].best_of, call.token_ids) == (3, "shown")


def test_a_developers_message_is_a_systems():
    turns = [{"role": "developer", "content": "Be brief."}, *TURNS]
    [request] = chat(messages=turns).requests
    assert request.prompt == ({"role": "system", "content": "Be brief."}, *TURNS)


def test_logprobs():
    assert chat(logprobs=True).requests[0].sampling.logprobs == 0
    call = chat(logprobs=True, top_logprobs=5)
    assert (call.requests[0].sampling.logprobs, call.logprobs) == (5, "shown")
    assert chat(logprobs=False).requests[0].sampling.logprobs is None
    call = completion(logprobs=2)
    assert (call.requests[0].sampling.logprobs, call.logprobs) == (2, "shown")
    assert call.requests[0].sampling.prompt_logprobs is None
    call = completion(logprobs=2, echo=True, max_tokens=0)
    assert call.requests[0].echo == "prompt_and_answer"
    assert call.requests[0].sampling.prompt_logprobs == 2
    assert call.prompt_logprobs == "hidden"


def test_several_prompts_are_several_requests():
    call = completion(prompt=["a", "b"], n=2)
    assert [(r.id, r.prompt, r.n) for r in call.requests] == [("c/0", "a", 2), ("c/1", "b", 2)]
    assert [r.prompt for r in completion(prompt=[1, 2]).requests] == [(1, 2)]
    assert [r.prompt for r in completion(prompt=[[1], [2, 3]]).requests] == [(1,), (2, 3)]


CONSTRAINTS = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, ConstraintSpec("json_object")),
    ({"response_format": FORMAT}, ConstraintSpec("json_schema", json.dumps(SCHEMA))),
    ({"structured_outputs": {"json": SCHEMA}}, ConstraintSpec("json_schema", json.dumps(SCHEMA))),
    ({"structured_outputs": {"regex": "a+"}}, ConstraintSpec("regex", "a+")),
    ({"structured_outputs": {"json_object": True}}, ConstraintSpec("json_object")),
    ({"guided_choice": ["a", "b"]}, ConstraintSpec("choice", ("a", "b"))),
    ({"guided_grammar": "start: /a/"}, ConstraintSpec("grammar", "start: /a/")),
    ({"guided_json": json.dumps(SCHEMA)}, ConstraintSpec("json_schema", json.dumps(SCHEMA))),
]  # fmt: skip


@pytest.mark.parametrize(("body", "want"), CONSTRAINTS)
def test_constraints(body, want):
    assert chat(**body).requests[0].constraint == want
    assert completion(**body).requests[0].constraint == want


def named(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


def test_calls_of_tools_can_be_forced():
    functions = json.dumps([TOOL["function"]])
    other = {"type": "function", "function": {"name": "other"}}
    for body, want in (
        ({"tool_choice": "auto"}, None),
        ({"tool_choice": "required"}, ConstraintSpec("tool_calls", functions)),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            ConstraintSpec("tool_call", functions),
        ),
        ({"tool_choice": named("weather")}, ConstraintSpec("tool_call", functions)),
    ):
        tools = [TOOL, other] if body["tool_choice"] == named("weather") else [TOOL]
        [request] = chat(tools=tools, **body).requests
        assert (request.constraint, request.tools) == (want, tuple(tools))


@pytest.mark.parametrize(("body", "form"), [case for case in CONSTRAINTS if case[1]])
def test_calls_beside_a_form(body, form):
    calls = ConstraintSpec("tool_calls", json.dumps([TOOL["function"], {"name": "x"}]))
    either = dataclasses.replace(form, alternative=calls)
    one = dataclasses.replace(calls, kind="tool_call")
    for more, want in (
        ({}, either),
        ({"tool_choice": "auto"}, either),
        ({"parallel_tool_calls": False}, dataclasses.replace(form, alternative=one)),
        ({"tool_choice": "none"}, form),
        ({"tools": []}, form),
    ):
        [request] = chat(**{"tools": [TOOL, STRICT], **body, **more}).requests
        tools = (TOOL, STRICT) if want.alternative else None
        assert (request.constraint, request.tools) == (want, tools)


def test_strict_tools_are_taken_where_calls_are_bound():
    for choice in ("required", named("x"), "none"):
        chat(tools=[TOOL, STRICT], tool_choice=choice)
    with pytest.raises(parameters.ParameterError, match=r"tools\[1\].*tool_choice=required"):
        chat(tools=[TOOL, STRICT])


BAD = [
    ("both", {"temperature": "hot"}, "temperature"),
    ("both", {"temperature": True}, "temperature"),
    ("both", {"temperature": -1}, "temperature"),
    ("both", {"top_p": 0}, "top_p"),
    ("both", {"top_k": 1.5}, "top_k"),
    ("both", {"top_k": -1}, "top_k"),
    ("both", {"top_k": 2**31}, "top_k"),
    ("both", {"temperature": 10**400}, "temperature"),
    ("both", {"temperature": float("nan")}, "temperature"),
    ("both", {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ("both", {"stop_token_ids": [2**31]}, "stop_token_ids"),
    ("both", {"n": 0}, "n"),
    ("both", {"n": 10**9}, "n"),
    ("both", {"seed": "x"}, "seed"),
    ("both", {"stop": ""}, "stop"),
    ("both", {"stop": ["a", 3]}, "stop"),
    ("both", {"max_tokens": 0}, "max_tokens"),
    ("both", {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ("both", {"min_tokens": 100}, "min_tokens"),
    ("both", {"ignore_eos": 1}, "ignore_eos"),
    ("both", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("both", {"logit_bias": {"1": 101}}, "logit_bias"),
    ("both", {"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    ("both", {"stop_token_ids": [-1]}, "stop_token_ids"),
    ("both", {"stream_options": {}}, "stream_options"),
    ("both", {"stream": True, "stream_options": {"x": 1}}, "x"),
    ("both", {"response_format": {"type": "xml"}}, "response_format"),
    ("both", {"response_format": {"type": "text", "x": 1}}, "x"),
    ("both", {"guided_json": "{"}, "guided_json"),
    ("both", {"guided_json": "3"}, "guided_json"),
    ("both", {"guided_json_object": False}, "guided_json_object"),
    ("both", {"guided_choice": []}, "guided_choice"),
    ("both", {"guided_choice": [1]}, "guided_choice"),
    ("both", {"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ("both", {"beam_width": 3}, "beam_width"),
    ("both", {"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ("both", {"skip_special_tokens": False}, "skip_special_tokens"),
    ("both", {"store": 0}, "store"),
    ("both", {"return_token_ids": "yes"}, "return_token_ids"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": ["hi"]}, "messages"),
    ("chat", {"messages": None}, "messages"),
    ("chat", {"top_logprobs": 3}, "top_logprobs"),
    ("chat", {"logprobs": 3}, "logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ("chat", {"tools": [{"type": "function"}]}, "tools"),
    ("chat", {"tools": [TOOL, STRICT]}, "tools"),
    ("chat", {"tool_choice": "required"}, "tool_choice"),
    ("chat", {"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    ("chat", {"tools": [TOOL], "tool_choice": named("other")}, "tool_choice"),
    ("chat", {"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
    ("chat", {"tools": [TOOL], "tool_choice": named("weather") | {"x": 1}}, "tool_choice"),
    ("chat", {"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
    ("chat", {"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
    ("chat", {"echo": True}, "echo"),
    ("chat", {"best_of": 2}, "best_of"),
    ("completion", {"best_of": 1, "n": 2}, "best_of"),
    ("completion", {"best_of": 2, "stream": True}, "best_of"),
    ("completion", {"logprobs": 21}, "logprobs"),
    ("completion", {"logprobs": True}, "logprobs"),
    ("completion", {"prompt": None}, "prompt"),
    ("completion", {"prompt": []}, "prompt"),
    ("completion", {"prompt": ["a", 3]}, "prompt"),
    ("completion", {"prompt": [[1], "a"]}, "prompt"),
    ("completion", {"prompt": [True]}, "prompt"),
    ("completion", {"prompt": {"a": 1}}, "prompt"),
    ("completion", {"echo": True, "max_tokens": 0}, "max_tokens"),
    ("completion", {"tools": [TOOL]}, "tools"),
    *[("both", {name: "given"}, name) for name in parsing._REFUSED],
    *[("both", {name: "given"}, name) for name in parsing._ONLY],
]


@pytest.mark.parametrize(("kind", "body", "name"), BAD)
def test_what_is_refused_is_named(kind, body, name):
    for each in PARSERS if kind == "both" else (kind,):
        with pytest.raises(parameters.ParameterError, match=name) as caught:
            PARSERS[each](**body)
        assert caught.value.name == name
    with pytest.raises(parameters.ParameterError, match="JSON object"):
        parsing.parse_chat([1], id="c", defaults=DEFAULTS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "function", "name", "json", "schema", "json_schema", "1"])
            | st.text(max_size=5),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
NAMES = sorted({name for _, body, _ in BAD for name in body} | {n for b, _ in SAMPLING for n in b})


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(body=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_whatever_comes_is_taken_or_refused(body):
    for parse in PARSERS.values():
        try:
            call = parse(**body)
        except parameters.ParameterError as error:
            assert error.name
        else:
            assert call.requests
    try:
        assert parsing.parse_embeddings({"input": "a", **body}).prompts
    except parameters.ParameterError as error:
        assert error.name


def test_labels_and_what_is_done_anyway_are_taken():
    for name in parsing._LABELS:
        assert chat(**{name: {"any": "thing"}}) == chat()
    for name, values in parsing._ONLY.items():
        for value in values:
            assert chat(**{name: value}) == chat()


def test_embeddings_are_asked_for():
    call = parsing.parse_embeddings({"input": ["a", "b"], "model": "m", "user": "u"})
    assert (call.prompts, call.model, call.encoding) == (("a", "b"), "m", "float")
    assert parsing.parse_embeddings({"input": [1, 2]}).prompts == ((1, 2),)
    for body, name in (
        ({}, "input"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "temperature": 1}, "temperature"),
    ):
        with pytest.raises(parameters.ParameterError) as caught:
            parsing.parse_embeddings(body)
        assert caught.value.name == name
