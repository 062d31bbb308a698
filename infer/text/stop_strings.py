"""Finds stop strings in text that comes in pieces, holding back what could become one."""

from collections.abc import Sequence


class StopStrings:
    """Where a text ends: before the stop string that is complete first.

    Of several that are complete with the same character the longest counts. What `push` returns
    does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, int | None]:
        """Take more text; return what may be shown of it.

        With it, where a stop string ends the text: how many characters of `text` are up to its end.
        """
        if not self._stops:
            return text, None
        known, text = len(self._held), self._held + text
        matches = []
        for stop in self._stops:
            # One that was complete before came when the text could not end.
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start))
        if not matches:
            return self._hold(text), None
        self._held = ""
        end, start = min(matches)
        return text[:start], end - known

    def skip(self, text: str) -> str:
        """Take text in which no stop string may be complete yet; return what may be shown."""
        return self._hold(self._held + text)

    def finish(self) -> str:
        """Return what was held back: no more text comes."""
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
