"""A task's prompts as tokens, for scoring and for generation."""

from qwen_jax.tasks.backend import ScoringRequest
from qwen_jax.tasks.task import Prompt
from qwen_jax.text.chat import encoding as chat
from qwen_jax.text.tokenizer.tokenizer import Tokenizer


def encode(prompt: Prompt, *, tokenizer: Tokenizer, prefix_id: int) -> tuple[int, ...]:
    """The prompt's tokens, never none: an empty prompt is `prefix_id`.

    Control tokens that are spelled out in the benchmark's data stay text.
    """
    if prompt.messages:
        return _encode_conversation(prompt, tokenizer)
    return tuple(tokenizer.encode(prompt.text)) or (prefix_id,)


def scoring_requests(
    prompt: Prompt, *, tokenizer: Tokenizer, prefix_id: int
) -> tuple[ScoringRequest, ...]:
    """One request for each of the prompt's continuations."""
    if prompt.messages:
        context = _encode_conversation(prompt, tokenizer)
        return tuple(
            ScoringRequest(context, tuple(tokenizer.encode(continuation)))
            for continuation in prompt.continuations
        )
    return tuple(
        scoring_request(prompt.text, continuation, tokenizer=tokenizer, prefix_id=prefix_id)
        for continuation in prompt.continuations
    )


def scoring_request(
    context: str, continuation: str, *, tokenizer: Tokenizer, prefix_id: int
) -> ScoringRequest:
    """The request that scores `continuation` after `context`, by lm-evaluation-harness's rule.

    White space that ends the context moves to the continuation, as tokens begin with white space.
    Both are encoded as one text, which is cut where the encoding of the context alone ends. An
    empty context becomes `prefix_id`. Raises `ValueError` where no token is left to score.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before = tokenizer.encode(stripped)
    after = tokenizer.encode(stripped + continuation)[len(before) :]
    if not after:
        raise ValueError(
            f"the continuation {continuation!r} has no tokens of its own to score; give one that "
            f"is not empty"
        )
    return ScoringRequest(tuple(before) or (prefix_id,), tuple(after))


def _encode_conversation(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    encoded = chat.encode(
        list(prompt.messages), tokenizer=tokenizer, add_generation_prompt=True, mask="none"
    )
    prefix = tokenizer.encode_segment(prompt.answer_prefix, at_start=False)
    return (*encoded.token_ids, *prefix)
