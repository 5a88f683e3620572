"""The inference engine: requests in, tokens out, many sequences at once. Start at ``Engine.step``.

One step is: the scheduler chooses tokens, the runner computes them, every sequence whose last token was among them gets
its next one. Requests join and leave between any two steps. Knows no process, thread, Ray or network; not for more than
one thread.
"""

import functools
import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from dsmoe_ray.data.tokenizer import TextTokenizer
from dsmoe_ray.errors import DsmoeError, RequestError
from dsmoe_ray.inference.batch import build_batch
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.outputs import EngineStatus, SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.runner import ModelRunner
from dsmoe_ray.inference.running_sequence import RunningSequence
from dsmoe_ray.inference.sampling import sample_batch
from dsmoe_ray.inference.sampling_config import SampledToken
from dsmoe_ray.inference.scheduler import Scheduler
from dsmoe_ray.inference.sequence import Chunk, ScheduledStep, SequenceState, compute_rules_key
from dsmoe_ray.model.layer_routing import LayerRouting, deployed_routing

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=256)
def _intern_rules(rules: tuple[LayerRouting, ...]) -> tuple[tuple[LayerRouting, ...], bytes]:
    """Return one object for all equal rules, as a runner knows those it has seen by their identity; and their key."""
    return rules, compute_rules_key(rules)


@dataclass(slots=True)
class _Advance:
    """What a step says of one sequence."""

    sequence: RunningSequence
    samples: bool
    """Whether its last token was computed."""
    row: int
    """Of its last logits."""
    scores: Sequence[SampledToken] = ()
    """Of the prompt's tokens whose logits were computed."""
    error: DsmoeError | None = None
    """Why there are no scores."""
    token: SampledToken | DsmoeError | None = None

    def apply(self) -> SequenceOutput | None:
        """Give it to the sequence."""
        if self.error is not None:
            return self.sequence.fail(self.error)
        self.sequence.take_scores(self.scores)
        if self.token is not None:
            return self.sequence.take(self.token)
        return self.sequence.end_after_prompt() if self.samples else None


