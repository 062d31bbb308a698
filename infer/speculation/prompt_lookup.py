"""Guesses of what a request draws next, copied from what it has already read or written. No jax.

Answers repeat their prompts (quotations, code to be edited, names): where the last tokens occurred
before, what followed them then is a guess of what follows now, which the model checks in one pass
(prompt lookup decoding, Saxena 2023; as in transformers and vLLM). No second model is needed.
"""

from collections.abc import Iterable


class PromptLookup:
    """Continues one request's tokens as they went on after the same n-gram before.

    Of n = `longest` down to `shortest`, the first whose last n-gram occurred earlier is taken, at
    its latest place. An index is kept as tokens come: a guess takes the same time after any number.
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
        """Takes in tokens that were read or drawn."""
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if size <= end:
                    self._follows[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def propose(self, num_tokens: int) -> tuple[int, ...]:
        """So many tokens that may come next; none where even the shortest n-gram is new.

        Where the earlier place is so near that the guess runs into the end, it goes on with itself.
        """
        for size in self._sizes:
            last = tuple(self._tokens[-size:])
            if len(last) == size and (start := self._follows.get(last)) is not None:
                period = len(self._tokens) - start
                return tuple(self._tokens[start + i % period] for i in range(num_tokens))
        return ()
