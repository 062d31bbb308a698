"""Bodies of OpenAI's API as requests. Every parameter is honoured or refused by its name.

Honoured: model, messages, prompt, input, tools, tool_choice, parallel_tool_calls, n, best_of, echo,
stop, stream, stream_options, seed (modulo 2^32), max_tokens, max_completion_tokens, logprobs,
top_logprobs, logit_bias, temperature, top_p, presence_penalty, frequency_penalty, response_format,
encoding_format; and these common extensions: top_k, min_p, repetition_penalty, min_tokens,
stop_token_ids, ignore_eos, prompt_logprobs, return_token_ids, structured_outputs, guided_json,
guided_json_object, guided_regex, guided_choice, guided_grammar.
Without effect on answers: `_LABELS`. Taken where they ask for what is done anyway: `_ONLY`.
Refused: `_REFUSED`, and everything else.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from configs.sampling import SamplingParams
from infer.constraints import spec
from infer.constraints.spec import ConstraintSpec, Count
from infer.openai import parameters
from infer.openai.parameters import ParameterError, Reader
from infer.text.service import TextRequest

MOST_CHOICES = 128  # as in OpenAI's API

_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
_ONLY = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "include_reasoning": (True,),
    "return_tokens_as_token_ids": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "priority": (0,),
    "bad_words": ([],),
}
_REFUSED = {
    "functions": "give tools",
    "function_call": "give tool_choice",
    "suffix": "the prompt can only be continued",
    "audio": "only text can be made",
    "prediction": "remove it",
    "reasoning_effort": "remove it",
    "verbosity": "say in the prompt how long the answer is to be",
    "web_search_options": "give what was found in the messages",
    "chat_template": "the model's own is used",
    "chat_template_kwargs": "the model's template is used as it is",
    "documents": "give them in the messages",
    "truncate_prompt_tokens": "shorten the prompt",
    "allowed_token_ids": "constrain the answer with structured_outputs",
    "logits_processors": "constrain the answer with structured_outputs",
    "dimensions": "vectors have the model's width",
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call for chat or completion: one request for each prompt, and what the answer shows."""

    kind: Literal["chat", "completion"]
    model: str | None  # the one asked for; whether it is served is the caller's to check
    requests: tuple[TextRequest, ...]
    stream: bool = False
    usage: Literal["none", "last"] = "none"  # in a stream
    logprobs: Literal["hidden", "shown"] = "hidden"
    prompt_logprobs: Literal["hidden", "shown"] = "hidden"
    token_ids: Literal["hidden", "shown"] = "hidden"


@dataclass(frozen=True, kw_only=True)
class EmbeddingsCall:
    """A parsed call for an embedding of each prompt."""

    model: str | None
    prompts: tuple[str | tuple[int, ...], ...]
    encoding: Literal["float", "base64"] = "float"


def parse_chat(body: Mapping[str, Any], *, id: str, defaults: SamplingParams) -> Call:
    """The call parsed from a body for /v1/chat/completions; its one request has this id.

    `defaults` serve what the body does not say; their seed is that of a body without one. Raises
    `ParameterError`, a `ValueError` that names the parameter.
    """
    reader = Reader(body)
    messages = reader.take("messages", list)
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise ParameterError("messages", "messages must be a list of objects, at least one")
    # OpenAI's newer name; the models know the older one.
    messages = [m | {"role": "system"} if m.get("role") == "developer" else m for m in messages]
    tools, constraint = _tools(reader, form=parameters.constraint(reader))
    shown = reader.take("logprobs", bool, False)
    top = reader.take("top_logprobs", int, 0)
    if top and not shown:
        raise ParameterError("top_logprobs", "top_logprobs needs logprobs=true")
    call = _call("chat", reader, logprobs=shown)
    request = _request(
        reader,
        id=id,
        prompt=tuple(messages),
        tools=tools,
        constraint=constraint,
        sampling=_sampling(reader, defaults=defaults, logprobs=top if shown else None),
    )
    reader.finish()
    return dataclasses.replace(_check_stream(call, request), requests=(request,))


def parse_completion(body: Mapping[str, Any], *, id: str, defaults: SamplingParams) -> Call:
    """The call parsed from a body for /v1/completions; as `parse_chat`.

    Several prompts give several requests, with ids `<id>/<number of the prompt>`. With echo and
    logprobs the prompt's are given too, and max_tokens may be 0, which only scores the prompt.
    """
    reader = Reader(body)
    prompts = _prompts("prompt", reader.take("prompt", (str, list)))
    echo = reader.take("echo", bool, False)
    logprobs = reader.take("logprobs", int)
    call = _call("completion", reader, logprobs=logprobs is not None)
    request = _request(
        reader,
        id=id,
        prompt="",
        constraint=parameters.constraint(reader),
        best_of=reader.take("best_of", int),
        echo="prompt_and_answer" if echo else "answer",
        sampling=_sampling(
            reader,
            defaults=defaults,
            logprobs=logprobs,
            prompt_logprobs=logprobs if echo else None,
        ),
    )
    reader.finish()
    ids = [id] if len(prompts) == 1 else [f"{id}/{number}" for number in range(len(prompts))]
    requests = [
        dataclasses.replace(request, id=own, prompt=prompt)
        for own, prompt in zip(ids, prompts, strict=True)
    ]
    return dataclasses.replace(_check_stream(call, request), requests=tuple(requests))


