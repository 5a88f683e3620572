"""The inference engine: requests in, tokens out, many sequences at once. Start at ``Engine.step``.

One step is: the scheduler chooses tokens, the runner computes them, every sequence whose last token was among them gets
its next one. Requests join and leave between any two steps. Knows no process, thread, Ray or network; not for more than
one thread.
"""

import functools
from collections.abc import Hashable

import torch

from dsmoe_ray.data.tokenizer import TextTokenizer
from dsmoe_ray.errors import DsmoeError, RequestError
from dsmoe_ray.inference.batch import build_batch
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.outputs import EngineStatus, SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.runner import ModelRunner
from dsmoe_ray.inference.running_sequence import RunningSequence
from dsmoe_ray.inference.sampling import RowSampling, sample_batch
from dsmoe_ray.inference.scheduler import Scheduler
from dsmoe_ray.inference.sequence import Chunk, ScheduledStep, SequenceState, compute_rules_key
from dsmoe_ray.model.transformer import LayerRouting, deployed_routing


@functools.lru_cache(maxsize=256)
def _intern_rules(rules: tuple[LayerRouting, ...]) -> tuple[tuple[LayerRouting, ...], bytes]:
    """Return one object for all equal rules, as a runner knows those it has seen by their identity; and their key."""
    return rules, compute_rules_key(rules)


class Engine:
    """A model that answers requests, and its tokenizer."""

    def __init__(self, runner: ModelRunner, tokenizer: TextTokenizer, config: EngineConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.model_config = runner.config
        self._runner = runner
        self._scheduler = Scheduler(config, num_blocks=runner.num_blocks)
        self._sequences: dict[Hashable, RunningSequence] = {}
        """By sequence id, which is (request id, sequence index)."""
        self._deployed = tuple(deployed_routing(runner.config))
        self._num_steps = self._num_computed_tokens = self._num_generated_tokens = 0

    def add(self, request_id: Hashable, request: GenerationRequest) -> None:
        """Take on a request; its sequences start when there is room.

        Raises:
            RequestError: this model or this engine cannot serve it, or there is a request with this id.
            EngineFullError: too many wait already.
        """
        request.check_against(self.model_config)
        if self._ids_of(request_id):
            raise RequestError(f"a request {request_id!r} is running already. Give this one another id.", param="id")
        sequences = [self._make_sequence(request_id, idx, request) for idx in range(request.n)]
        if sequences[0].has_ended:
            raise RequestError(
                "the tokens generated so far hold a stop string or a token that ends the text: nothing is left to "
                "generate. Take what there is.",
                param="generated_ids",
            )
        self._scheduler.add(*(sequence.state for sequence in sequences))
        self._sequences |= {sequence.state.sequence_id: sequence for sequence in sequences}

    def cancel(self, request_id: Hashable) -> bool:
        """Let a request go: it is in no later step and has no more output. Return False if there is none."""
        ids = self._ids_of(request_id)
        for sequence_id in ids:
            self._scheduler.cancel(sequence_id)
            del self._sequences[sequence_id]
        return bool(ids)

    @property
    def has_work(self) -> bool:
        """Return whether a step would compute anything."""
        return bool(self._sequences)

    def step(self) -> list[SequenceOutput]:
        """Compute one step; return what it added to each sequence that it added to.

        Raises:
            Exception: whatever the runner raises. Nothing of the step counts then; the next call tries it again.
        """
        step = self._scheduler.schedule()
        if not step.chunks:
            return []
        try:
            logits_RV = self._runner.run(build_batch(step))
        except BaseException:
            self._scheduler.abort(step)
            raise
        self._scheduler.complete(step)
        self._num_steps += 1
        self._num_computed_tokens += step.num_tokens
        return self._advance(step, logits_RV)

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

    def _ids_of(self, request_id: Hashable) -> list[Hashable]:
        """Return the ids of a request's sequences that have not ended."""
        return [sequence_id for sequence_id, one in self._sequences.items() if one.request_id == request_id]

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

    def _advance(self, step: ScheduledStep, logits_RV: torch.Tensor) -> list[SequenceOutput]:
        """Give every sequence of the step what its logits say."""
        outputs: list[SequenceOutput] = []
        sampling: list[tuple[RunningSequence, RowSampling]] = []
        sampled_rows: list[int] = []
        row = 0
        for chunk in step.chunks:
            sequence = self._sequences[chunk.sequence.sequence_id]
            row += chunk.num_logits
            if chunk.sequence.wants_prompt_logits and not self._score_prompt(sequence, chunk, logits_RV, row, outputs):
                continue
            if not chunk.samples:
                continue
            if not sequence.wants_tokens:
                outputs.append(self._end(sequence, sequence.end_after_prompt()))
                continue
            sampling.append((sequence, sequence.row()))
            sampled_rows.append(row - 1)
        if sampling:
            wanted_RV = logits_RV if len(sampled_rows) == len(logits_RV) else logits_RV[sampled_rows]
            tokens = sample_batch(wanted_RV, [sampling_row for _, sampling_row in sampling])
            outputs += [self._take(sequence, token) for (sequence, _), token in zip(sampling, tokens, strict=True)]
        return outputs

    def _score_prompt(
        self,
        sequence: RunningSequence,
        chunk: Chunk,
        logits_RV: torch.Tensor,
        end_row: int,
        outputs: list[SequenceOutput],
    ) -> bool:
        """Give a sequence its prompt's log probabilities; return False if that ended it."""
        if not chunk.num_logits:
            return True
        first_position = chunk.start + chunk.num_tokens - chunk.num_logits
        try:
            sequence.score_prompt(logits_RV[end_row - chunk.num_logits : end_row], first_position)
        except DsmoeError as error:
            outputs.append(self._end(sequence, sequence.fail(error)))
            return False
        return True

    def _take(self, sequence: RunningSequence, token: object) -> SequenceOutput:
        output = sequence.take(token)  # type: ignore[arg-type]
        if output.token is not None:
            self._num_generated_tokens += 1
        if output.finish_reason is not None:
            return self._end(sequence, output)
        assert output.token is not None
        self._scheduler.append_token(sequence.state, output.token.token_id)
        return output

    def _end(self, sequence: RunningSequence, output: SequenceOutput) -> SequenceOutput:
        self._scheduler.finish(sequence.state)
        del self._sequences[sequence.state.sequence_id]
        return output
