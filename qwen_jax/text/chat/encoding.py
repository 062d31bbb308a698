"""Chat templates: messages to text by sandboxed Jinja, and to ids with an exact assistant mask.

Control tokens that the template writes become control ids; the same strings inside a message, a
tool call or a tool stay plain text. For messages without such strings the ids are those of
transformers' `apply_chat_template(tokenize=True)`.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from qwen_jax.text.chat import jinja_template, message_checks
from qwen_jax.text.tokenizer.tokenizer import Tokenizer

Message = Mapping[str, Any]
MaskMode = Literal["exact", "split", "none"]

_START, _END, _HEADER = "<|im_start|>", "<|im_end|>", "assistant\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedChat:
    """Token ids of a conversation, and a mask that is true for those that the model learns."""

    token_ids: list[int]
    assistant_mask: list[bool] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Markers:
    """Characters that do not occur in the input and are removed from the rendered text."""

    guard: str  # is put inside text that would otherwise spell a control token
    generation: tuple[str, str]  # stand for {% generation %} and {% endgeneration %}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Span:
    """A span of the rendered text: plain text, or one control token that the template wrote."""

    text: str
    is_control: bool
    trained: bool = False


def render(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer | None = None,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation as text, as transformers' `apply_chat_template(tokenize=False)` does.

    The template is `template`, else the tokenizer's own, else `jinja_template.CHATML_TEMPLATE`.
    Content given as text parts is joined; tool-call arguments given as a JSON string are parsed
    first, so that the template does not quote them twice. The text must not be encoded with
    `special="control"` where messages come from outside: use `encode`. Raises `ValueError` for
    malformed messages (see `message_checks.check`) and for what the template refuses.
    """
    source = _template_source(tokenizer, template)
    messages = message_checks.check(messages, template=source)
    tools = message_checks.check_tools(tools)
    return jinja_template.render(
        source,
        messages=messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        role_tokens=_role_tokens(tokenizer),
    )


def encode(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    mask: MaskMode = "exact",
) -> EncodedChat:
    r"""Encode a conversation and mark the tokens that the assistant wrote.

    The mask covers what stands between `<|im_start|>assistant\n` and `<|im_end|>`, tool calls and
    `<|im_end|>` included; the newline after it, an open generation prompt and all other turns are
    not covered. In a template with `{% generation %}` blocks, those blocks are covered.

    A token can hold both the end of the header and the beginning of the content: with Qwen's
    splitting, where the white space before an answer has a line break. `mask` says what then
    happens: `"exact"` raises, naming the content; `"split"` encodes header and content apart there,
    which are the ids that a model sees when it generates the answer after its prompt, but not those
    of transformers; `"none"` returns no mask.

    Raises `ValueError` also where the mask cannot be derived (a template that is neither ChatML nor
    marked with `{% generation %}`, or that does not write one turn per assistant message) and where
    the template rewrites control tokens inside messages so that they cannot be told from its own.
    """
    if mask not in ("exact", "split", "none"):
        raise ValueError(f"mask={mask!r} must be 'exact', 'split' or 'none'")
    source = _template_source(tokenizer, template)
    _check_builtin(source, tokenizer)
    messages = message_checks.check(messages, template=source)
    tools = message_checks.check_tools(tools)
    markers = _choose_markers(source, messages, tools)
    text = _render_guarded(source, messages, tools, add_generation_prompt, tokenizer, markers)
    spans = list(_spans(text, tokenizer=tokenizer, markers=markers))
    if mask != "none" and markers.generation[0] not in text:
        num_turns = sum(message["role"] == "assistant" for message in messages)
        spans = _mark_chatml(spans, num_turns=num_turns, is_open=add_generation_prompt)
    return _encode_spans(spans, tokenizer=tokenizer, mask=mask)


def _template_source(tokenizer: Tokenizer | None, template: str | None) -> str:
    if template is not None:
        return template
    own = tokenizer.chat_template if tokenizer is not None else None
    return jinja_template.CHATML_TEMPLATE if own is None else own


def _check_builtin(source: str, tokenizer: Tokenizer) -> None:
    missing = [token for token in (_START, _END) if token not in tokenizer.control_ids]
    if source == jinja_template.CHATML_TEMPLATE and missing:
        raise ValueError(
            f"the tokenizer has no control token {missing[0]!r}, which the ChatML template writes; "
            "give a template that fits the tokenizer"
        )


