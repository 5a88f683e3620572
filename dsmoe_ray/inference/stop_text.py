"""Stop strings over a text that comes in pieces: nothing of one is ever given out.

The text ends at the first moment any stop string is complete; of several that are complete then, the one that starts
first counts. While the end of the text so far could be the beginning of a stop string, it is held back: as little as
possible, so that the rest is out at once. How the text is cut into pieces makes no difference to what comes out.
"""

from collections.abc import Sequence


class StopTextFinder:
    """The text of one sequence up to its first stop string."""

    def __init__(self, stop: Sequence[str], *, include_stop_in_output: bool = False) -> None:
        """Take the strings, none of them empty, and whether the text ends after the one found instead of before it."""
        if "" in stop:
            raise ValueError("an empty stop string would end every text; leave it out")
        self._stop = tuple(stop)
        self._include_stop_in_output = include_stop_in_output
        self._held = ""
        """The longest end of the text so far that begins a stop string; not given out yet."""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, piece: str) -> str:
        """Take the next piece of text; return what is certain to be output by now.

        Raises:
            ValueError: the text has ended.
        """
        if self.found is not None:
            raise ValueError(f"the text has ended with {self.found!r}; nothing can follow")
        if not self._stop or not piece:
            return piece
        text = self._held + piece
        # What was given out before cannot be part of a stop string: all of one that has begun is held.
        ends = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            end, start, self.found = min(ends)
            self._held = ""
            return text[: end if self._include_stop_in_output else start]
        held_from = min(_find_beginning(text, stop) for stop in self._stop)
        self._held = text[held_from:]
        return text[:held_from]

    def flush(self) -> str:
        """Return what was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _find_beginning(text: str, stop: str) -> int:
    """Return where the longest end of the text that begins ``stop`` starts; the text's length if there is none."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)
