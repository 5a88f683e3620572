"""The text of one sequence while its tokens come: whole characters, and nothing of a stop string."""

from collections.abc import Callable, Sequence

from dsmoe_ray.inference.detokenizer import StreamingDetokenizer
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.stop_text import StopTextFinder


class TextStream:
    """The text of one sequence of a request; of tokens generated elsewhere only what was held back there."""

    def __init__(self, decode: Callable[[Sequence[int]], str], request: GenerationRequest) -> None:
        """Start after the request's prompt and the tokens it has generated already."""
        self._detokenizer = StreamingDetokenizer(decode, prompt_ids=request.prompt_ids)
        self._finder = StopTextFinder(request.stop, include_stop_in_output=request.include_stop_in_output)
        for token_id in request.generated_ids:
            if self.found_stop is None:
                self.push(token_id)

    @property
    def found_stop(self) -> str | None:
        """Return the stop string that ended the text, if any; no token can follow."""
        return self._finder.found

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is certain by now, which may be empty."""
        return self._finder.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Return what was held back, when no more tokens come; empty after a stop string."""
        if self.found_stop is not None:
            return ""
        rest = self._finder.push(self._detokenizer.finish())
        return rest + self._finder.flush()
