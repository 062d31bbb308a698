"""Items as tokens."""

from qwen_jax.tasks.backend import Pair
from qwen_jax.tasks.task import Item, Task
from qwen_jax.text.chat import encoding as chat
from qwen_jax.text.tokenizer.tokenizer import Tokenizer

_BETWEEN_SHOTS = "\n\n"


def context(item: Item, task: Task, *, tokenizer: Tokenizer, prefix: int) -> tuple[int, ...]:
    """The tokens that an answer follows. Control tokens spelled in the data stay text."""
    if task.style == "chat":
        return _conversation(item, tokenizer)
    tokens = tokenizer.encode(_plain(item, task))
    return tuple(tokens) or (prefix,)


def pairs(item: Item, task: Task, *, tokenizer: Tokenizer, prefix: int) -> tuple[Pair, ...]:
    """The context with each choice. In plain text a choice is a word after it."""
    if task.style == "chat":
        tokens = _conversation(item, tokenizer)
        return tuple(Pair(tokens, tuple(tokenizer.encode(choice))) for choice in item.choices)
    text = _plain(item, task)
    return tuple(
        pair(text, f"{task.gap}{choice}", tokenizer=tokenizer, prefix=prefix)
        for choice in item.choices
    )


def pair(context: str, continuation: str, *, tokenizer: Tokenizer, prefix: int) -> Pair:
    """Both encoded as one text, cut where the context alone would end.

    White space that ends the context goes to the continuation, which tokens begin with. Where the
    context is empty it is `prefix`. The rule of lm-evaluation-harness. Raises `ValueError` where
    nothing is left to score.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    before = tokenizer.encode(kept)
    after = tokenizer.encode(kept + continuation)[len(before) :]
    if not after:
        raise ValueError(f"the continuation {continuation!r} has no tokens of its own to score")
    return Pair(tuple(before) or (prefix,), tuple(after))


def _plain(item: Item, task: Task) -> str:
    shots = [f"{question}{task.gap}{answer}{_BETWEEN_SHOTS}" for question, answer in item.shots]
    return "".join([item.header, *shots, item.question, item.lead])


def _conversation(item: Item, tokenizer: Tokenizer) -> tuple[int, ...]:
    messages = [{"role": "system", "content": item.header.strip()}] if item.header else []
    for question, answer in item.shots:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": item.question})
    encoded = chat.encode(messages, tokenizer=tokenizer, add_generation_prompt=True, mask="none")
    return (*encoded.token_ids, *tokenizer.encode_segment(item.lead, at_start=False))
