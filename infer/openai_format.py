"""Bodies of OpenAI's API as requests. Every parameter is honoured or refused by its name.

| parameters | what becomes of them |
| --- | --- |
| model, messages, prompt, input, tools, n, best_of, echo, stop, stream, stream_options, seed (modulo
  2^32), max_tokens, max_completion_tokens, logprobs, top_logprobs, logit_bias, temperature, top_p,
  presence_penalty, frequency_penalty, response_format, encoding_format | honoured |
| top_k, min_p, repetition_penalty, min_tokens, stop_token_ids, ignore_eos, prompt_logprobs,
  structured_outputs, guided_json, guided_regex, guided_choice, guided_grammar, return_token_ids |
  honoured; common extensions |
| `_LABELS` | taken, without effect on answers |
| `_ONLY` | taken where they ask for what is done anyway |
| `_REFUSED` and all others | refused |
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from configs import schema
from infer import parameters
from infer.parameters import ParameterError, Reader
from infer.service import TextRequest

MOST_CHOICES = 128  # as in OpenAI's API

_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
_ONLY = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
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
    usage: Literal["none", "last", "always"] = "none"  # in a stream
    logprobs: Literal["hidden", "shown"] = "hidden"
    token_ids: Literal["hidden", "shown"] = "hidden"


@dataclass(frozen=True, kw_only=True)
class EmbeddingsCall:
    """A call for a vector of each prompt."""

    model: str | None
    prompts: tuple[str | tuple[int, ...], ...]
    encoding: Literal["float", "base64"] = "float"


def parse_chat(body: Mapping[str, Any], *, id: str, defaults: schema.Sampling) -> Call:
    """The body of a call to /v1/chat/completions; its one request has this id.

    `defaults` serve what the body does not say; their seed is that of a body without one. Raises
    `ParameterError`, a `ValueError` that names the parameter.
    """
    reader = Reader(body)
    messages = reader.take("messages", list)
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise ParameterError("messages", "messages must be a list of objects, at least one")
    if "logprobs" in reader or "top_logprobs" in reader:
        logprobs = _chat_logprobs(reader)
    else:
        logprobs = None
    common = _common(reader, defaults=defaults, logprobs=logprobs)
    request = TextRequest(id=id, prompt=tuple(messages), tools=_tools(reader), **common.request)
    reader.finish()
    return Call(kind="chat", requests=(request,), **common.call)


def parse_completion(body: Mapping[str, Any], *, id: str, defaults: schema.Sampling) -> Call:
    """The body of a call to /v1/completions; as `parse_chat`.

    Several prompts give several requests, with ids `<id>/<number of the prompt>`. With echo and
    logprobs the prompt's are given too, and max_tokens may be 0, which only scores the prompt.
    """
    ...


def parse_embeddings(body: Mapping[str, Any]) -> EmbeddingsCall:
    """The body of a call to /v1/embeddings. Raises `ParameterError`."""
    ...