class Engine:
    """A model that answers requests, and its tokenizer."""

    def __init__(self, runner: ModelRunner, tokenizer: TextTokenizer, config: EngineConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.model_config = runner.config
        self._runner = runner
        self._scheduler = Scheduler(config, num_blocks=runner.num_blocks)
        self._sequences: dict[Hashable, RunningSequence] = {}
        """By sequence id, which is (request id, sequence index)."""
        self._ids_of: dict[Hashable, dict[Hashable, None]] = {}
        """By request id, the ids of its sequences that have not ended, in order."""
        self._deployed = tuple(deployed_routing(runner.config))
        self._num_steps = self._num_computed_tokens = self._num_generated_tokens = 0

    def add(self, request_id: Hashable, request: GenerationRequest) -> None:
        """Take on a request; its sequences start when there is room.

        Raises:
            RequestError: this model or this engine cannot serve it, or there is a request with this id.
            EngineFullError: too many wait already.
        """
        request.check_against(self.model_config)
        if self.has_request(request_id):
            raise RequestError(f"a request {request_id!r} is running already. Give this one another id.", param="id")
        # Before texts are made for all n.
        self._scheduler.check_queue(request.n)
        sequences = [self._make_sequence(request_id, idx, request) for idx in range(request.n)]
        if sequences[0].has_ended:
            raise RequestError(
                "the tokens generated so far hold a stop string or a token that ends the text: nothing is left to "
                "generate. Take what there is.",
                param="generated_ids",
            )
        self._scheduler.add(*(sequence.state for sequence in sequences))
        self._sequences |= {sequence.state.sequence_id: sequence for sequence in sequences}
        self._ids_of[request_id] = {sequence.state.sequence_id: None for sequence in sequences}

    def cancel(self, request_id: Hashable) -> bool:
        """Let a request go: it is in no later step and has no more output. Return False if there is none."""
        ids = list(self._ids_of.get(request_id, ()))
        for sequence_id in ids:
            self._scheduler.cancel(sequence_id)
            self._forget(sequence_id, request_id)
        return bool(ids)

    def has_request(self, request_id: Hashable) -> bool:
        """Return whether a request has sequences that have not ended."""
        return request_id in self._ids_of

    @property
    def has_work(self) -> bool:
        """Return whether a step would compute anything."""
        return bool(self._sequences)

    def step(self) -> list[SequenceOutput]:
        """Compute one step; return what it added to each sequence that it added to.

        Raises:
            Exception: whatever the runner or sampling raises. Nothing of the step counts then; the next call tries it
                again.
        """
        step = self._scheduler.schedule()
        if not step.chunks:
            assert not self._sequences, f"{len(self._sequences)} sequences are here and none can be scheduled"
            return []
        try:
            advances = self._read_logits(step, self._runner.run(build_batch(step)))
        except BaseException:
            self._scheduler.abort(step)
            raise
        self._scheduler.complete(step)
        self._num_steps += 1
        self._num_computed_tokens += step.num_tokens
        return [output for advance in advances if (output := self._take(advance)) is not None]

    @property
    def status(self) -> EngineStatus:
        """Return how busy the engine is and what it has done."""
        scheduler = self._scheduler
        return EngineStatus(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=self._runner.num_blocks,
            num_free_blocks=scheduler.num_free_blocks,
            num_cached_blocks=scheduler.num_cached_blocks,
            kv_cache_bytes=self._runner.kv_cache_bytes,
            num_steps=self._num_steps,
            num_computed_tokens=self._num_computed_tokens,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_generated_tokens=self._num_generated_tokens,
        )

    def _make_sequence(self, request_id: Hashable, idx: int, request: GenerationRequest) -> RunningSequence:
        rules, rules_key = _intern_rules(tuple(self._deployed if request.routing is None else request.routing))
        tokens = (*request.prompt_ids, *request.generated_ids)
        max_len = request.compute_max_len(self.model_config)
        state = SequenceState(
            (request_id, idx),
            tokens,
            # A prompt that is only scored counts as if a token came after it.
            max_total_tokens=max(max_len, len(tokens) + 1),
            rules=rules,
            rules_key=rules_key,
            wants_prompt_logits=request.prompt_logprobs is not None,
        )
        return RunningSequence(
            request_id,
            idx,
            request,
            state,
            decode=self.tokenizer.decode,
            end_ids=self.tokenizer.end_ids,
            max_len=max_len,
        )

    def _read_logits(self, step: ScheduledStep, logits_RV: torch.Tensor) -> list[_Advance]:
        """Return what a step's logits say of each of its sequences; changes nothing."""
        advances: list[_Advance] = []
        row = 0
        for chunk in step.chunks:
            sequence = self._sequences[chunk.sequence.sequence_id]
            row += chunk.num_logits
            advance = _Advance(sequence, samples=chunk.samples, row=row - 1)
            if chunk.sequence.wants_prompt_logits and chunk.num_logits:
                self._score_prompt(advance, chunk, logits_RV[row - chunk.num_logits : row])
            advances.append(advance)
        sampling = [one for one in advances if one.samples and one.error is None and one.sequence.wants_tokens]
        if sampling:
            whole = len(sampling) == len(logits_RV)
            wanted_RV = logits_RV if whole else logits_RV[[advance.row for advance in sampling]]
            tokens = sample_batch(wanted_RV, [advance.sequence.row() for advance in sampling])
            for advance, token in zip(sampling, tokens, strict=True):
                advance.token = token
        return advances

    def _score_prompt(self, advance: _Advance, chunk: Chunk, logits_RV: torch.Tensor) -> None:
        try:
            advance.scores = advance.sequence.score_prompt(logits_RV, chunk.start + chunk.num_tokens - chunk.num_logits)
        except DsmoeError as error:
            advance.error = error

    def _take(self, advance: _Advance) -> SequenceOutput | None:
        """Give a sequence what its step says; return its output if there is one."""
        sequence = advance.sequence
        try:
            output = advance.apply()
        except Exception as error:
            # The step counts for its neighbours already, so that only this sequence can be let go.
            request_id, idx = sequence.request_id, sequence.sequence_idx
            logger.exception("request %r, sequence %d: its output cannot be told", request_id, idx)
            output = sequence.fail(DsmoeError(f"the output cannot be told, {type(error).__name__}: {error}"))
        if output is None:
            return None
        if output.token is not None:
            self._num_generated_tokens += 1
        if output.finish_reason is not None:
            self._scheduler.finish(sequence.state)
            self._forget(sequence.state.sequence_id, sequence.request_id)
        else:
            assert output.token is not None
            self._scheduler.append_token(sequence.state, output.token.token_id)
        return output

    def _forget(self, sequence_id: Hashable, request_id: Hashable) -> None:
        del self._sequences[sequence_id]
        ids = self._ids_of[request_id]
        del ids[sequence_id]
        if not ids:
            del self._ids_of[request_id]
