"""Checks of chat messages and tools, which convert them to the form that templates expect."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
# Keys that chat APIs also send; a template may write them or not.
_KEYS = ("role", "content", "tool_calls", "name", "tool_call_id")


def check(messages: Sequence[Mapping[str, Any]], *, template: str) -> list[dict[str, Any]]:
    """Return the messages as plain dicts: content one str, tool arguments objects, no None values.

    Raises `ValueError`, naming the message by its index, for an empty conversation, an unknown
    role, missing content (only an assistant message with tool calls may have none), content parts
    that are not text, malformed tool calls, and keys that neither chat APIs nor `template` know.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages is a {type(messages).__name__}, expected a list of "
            "{'role': ..., 'content': ...}"
        )
    if not messages:
        raise ValueError("the conversation is empty; give at least one message")
    return [
        _message(message, name=f"message {number}", template=template)
        for number, message in enumerate(messages)
    ]


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return tool descriptions as plain JSON data; `ValueError` for what is not an object."""
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools is a {type(tools).__name__}, expected a list of JSON objects")
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ValueError(
                f"tool {number} is a {type(tool).__name__}, expected a JSON object such as "
                "{'type': 'function', 'function': {'name': ..., 'parameters': {...}}}"
            )
    return [_plain_json(tool, name=f"tool {number}") for number, tool in enumerate(tools)]


def _message(message: Mapping[str, Any], *, name: str, template: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} is a {type(message).__name__}, expected an object")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role")
    if role not in ROLES:
        raise ValueError(f"{name}: role {role!r} is unknown; use one of {', '.join(ROLES)}")
    unknown = [key for key in given if key not in _KEYS and str(key) not in template]
    if unknown:
        raise ValueError(f"{name}: key {unknown[0]!r} is unknown to the chat template; remove it")
    calls = given.get("tool_calls")
    if calls and role != "assistant":
        raise ValueError(f"{name}: role {role!r} cannot have tool_calls, only assistant can")
    if calls is not None:
        given["tool_calls"] = _tool_calls(calls, name=name)
    if "content" in given:
        given["content"] = _content(given["content"], name=name)
    elif not calls:
        raise ValueError(f"{name}: role {role!r} needs content")
    return {str(key): _plain_json(value, name=name) for key, value in given.items()}


def _content(content: Any, *, name: str) -> str:
    """Join text parts, as chat APIs send them, into one str."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise ValueError(
            f"{name}: content is a {type(content).__name__}, expected text or a list of text parts"
        )
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise ValueError(
                f"{name}: content part {number} is {kind!r}; only type 'text' is supported"
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{name}: content part {number} has no 'text' string")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: Any, *, name: str) -> list[dict[str, Any]]:
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise ValueError(f"{name}: tool_calls is a {type(calls).__name__}, expected a list")
    return [_tool_call(call, name=f"{name}: tool call {i}") for i, call in enumerate(calls)]


def _tool_call(call: Any, *, name: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ValueError(f"{name} is a {type(call).__name__}, expected an object")
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise ValueError(f"{name}: function is a {type(function).__name__}, expected an object")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{name}: needs the name of a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # The OpenAI API carries the object as a string; a template would quote it a second time.
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: arguments are not valid JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"{name}: arguments are {type(arguments).__name__}, expected a JSON object, or a "
            "string that holds one"
        )
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _plain_json(value: Any, *, name: str) -> Any:
    """Rebuild a value out of plain JSON types, the only ones that a template may see."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{name}: key {key!r} is a {type(key).__name__}, expected str")
        return {key: _plain_json(item, name=name) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain_json(item, name=name) for item in value]
    raise ValueError(f"{name}: a {type(value).__name__} is not JSON data")