def _role_tokens(tokenizer: Tokenizer | None) -> dict[str, str]:
    if tokenizer is None:
        return {}
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": next(iter(tokenizer.eos_ids), None),
        "pad_token": tokenizer.pad_id,
    }
    spelling = {token.id: token.content for token in tokenizer.control_tokens}
    return {name: spelling[index] for name, index in ids.items() if index in spelling}


def _choose_markers(source: str, messages: list[dict], tools: list[dict] | None) -> _Markers:
    used = set(source + json.dumps([messages, tools], ensure_ascii=False))
    private = (chr(code) for code in range(0xF0000, 0xFFFFE))
    free = (char for char in private if char not in used)
    return _Markers(guard=next(free), generation=(next(free), next(free)))


def _render_guarded(
    source: str,
    messages: list[dict],
    tools: list[dict] | None,
    add_generation_prompt: bool,
    tokenizer: Tokenizer,
    markers: _Markers,
) -> str:
    """Render with a guard inside every control token that the messages or tools spell.

    A string that begins with the end of a control token, or ends with the beginning of one, gets a
    guard at that edge, so that its neighbour cannot complete it. Not guarded: the role, one
    of four words, and a string that the template itself sets between the two ends of a token.
    """
    run = functools.partial(
        jinja_template.render,
        source,
        add_generation_prompt=add_generation_prompt,
        role_tokens=_role_tokens(tokenizer),
        generation_markers=markers.generation,
    )
    guarded_messages = [
        {"role": message["role"]}
        | {
            key: _guard(value, tokenizer, markers.guard)
            for key, value in message.items()
            if key != "role"
        }
        for message in messages
    ]
    guarded_tools = _guard(tools, tokenizer, markers.guard)
    text = run(messages=guarded_messages, tools=guarded_tools)
    if (guarded_messages, guarded_tools) != (messages, tools):
        plain = run(messages=messages, tools=tools)
        if text.replace(markers.guard, "") != plain:
            raise ValueError(
                "the chat template rewrites control tokens spelled inside the messages, so they "
                " cannot be kept as plain text; remove them from the messages"
            )
    return text


def _guard(value: Any, tokenizer: Tokenizer, guard: str) -> Any:
    if isinstance(value, str):
        return _guard_text(value, tuple(tokenizer.control_ids), guard)
    if isinstance(value, dict):
        return {
            _guard(key, tokenizer, guard): _guard(item, tokenizer, guard)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_guard(item, tokenizer, guard) for item in value]
    return value


def _guard_text(text: str, controls: tuple[str, ...], guard: str) -> str:
    beginnings, endings, starts = _partial_controls(controls)
    if not text:
        return text
    before = guard if text.startswith(endings) else ""
    after = guard if text.endswith(beginnings) else ""
    # Occurrences may overlap, so every one of them is cut behind its own first character.
    text = starts.sub(lambda match: match[0] + guard, text)
    return before + text + after


@functools.lru_cache(maxsize=32)
def _partial_controls(controls: tuple[str, ...]) -> tuple[tuple, tuple, re.Pattern[str]]:
    """Return all proper beginnings and endings of the tokens, and a pattern of their starts."""
    beginnings = tuple({token[:cut] for token in controls for cut in range(1, len(token))})
    endings = tuple({token[cut:] for token in controls for cut in range(1, len(token))})
    return beginnings, endings, _starts_of(controls)