def parse_embeddings(body: Mapping[str, Any]) -> EmbeddingsCall:
    """The call parsed from a body for /v1/embeddings. Raises `ParameterError`."""
    reader = Reader(body)
    reader.drop(*_LABELS)
    for name, remedy in _REFUSED.items():
        reader.refuse(name, remedy)
    prompts = _prompts("input", reader.take("input", (str, list)))
    model = reader.take("model", str)
    encoding = reader.take("encoding_format", str, "float")
    if encoding not in ("float", "base64"):
        raise ParameterError("encoding_format", f"encoding_format={encoding!a}: float or base64")
    reader.finish()
    return EmbeddingsCall(model=model, prompts=prompts, encoding=encoding)


def _call(kind: Literal["chat", "completion"], reader: Reader, *, logprobs: bool) -> Call:
    """What is neither prompt nor sampling; takes and refuses what has no place in a request."""
    reader.drop(*_LABELS)
    for name, values in _ONLY.items():
        reader.only(name, *values)
    for name, remedy in _REFUSED.items():
        reader.refuse(name, remedy)
    stream = reader.take("stream", bool, False)
    usage = "none"
    if "stream_options" in reader:
        if not stream:
            raise ParameterError("stream_options", "stream_options needs stream=true")
        options = Reader(reader.take("stream_options", dict), name="stream_options")
        usage = "last" if options.take("include_usage", bool, False) else "none"
        options.only("include_obfuscation", False)
        options.only("continuous_usage_stats", False)
        options.finish()
    return Call(
        kind=kind,
        model=reader.take("model", str),
        requests=(),
        stream=stream,
        usage=usage,
        logprobs="shown" if logprobs else "hidden",
        prompt_logprobs="shown" if "prompt_logprobs" in reader else "hidden",
        token_ids="shown" if reader.take("return_token_ids", bool, False) else "hidden",
    )


def _request(reader: Reader, **own: Any) -> TextRequest:
    count = reader.take("n", int, 1)
    if not 1 <= count <= MOST_CHOICES:
        raise ParameterError("n", f"n={count} must be in [1, {MOST_CHOICES}]")
    best_of = own.get("best_of")
    if best_of is not None and not count <= best_of <= MOST_CHOICES:
        raise ParameterError("best_of", f"best_of={best_of} must be in [n={count}, {MOST_CHOICES}]")
    return TextRequest(n=count, stop=parameters.stop(reader), **own)


def _sampling(
    reader: Reader,
    *,
    defaults: SamplingParams,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in reader]
    limits = {reader.take(name, int) for name in names}
    if len(limits) > 1:
        raise ParameterError(names[0], f"{' and '.join(names)} differ; give one of them")
    seed = reader.take("seed", int)
    if "prompt_logprobs" not in reader and limits == {0} and prompt_logprobs is None:
        raise ParameterError(
            names[0], f"{names[0]}=0 needs logprobs and echo: nothing else is made"
        )
    return parameters.sampling(
        reader,
        defaults=defaults,
        max_tokens=limits.pop() if limits else None,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        seed=None if seed is None else seed % 2**32,
    )


def _check_stream(call: Call, request: TextRequest) -> Call:
    if call.stream and (request.best_of or request.n) > request.n:
        raise ParameterError(
            "best_of",
            f"best_of={request.best_of} above n={request.n} cannot be streamed: the best is known "
            "at the end; leave stream out",
        )
    return call


def _tools(
    reader: Reader, *, form: ConstraintSpec | None
) -> tuple[tuple[dict[str, Any], ...] | None, ConstraintSpec | None]:
    """The tools that the model is told of, and what binds its answer: form, calls, or either."""
    tools = reader.take("tools", list, [])
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise ParameterError(
                "tools", f"tools[{number}] must be {{'type': 'function', 'function': {{...}}}}"
            )
        if not isinstance(function.get("name"), str):
            raise ParameterError("tools", f"tools[{number}].function needs a name")
    choice = reader.take("tool_choice", (str, dict), "auto")
    count: Count = "any" if reader.take("parallel_tool_calls", bool, True) else "one"
    if choice == "auto" and form is None:
        _check_free(tools, count=count)
    if choice == "none" or (choice == "auto" and not tools):
        return None, form
    if choice == "auto":
        return tuple(tools), form and spec.or_calls(form, tools, count=count)
    if form is not None:
        raise ParameterError(
            "tool_choice", "tool_choice forces calls, and the answer is constrained otherwise too"
        )
    name = None if choice == "required" else _named(choice)
    try:
        return tuple(tools), spec.forced_calls(tools, name=name, count=count)
    except ValueError as error:
        raise ParameterError("tool_choice", str(error)) from None


def _check_free(tools: Sequence[Mapping[str, Any]], *, count: Count) -> None:
    """Refuses what no grammar sees to where nothing binds the answer."""
    remedy = (
        "needs tool_choice=required, or a response_format: nothing else binds the model's calls"
    )
    if count == "one":
        raise ParameterError("parallel_tool_calls", f"parallel_tool_calls=false {remedy}")
    for number, tool in enumerate(tools):
        if tool["function"].get("strict"):
            raise ParameterError("tools", f"tools[{number}].function.strict {remedy}")


def _named(choice: str | dict[str, Any]) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice != {"type": "function", "function": {"name": name}}:
        raise ParameterError(
            "tool_choice",
            f"tool_choice={choice!a} is unknown; known: auto, none, required, "
            "{'type': 'function', 'function': {'name': ...}}",
        )
    return name


def _prompts(name: str, value: str | list | None) -> tuple[str | tuple[int, ...], ...]:
    """The prompts, given as one text, texts, token ids, or lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if value and all(isinstance(item, str) for item in value):
        return tuple(value)
    if value and not isinstance(value[0], list):
        return (parameters.token_ids(name, value),)
    if value and all(isinstance(item, list) for item in value):
        return tuple(parameters.token_ids(name, item) for item in value)
    raise ParameterError(
        name, f"{name} must be a text, a list of texts, token ids, or lists of token ids"
    )
