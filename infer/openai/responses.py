"""Responses in the JSON format of OpenAI's API.

Logprobs are the model's own, whatever temperature and cutoffs were. Tokens that add nothing to the
text (the closing one, those of a stop string) are not listed among them.
"""

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from infer.openai.parsing import Call, EmbeddingsCall
from infer.text.outputs import Answer, Answers, TextLogprobs, TokenText, Update, Usage
from infer.text.service import Embeddings

# Cuts the calls of tools out of an answer: the text without them, and OpenAI's `tool_calls`.
SplitToolCalls = Callable[[str], tuple[str, list[dict[str, Any]]]]


def response(
    call: Call,
    answers: Sequence[Answers],
    *,
    id: str,
    created: int,
    model: str,
    split_tool_calls: SplitToolCalls | None = None,
) -> dict[str, Any]:
    """The whole answer to a call, one of `answers` for each of its requests.

    `split_tool_calls` is used where the call has tools.
    """
    choices = []
    for number, collected in enumerate(answers):
        for answer in collected.choices:
            index = _index(call, number, answer.index)
            if call.kind == "chat":
                choices.append(_chat_choice(call, answer, index, split_tool_calls))
            else:
                choices.append(_completion_choice(call, answer, index))
    shape = _shape(call, id=id, created=created, model=model)
    return {**shape, "choices": choices, "usage": usage([a.usage for a in answers])}


def chunk(
    call: Call, update: Update, *, id: str, created: int, model: str, number: int = 0
) -> dict[str, Any]:
    """One event of a stream: news of the call's request at index `number`."""
    choice: dict[str, Any] = {"index": _index(call, number, update.index)}
    if call.kind == "chat":
        choice["delta"] = {"content": update.text} if update.text else {}
        choice["logprobs"] = _chat_logprobs(call, update.logprobs)
    else:
        choice["text"] = update.text
        entries = (*_echoed(call, update.prompt_logprobs), *update.logprobs)
        choice["logprobs"] = _completion_logprobs(call, entries)
    choice["finish_reason"] = update.finish_reason
    choice |= _extensions(call, update.tokens, update.prompt_logprobs)
    shape = _shape(call, id=id, created=created, model=model, part="chunk")
    return {**shape, "choices": [choice], **_no_usage(call)}


def first_chunk(call: Call, index: int, *, id: str, created: int, model: str) -> dict[str, Any]:
    """The event with which a chat's choice begins: its role."""
    delta = {"role": "assistant", "content": ""}
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    shape = _shape(call, id=id, created=created, model=model, part="chunk")
    return {**shape, "choices": [choice], **_no_usage(call)}


def usage_chunk(
    call: Call, usages: Sequence[Usage], *, id: str, created: int, model: str
) -> dict[str, Any]:
    """The event with which a stream ends where `stream_options.include_usage` asks for it."""
    shape = _shape(call, id=id, created=created, model=model, part="chunk")
    return {**shape, "choices": [], "usage": usage(usages)}


def usage(usages: Sequence[Usage]) -> dict[str, Any]:
    """Token counts of all requests of one call, as the `usage` object."""
    prompt = sum(u.prompt_tokens for u in usages)
    completion = sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in usages)},
    }


def embeddings_response(
    call: EmbeddingsCall, embeddings: Embeddings, *, model: str
) -> dict[str, Any]:
    """The response to a call for embeddings: numbers, or base64 of little-endian float32."""
    data = []
    for index, vector_D in enumerate(embeddings.vectors_ND):
        values: Any = vector_D.tolist()
        if call.encoding == "base64":
            values = base64.b64encode(vector_D.astype(np.dtype("<f4")).tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": values})
    count = embeddings.num_tokens
    used = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": model, "usage": used}


def error(
    message: str,
    *,
    type: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """The JSON body of an error response."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def _shape(call: Call, *, id: str, created: int, model: str, part: str = "") -> dict[str, Any]:
    kind = "text_completion"  # OpenAI's chunks of it have the same name
    if call.kind == "chat":
        kind = f"chat.completion.{part}".rstrip(".")
    return {"id": id, "object": kind, "created": created, "model": model}


def _index(call: Call, number: int, index: int) -> int:
    return number * call.requests[number].n + index


def _no_usage(call: Call) -> dict[str, Any]:
    return {"usage": None} if call.usage == "last" else {}


def _chat_choice(
    call: Call, answer: Answer, index: int, split: SplitToolCalls | None
) -> dict[str, Any]:
    text, calls, reason = answer.text, [], answer.finish_reason
    if split is not None and call.requests[0].tools:
        text, calls = split(text)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text or None, "tool_calls": calls}
        reason = "tool_calls" if reason == "stop" else reason
    return {
        "index": index,
        "message": message,
        "logprobs": _chat_logprobs(call, answer.logprobs),
        "finish_reason": reason,
        **_extensions(call, answer.tokens, answer.prompt_logprobs),
    }


def _completion_choice(call: Call, answer: Answer, index: int) -> dict[str, Any]:
    entries = (*_echoed(call, answer.prompt_logprobs), *answer.logprobs)
    return {
        "index": index,
        "text": answer.text,
        "logprobs": _completion_logprobs(call, entries),
        "finish_reason": answer.finish_reason,
        **_extensions(call, answer.tokens, answer.prompt_logprobs),
    }


def _echoed(call: Call, entries: Sequence[TextLogprobs]) -> Sequence[TextLogprobs]:
    return entries if call.requests[0].echo == "prompt_and_answer" else ()


def _extensions(
    call: Call, tokens: Sequence[int], prompt: Sequence[TextLogprobs]
) -> dict[str, Any]:
    """Fields beyond OpenAI's format: token ids, and a prompt's logprobs by token id."""
    values: dict[str, Any] = {}
    if call.token_ids == "shown":
        values["token_ids"] = list(tokens)
    if prompt and call.prompt_logprobs == "shown":
        values["prompt_logprobs"] = [_by_id(entry) for entry in prompt]
    return values


def _by_id(entry: TextLogprobs) -> dict[str, Any] | None:
    if entry.logprob is None:
        return None
    return {
        str(token.id): {"logprob": token.logprob, "decoded_token": _text(token)}
        for token in (*entry.top, entry)
    }


def _chat_logprobs(call: Call, entries: Sequence[TextLogprobs]) -> dict[str, Any] | None:
    if call.logprobs == "hidden":
        return None
    content = [
        {**_token(entry), "top_logprobs": [_token(token) for token in entry.top]}
        for entry in entries
        if not entry.hidden
    ]
    return {"content": content, "refusal": None}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": _text(token), "logprob": token.logprob, "bytes": list(token.bytes)}


def _completion_logprobs(call: Call, entries: Sequence[TextLogprobs]) -> dict[str, Any] | None:
    if call.logprobs == "hidden":
        return None
    entries = [entry for entry in entries if not entry.hidden]
    return {
        "tokens": [_spelled(entry) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [
            None if entry.logprob is None else {_spelled(t): t.logprob for t in (*entry.top, entry)}
            for entry in entries
        ],
        "text_offset": [entry.offset for entry in entries],
    }


def _text(token: TokenText) -> str:
    return token.bytes.decode("utf-8", "replace")


def _spelled(token: TokenText) -> str:
    """A key of an object, so that tokens that are parts of characters need to differ."""
    try:
        return token.bytes.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