def _starts_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Compile a pattern for each character at which one of the tokens begins."""
    return re.compile("(?s:(?=" + "|".join(map(re.escape, tokens)) + ").)" if tokens else "(?!)")


# From rendered text to ids


def _spans(text: str, *, tokenizer: Tokenizer, markers: _Markers) -> Iterator[_Span]:
    """Cut rendered text at the control tokens that the template wrote and at generation markers."""
    start, stop = markers.generation
    trained = False
    for piece in re.split(f"([{start}{stop}])", text):
        if piece in (start, stop):
            trained = piece == start
            continue
        end = 0
        for match in tokenizer.control_pattern.finditer(piece):
            yield _plain(piece[end : match.start()], markers, trained)
            yield _Span(text=match[0], is_control=True, trained=trained)
            end = match.end()
        yield _plain(piece[end:], markers, trained)


def _plain(text: str, markers: _Markers, trained: bool) -> _Span:
    return _Span(text=text.replace(markers.guard, ""), is_control=False, trained=trained)


def _mark_chatml(spans: list[_Span], *, num_turns: int, is_open: bool) -> list[_Span]:
    """Spans of a ChatML text, those in closed assistant turns marked as trained."""
    marked: list[_Span] = []
    closed = 0
    inside = after_start = False
    for span in (span for span in spans if span.text):
        if span.is_control and span.text == _START:
            if inside:
                raise ValueError(_no_mask(f"an assistant turn is not closed by {_END}"))
            marked.append(span)
            after_start = True
            continue
        if after_start and not span.is_control and span.text.startswith(_HEADER.rstrip()):
            if not span.text.startswith(_HEADER):
                raise ValueError(_no_mask(f"an assistant turn begins {span.text[:20]!r}"))
            inside = True
            marked.append(dataclasses.replace(span, text=_HEADER))
            span = dataclasses.replace(span, text=span.text.removeprefix(_HEADER))
        after_start = False
        marked.append(dataclasses.replace(span, trained=inside))
        if inside and span.is_control and span.text == _END:
            inside, closed = False, closed + 1
    if inside and not is_open:
        raise ValueError(_no_mask(f"the last assistant turn is not closed by {_END}"))
    if closed != num_turns:
        raise ValueError(
            _no_mask(f"it writes {closed} assistant turns for {num_turns} assistant messages")
        )
    return marked


def _no_mask(reason: str) -> str:
    return (
        f"no assistant mask can be derived from this chat template: {reason}; write ChatML, put "
        "the assistant's part into {% generation %} blocks, or use mask='none'"
    )


def _encode_spans(spans: list[_Span], *, tokenizer: Tokenizer, mask: MaskMode) -> EncodedChat:
    ids: list[int] = []
    flags: list[bool] = []
    pending: list[_Span] = []

    def flush() -> None:
        for part_ids, trained in _encode_text(pending, tokenizer, mask, at_start=not ids):
            ids.extend(part_ids)
            flags.extend([trained] * len(part_ids))
        pending.clear()

    for span in spans:
        if span.is_control:
            flush()
            ids.append(tokenizer.control_ids[span.text])
            flags.append(span.trained)
        elif pending and pending[-1].trained == span.trained:
            pending[-1] = dataclasses.replace(span, text=pending[-1].text + span.text)
        elif span.text:
            pending.append(span)
    flush()
    return EncodedChat(token_ids=ids, assistant_mask=None if mask == "none" else flags)


def _encode_text(
    spans: list[_Span], tokenizer: Tokenizer, mask: MaskMode, *, at_start: bool
) -> list[tuple[list[int], bool]]:
    """Encode adjacent plain spans as one text, and cut the ids at the borders of the spans."""
    if not spans:
        return []
    text = "".join(span.text for span in spans)
    ids = tokenizer.encode_segment(text, at_start=at_start)
    if mask == "none" or len(spans) == 1:
        return [(ids, spans[0].trained)]
    parts: list[tuple[list[int], bool]] = []
    position = 0
    for number, span in enumerate(spans):
        alone = tokenizer.encode_segment(span.text, at_start=at_start and not number)
        last = number == len(spans) - 1
        end = len(ids) if last else _cut(ids, position, alone, tokenizer)
        if end is None:
            if mask == "split":
                rest = _encode_text(spans[number + 1 :], tokenizer, mask, at_start=False)
                return [*parts, (alone, span.trained), *rest]
            raise ValueError(
                f"a token joins {span.text[-20:]!r} and {spans[number + 1].text[:20]!r}, so the "
                "assistant's part has no exact mask; strip the white space that begins the "
                "assistant's content, or use mask='split'"
            )
        parts.append((ids[position:end], span.trained))
        position = end
    return parts


def _cut(ids: list[int], start: int, alone: list[int], tokenizer: Tokenizer) -> int | None:
    """Return where the bytes of `alone` end in `ids[start:]`; None if inside a token."""
    expected = b"".join(map(tokenizer.token_bytes, alone))
    found = b""
    for end in range(start, len(ids) + 1):
        if found == expected:
            return end
        if len(found) >= len(expected) or end == len(ids):
            return None
        found += tokenizer.token_bytes(ids[end])
    return None
