"""A search for stop strings in streamed text; text that may begin one is held back."""

from collections.abc import Sequence


class StopStrings:
    """A search that ends a streamed text before the first complete stop string.

    Where several are complete at the same character, the longest counts. What `push` returns
    does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, int | None]:
        """(text that may be shown, end of a stop string) after the next piece `text`.

        The end counts characters of `text` up to the end of the stop string; None without one.
        """
        if not self._stops:
            return text, None
        known, text = len(self._held), self._held + text
        matches = []
        for stop in self._stops:
            # A stop string that was complete earlier came before min_tokens and does not count.
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start))
        if not matches:
            return self._hold(text), None
        self._held = ""
        end, start = min(matches)
        return text[:start], end - known

    def skip(self, text: str) -> str:
        """The text that may be shown after a piece in which stop strings do not count."""
        return self._hold(self._held + text)

    def finish(self) -> str:
        """The text that was held back, as no more text comes."""
        held, self._held = self._held, ""
        return held

    def _hold(self, text: str) -> str:
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(text[-size:]) and len(stop) > size for stop in self._stops):
                self._held = text[-size:]
                return text[:-size]
        self._held = ""
        return text
