"""A published model as lm-evaluation-harness sees it, so that its tasks run on our engine.

Needs the extra ``evaluation``. Nothing here knows a task::

    model = EngineModel(Generator(load_engine(load_artifact(Path("artifact")))))
    lm_eval.simple_evaluate(model=model, tasks=["hellaswag"])

How texts become tokens, and long texts windows, is the harness's own doing, as for its other models. A window has one
token less than the model's longest sequence: the engine computes the last token as well, which is only predicted there.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dsmoe_ray.errors import RequestError, UserError
from dsmoe_ray.inference.generation import Generator
from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling_config import SamplingConfig
from dsmoe_ray.model.layer_routing import LayerRouting

DEFAULT_MAX_TOKENS = 256
"""Of a generated text whose task does not say."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_HANDLED = (*_SAMPLING, "until", "max_gen_toks", "do_sample")

TokenPair = tuple[tuple[str, str] | None, list[int], list[int]]
"""What was asked for, if its result is to be remembered under it; tokens that are given, and those to be scored."""


class EngineModel(TemplateLM):
    """An engine that scores and continues texts for the harness."""

    def __init__(self, generator: Generator, *, routing: Sequence[LayerRouting] | None = None) -> None:
        """Take an engine that nobody else uses meanwhile.

        Args:
            generator: Runs it.
            routing: Rules of each layer; by default as the model is deployed.
        """
        super().__init__()
        self._generator, self._routing = generator, routing
        engine = generator.engine
        self.max_length = engine.model_config.max_seq_len - 1
        self._num_at_once = engine.config.max_waiting

    @property
    def eot_token_id(self) -> int:
        """Return the token that stands before a text without context."""
        return self._generator.engine.tokenizer.end_of_text_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text; our tokenizers add none of their own."""
        return self._generator.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each whole text, long ones in windows."""
        windows = [self._cut(request.args[0]) for request in requests]
        scores = iter(self._loglikelihood_tokens([pair for of_text in windows for pair in of_text]))
        totals = [sum(next(scores)[0] for _ in of_text) for of_text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return how each text goes on.

        Raises:
            UserError: a task wants what the engine has not.
        """
        asked = [self._to_request(*request.args, seed=idx) for idx, request in enumerate(requests)]
        texts = ["".join(output.text for output in outputs) for outputs in self._run(asked)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(self, requests: Sequence[TokenPair], **kwargs: Any) -> list[tuple[float, bool]]:
        asked = [
            GenerationRequest(
                # Of a text that is too long the beginning is left out, as the harness does.
                prompt_ids=[*context, *continuation][-self.max_length - 1 :],
                max_tokens=0,
                prompt_logprobs=1,
                routing=self._routing,
            )
            for _, context, continuation in requests
        ]
        scores = []
        for (key, _, continuation), [output] in zip(requests, self._run(asked), strict=True):
            assert output.prompt_logprobs is not None
            scored = output.prompt_logprobs[-len(continuation) :]
            total = sum(token.logprob for token in scored if token.logprob is not None)
            is_greedy = all(token.top_logprobs[0][0] == token.token_id for token in scored)
            scores.append((total, is_greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, scores[-1])
        return scores

    def _run(self, requests: Sequence[GenerationRequest]) -> Iterator[list[SequenceOutput]]:
        for start in range(0, len(requests), self._num_at_once):
            for outputs in self._generator.run(requests[start : start + self._num_at_once]):
                if outputs[-1].error is not None:
                    raise outputs[-1].error
                yield outputs

    def _cut(self, text: str) -> list[TokenPair]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text) if text else [],
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]

    def _to_request(self, context: str, gen_kwargs: Mapping[str, Any], *, seed: int) -> GenerationRequest:
        wanted = normalize_gen_kwargs(dict(gen_kwargs), DEFAULT_MAX_TOKENS)
        foreign = wanted.keys() - set(_HANDLED)
        if foreign:
            raise UserError(
                f"a task asks for generation with {', '.join(sorted(foreign))}; the engine knows {', '.join(_HANDLED)}."
            )
        max_tokens = wanted["max_gen_toks"]
        room = self.max_length - max_tokens
        if room < 1:
            raise RequestError(
                f"a task asks for {max_tokens} tokens, which leaves no room for its text in sequences of "
                f"{self.max_length}. Lower max_gen_toks.",
                param="max_tokens",
            )
        sampling = {name: wanted[name] for name in _SAMPLING if wanted.get(name) is not None}  # type: ignore[literal-required]
        return GenerationRequest(
            prompt_ids=(self.tok_encode(context) if context else [self.prefix_token_id])[-room:],
            max_tokens=max_tokens,
            stop=[text for text in wanted["until"] if text],
            sampling=SamplingConfig(**sampling, seed=seed),
            routing=self._routing,
        )
