"""Texts that are written while they are read: the engine as one process uses it, with nothing else driving it."""

import weakref
from collections import deque
from collections.abc import Iterator, Sequence

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import UserError
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.outputs import FinishReason, SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling_config import GREEDY, SamplingConfig
from dsmoe_ray.model.layer_routing import LayerRouting


class Generator:
    """Runs an engine for those who read generations; several can be read in turn and are computed together."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._outputs: dict[int, deque[SequenceOutput]] = {}
        self._abandoned: deque[int] = deque()
        """Requests whose generation is gone. They leave later, as that may be found out in the midst of a step."""
        self._next_id = 0

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int,
        routing: Sequence[LayerRouting] | None = None,
        sampling: SamplingConfig = GREEDY,
        stop: Sequence[str] = (),
    ) -> "Generation":
        """Continue a prompt; the text is computed while it is read from the result.

        It ends with the model's end-of-text token, at a stop string, after ``max_tokens`` tokens, or at the model's
        longest sequence.

        Args:
            prompt: Text to continue.
            max_tokens: Most tokens to generate.
            routing: Rules of each layer, see ``inference/routing.py``; by default the artifact's.
            sampling: How tokens are chosen; by default the most likely one.
            stop: Strings before which the text ends.

        Raises:
            UserError: the prompt is empty, too long or no text, or a number is impossible.
        """
        request = GenerationRequest(
            prompt_ids=self.encode(prompt), max_tokens=max_tokens, routing=routing, sampling=sampling, stop=stop
        )
        request_id = self.submit(request)
        generation = Generation(self, request_id, num_prompt_tokens=len(request.prompt_ids))
        weakref.finalize(generation, self._abandoned.append, request_id).atexit = False
        return generation

    def run(self, requests: Sequence[GenerationRequest]) -> list[list[SequenceOutput]]:
        """Compute requests to their ends, together; return all outputs of each.

        Raises:
            RequestError: one of them cannot be served; then none is.
            EngineFullError: they do not fit into the queue together; then none is served.
        """
        request_ids: list[int] = []
        try:
            for request in requests:
                request_ids.append(self.submit(request))
            return [
                list(self.read(request_id, num_sequences=request.n))
                for request_id, request in zip(request_ids, requests, strict=True)
            ]
        finally:
            # Nothing is left of them, except after an error.
            for request_id in request_ids:
                self.cancel(request_id)

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt.

        Raises:
            UserError: it is no text.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is not valid Unicode text: {error}. Give it in UTF-8.") from error
        return [int(token) for token in self.engine.tokenizer.encode(prompt)]

    def submit(self, request: GenerationRequest) -> int:
        """Give a request to the engine; return its id for ``read``."""
        self._cancel_abandoned()
        request_id, self._next_id = self._next_id, self._next_id + 1
        self.engine.add(request_id, request)
        self._outputs[request_id] = deque()
        return request_id

    def read(self, request_id: int, *, num_sequences: int = 1) -> Iterator[SequenceOutput]:
        """Yield the outputs of a request until all its sequences have ended; leaving early cancels it.

        A request that is cancelled meanwhile, or is not here, has no (more) outputs.
        """
        outputs = self._outputs.get(request_id, deque())
        try:
            while num_sequences:
                while not outputs:
                    if not self.engine.has_request(request_id):
                        return
                    self._step()
                output = outputs.popleft()
                num_sequences -= output.finish_reason is not None
                yield output
        finally:
            self.cancel(request_id)

    def cancel(self, request_id: int) -> None:
        """Let a request go, read to its end or not."""
        self.engine.cancel(request_id)
        self._outputs.pop(request_id, deque()).clear()

    def _cancel_abandoned(self) -> None:
        while self._abandoned:
            self.cancel(self._abandoned.popleft())

    def _step(self) -> None:
        self._cancel_abandoned()
        for output in self.engine.step():
            assert isinstance(output.request_id, int)
            self._outputs[output.request_id].append(output)


class Generation:
    """A text that is written while it is read: iterate over it once for its pieces."""

    def __init__(self, generator: Generator, request_id: int, *, num_prompt_tokens: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.token_ids: list[int] = []
        """Tokens generated so far."""
        self.finish_reason: FinishReason | None = None
        self.prefill_s = 0.0
        """Time until the first token was there, without the reader's own."""
        self.decode_s = 0.0
        """Time for all further tokens."""
        self._generator, self._request_id = generator, request_id
        self._outputs = generator.read(request_id)

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text, each of whole characters, as soon as they are certain; leaving early ends the text.

        Raises:
            DsmoeError: the model is broken.
        """
        try:
            while (output := self._next_output()) is not None:
                if output.error is not None:
                    raise output.error
                if output.text:
                    yield output.text
        finally:
            self._generator.cancel(self._request_id)

    @property
    def num_tokens(self) -> int:
        """Return how many tokens were generated so far."""
        return len(self.token_ids)

    @property
    def tokens_per_s(self) -> float:
        """Return the speed of decoding; 0 before there are two tokens."""
        return (self.num_tokens - 1) / self.decode_s if self.decode_s > 0 and self.num_tokens > 1 else 0.0

    def _next_output(self) -> SequenceOutput | None:
        start_s = monotonic_s()
        output = next(self._outputs, None)
        elapsed_s = monotonic_s() - start_s
        if output is None:
            return None
        if self.num_tokens == 0:
            self.prefill_s += elapsed_s
        else:
            self.decode_s += elapsed_s
        if output.token is not None:
            self.token_ids.append(output.token.token_id)
        self.finish_reason = output.finish_reason
        return output
