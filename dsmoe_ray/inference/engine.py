"""Generate text for one request at a time: prefill the prompt, then decode token by token with a KV cache.

Start at ``Engine.generate_tokens``. Knows no process, Ray or network.
"""

from collections.abc import Iterator, Sequence

import torch

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.data.tokenizer import TextTokenizer
from dsmoe_ray.errors import DsmoeError, UserError
from dsmoe_ray.inference.detokenizer import StreamingDetokenizer
from dsmoe_ray.inference.kv_cache import ContiguousKvCache
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling import RowSampling, sample_batch
from dsmoe_ray.inference.sampling_config import GREEDY, SamplingConfig
from dsmoe_ray.inference.token_counts import TokenCounts
from dsmoe_ray.model.transformer import LayerRouting, Transformer, deployed_routing


class Engine:
    """A model and its tokenizer, ready to answer prompts."""

    def __init__(self, model: Transformer, tokenizer: TextTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int,
        routing: Sequence[LayerRouting] | None = None,
        sampling: SamplingConfig = GREEDY,
    ) -> "Generation":
        """Continue a prompt; the text is computed while it is read from the result.

        It ends with the model's end-of-text token, after ``max_tokens`` tokens, or at the model's longest sequence.

        Args:
            prompt: Text to continue.
            max_tokens: Most tokens to generate.
            routing: Rules of each layer, see ``inference/routing.py``; by default the artifact's.
            sampling: How tokens are chosen; by default the most likely one.

        Raises:
            UserError: the prompt is empty, too long or no text, or ``max_tokens`` is not positive.
        """
        prompt_ids = self._encode(prompt)
        tokens = self.generate_tokens(prompt_ids, max_tokens=max_tokens, routing=routing, sampling=sampling)
        detokenizer = StreamingDetokenizer(self.tokenizer.decode, prompt_ids=prompt_ids)
        return Generation(tokens, detokenizer, num_prompt_tokens=len(prompt_ids))

    def generate_tokens(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        routing: Sequence[LayerRouting] | None = None,
        sampling: SamplingConfig = GREEDY,
    ) -> Iterator[int]:
        """Do as ``generate`` with token ids; the end-of-text token ends the sequence and is not part of it.

        A sequence continued from prompt plus tokens so far, with the same sampling, goes on with the same tokens.
        """
        request = GenerationRequest(prompt_ids=prompt_ids, max_tokens=max_tokens, routing=routing, sampling=sampling)
        request.check_against(self.model.config)
        return self._run(request)

    def _run(self, request: GenerationRequest) -> Iterator[int]:
        model, sampling, new_ids = self.model, request.sampling, request.prompt_ids
        rules = deployed_routing(model.config) if request.routing is None else request.routing
        stop = request.compute_max_len(model.config)
        cache = ContiguousKvCache(model.config, max_len=stop, dtype=model.compute_dtype, device=self._device)
        token_counts = TokenCounts(new_ids) if sampling.has_penalties else None
        for position in range(len(request.prompt_ids), stop):
            row = RowSampling(sampling, request.seed_of(0), position, token_counts)
            logits_V = self._forward(new_ids, rules, cache).to("cpu", torch.float32)
            (sampled,) = sample_batch(logits_V[None], [row])
            if isinstance(sampled, DsmoeError):
                raise sampled
            if sampled.token_id == self.tokenizer.end_of_text_id:
                return
            yield sampled.token_id
            if token_counts is not None:
                token_counts.push(sampled.token_id)
            new_ids = [sampled.token_id]

    @torch.inference_mode()
    def _forward(self, new_ids: Sequence[int], rules: Sequence[LayerRouting], cache: ContiguousKvCache) -> torch.Tensor:
        """Run the new tokens and return the logits after the last one, ``(V,)``."""
        tokens_BS = torch.tensor([new_ids], device=self._device)
        output = self.model(tokens_BS, routing=rules, cache=cache, last_logits_only=True)
        return output.logits_BSV[0, -1]

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device

    def _encode(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is not valid Unicode text: {error}. Give it in UTF-8.") from error
        return [int(token) for token in self.tokenizer.encode(prompt)]


class Generation:
    """A text that is written while it is read: iterate over it once for its pieces."""

    def __init__(self, tokens: Iterator[int], detokenizer: StreamingDetokenizer, *, num_prompt_tokens: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.num_tokens = 0
        """Tokens generated so far."""
        self.prefill_s = 0.0
        """Time until the first token was there, without the reader's own."""
        self.decode_s = 0.0
        """Time for all further tokens."""
        self._tokens = tokens
        self._detokenizer = detokenizer

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text, each of whole characters, as soon as they are certain."""
        while (token := self._next_token()) is not None:
            piece = self._detokenizer.push(token)
            if piece:
                yield piece
        rest = self._detokenizer.finish()
        if rest:
            yield rest

    @property
    def tokens_per_s(self) -> float:
        """Return the speed of decoding; 0 before there are two tokens."""
        return (self.num_tokens - 1) / self.decode_s if self.decode_s > 0 and self.num_tokens > 1 else 0.0

    def _next_token(self) -> int | None:
        start_s = monotonic_s()
        token = next(self._tokens, None)
        elapsed_s = monotonic_s() - start_s
        if self.num_tokens == 0:
            self.prefill_s = elapsed_s
        else:
            self.decode_s += elapsed_s
        if token is not None:
            self.num_tokens += 1
        return token
