"""Streamed generation for one prompt, and an interactive chat."""

from collections.abc import Callable
from dataclasses import dataclass

from configs.sampling import SamplingParams
from infer.engine.request import FinishReason
from infer.text.service import Prompt, Service, TextRequest
from qwen_jax.text.tokenizer.tokenizer import Special


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished answer. `token_ids` holds the closing end-of-sequence token, `text` does not."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def stream(
    service: Service,
    prompt: Prompt,
    *,
    settings: SamplingParams,
    write: Callable[[str], None],
    special: Special = "text",
) -> Completion:
    """The whole answer to a prompt; its text is written as soon as characters are complete.

    `service` has nothing else open. `special="control"` gives control tokens spelled in a text
    prompt their ids; otherwise they are ordinary text.
    Raises `ValueError` for a prompt that the model or the template cannot take.
    """
    service.submit(TextRequest(id="", prompt=prompt, sampling=settings, special=special))
    texts: list[str] = []
    token_ids: list[int] = []
    reason: FinishReason = "cancelled"
    while not service.idle:
        for update in service.step():
            token_ids += update.tokens
            texts.append(update.text)
            write(update.text)
            reason = update.finish_reason or reason
    return Completion(text="".join(texts), token_ids=tuple(token_ids), finish_reason=reason)


def chat(
    service: Service,
    *,
    settings: SamplingParams,
    system: str | None = None,
    read: Callable[[], str | None],
    write: Callable[[str], None],
) -> list[dict[str, str]]:
    """The messages of a conversation that goes on until `read` returns None.

    A message that does not fit is answered with the error and left out of the conversation.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    while (line := read()) is not None:
        turn = {"role": "user", "content": line}
        try:
            answer = stream(service, [*messages, turn], settings=settings, write=write)
        except ValueError as error:
            write(f"{error}\n")
            continue
        write("\n")
        messages += [turn, {"role": "assistant", "content": answer.text}]
    return messages
