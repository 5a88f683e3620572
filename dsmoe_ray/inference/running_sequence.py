"""One sequence of a request inside the engine: from sampled tokens to text, log probabilities and its end."""

from collections.abc import Callable, Hashable, Sequence

import torch

from dsmoe_ray.errors import DsmoeError
from dsmoe_ray.inference.outputs import FinishReason, SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling import RowSampling, compute_logprobs
from dsmoe_ray.inference.sampling_config import SampledToken
from dsmoe_ray.inference.sequence import SequenceState
from dsmoe_ray.inference.text_stream import TextStream
from dsmoe_ray.inference.token_counts import TokenCounts


class RunningSequence:
    """What the engine knows of a sequence beside its tokens and blocks, which the scheduler keeps in ``state``."""

    def __init__(
        self,
        request_id: Hashable,
        sequence_idx: int,
        request: GenerationRequest,
        state: SequenceState,
        *,
        decode: Callable[[Sequence[int]], str],
        end_ids: Sequence[int],
        max_len: int,
    ) -> None:
        self.request_id, self.sequence_idx, self.state = request_id, sequence_idx, state
        self._request = request
        self._seed = request.seed_of(sequence_idx)
        self._text = TextStream(decode, request)
        self._ends = {*request.stop_token_ids, *(() if request.ignore_eos else end_ids)}
        self._max_len = max_len
        sampling = request.sampling
        self._counts = TokenCounts(request.prompt_ids, request.generated_ids) if sampling.has_penalties else None
        self._prompt_logprobs: list[SampledToken] | None = None if request.prompt_logprobs is None else []
        """None once they were given out, or if nobody wants them."""

    @property
    def wants_tokens(self) -> bool:
        """Return whether anything is to be generated; if not, only the prompt's log probabilities are wanted."""
        return self._request.max_tokens > 0

    @property
    def has_ended(self) -> bool:
        """Return whether what was generated elsewhere has ended the text already."""
        return self._text.found_stop is not None or not self._ends.isdisjoint(self._request.generated_ids)

    def row(self) -> RowSampling:
        """Return how its next token is chosen."""
        return RowSampling(self._request.sampling, self._seed, len(self.state.token_ids), self._counts)

    def score_prompt(self, logits_RV: torch.Tensor, first_position: int) -> list[SampledToken]:
        """Score the prompt by the logits after its tokens from ``first_position`` on, as far as a next one is known.

        Raises:
            DsmoeError: logits are not finite.
        """
        targets = self._request.prompt_ids[first_position + 1 : first_position + 1 + len(logits_RV)]
        if not targets:
            return []
        assert self._request.prompt_logprobs is not None
        return compute_logprobs(
            logits_RV[: len(targets)], targets, num_top=self._request.prompt_logprobs, first_position=first_position + 1
        )

    def take_scores(self, scores: Sequence[SampledToken]) -> None:
        """Take the next part of the prompt's scores; they come with the first output."""
        if scores:
            assert self._prompt_logprobs is not None
            self._prompt_logprobs += scores

    def take(self, sampled: SampledToken | DsmoeError) -> SequenceOutput:
        """Take the next token, or why there is none; the output says whether the sequence has ended."""
        if isinstance(sampled, DsmoeError):
            return self.fail(sampled)
        token_id = sampled.token_id
        if token_id in self._ends:
            return self._output(None, self._text.finish(), "stop", stop_reason=token_id)
        if self._counts is not None:
            self._counts.push(token_id)
        text = self._text.push(token_id)
        if self._text.found_stop is not None:
            return self._output(sampled, text, "stop", stop_reason=self._text.found_stop)
        if len(self.state.token_ids) + 1 == self._max_len:
            return self._output(sampled, text + self._text.finish(), "length")
        return self._output(sampled, text)

    def end_after_prompt(self) -> SequenceOutput:
        """Return the only output of a sequence that generates nothing."""
        return self._output(None, "", "length")

    def fail(self, error: DsmoeError) -> SequenceOutput:
        """Return the last output of a sequence that cannot go on."""
        return self._output(None, "", "error", error=error)

    def _output(
        self,
        token: SampledToken | None,
        text: str,
        finish_reason: FinishReason | None = None,
        *,
        stop_reason: str | int | None = None,
        error: DsmoeError | None = None,
    ) -> SequenceOutput:
        prompt_logprobs = None
        if self._prompt_logprobs is not None:
            prompt_logprobs, self._prompt_logprobs = tuple(self._prompt_logprobs), None
        return SequenceOutput(
            request_id=self.request_id,
            sequence_idx=self.sequence_idx,
            token=token,
            text=text,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            error=error,
        )
