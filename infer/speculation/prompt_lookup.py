"""Draft tokens of a request, copied from its own prompt and answer. No jax.

Answers repeat their prompts (quotations, code to be edited, names): where the last tokens occurred
before, the tokens that followed them there are proposed, and the model checks them in one pass
(prompt lookup decoding, Saxena 2023; as in transformers and vLLM). No second model is needed.
"""

from collections.abc import Iterable


class PromptLookup:
    """An index over one request's tokens that finds what followed their last n-gram before.

    The longest n-gram from `longest` down to `shortest` that occurred earlier counts, at its latest
    place. The index grows with the tokens, so a proposal takes the same time after any number.
    """

    def __init__(self, tokens: Iterable[int] = (), *, longest: int = 3, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"shortest={shortest} and longest={longest} must be whole numbers from 1 on, in "
                "this order"
            )
        self._sizes = range(longest, shortest - 1, -1)
        self._tokens: list[int] = []
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> position of what follows it
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds tokens that were read or drawn to the index."""
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if size <= end:
                    self._follows[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def propose(self, num_tokens: int) -> tuple[int, ...]:
        """`num_tokens` tokens that may come next; none where even the shortest n-gram is new.

        A proposal that reaches the end of the tokens repeats itself from there on.
        """
        for size in self._sizes:
            last = tuple(self._tokens[-size:])
            if len(last) == size and (start := self._follows.get(last)) is not None:
                period = len(self._tokens) - start
                return tuple(self._tokens[start + i % period] for i in range(num_tokens))
        return ()
