"""Generate text for one request at a time: prefill the prompt, then decode token by token with a KV cache.

Start at ``Engine.generate_tokens``. Knows no process, Ray or network.
"""

from collections.abc import Iterator, Sequence

import torch

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.data.tokenizer import TextTokenizer
from dsmoe_ray.errors import UserError
from dsmoe_ray.inference.detokenizer import StreamingDetokenizer
from dsmoe_ray.inference.kv_cache import ContiguousKvCache
from dsmoe_ray.inference.sampling import GREEDY, SamplingConfig, sample
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
        self._check(prompt_ids, max_tokens)
        rules = deployed_routing(self.model.config) if routing is None else routing
        return self._run(prompt_ids, max_tokens=max_tokens, rules=rules, sampling=sampling)

    def _run(
        self, prompt_ids: Sequence[int], *, max_tokens: int, rules: Sequence[LayerRouting], sampling: SamplingConfig
    ) -> Iterator[int]:
        model = self.model
        stop = min(len(prompt_ids) + max_tokens, model.config.max_seq_len)
        cache = ContiguousKvCache(model.config, max_len=stop, dtype=model.compute_dtype, device=self._device)
        new_ids = prompt_ids
        for position in range(len(prompt_ids), stop):
            token = sample(self._forward(new_ids, rules, cache), sampling, position=position)
            if token == self.tokenizer.end_of_text_id:
                return
            yield token
            new_ids = [token]

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

    def _check(self, prompt_ids: Sequence[int], max_tokens: int) -> None:
        vocab_size, max_seq_len = self.model.config.vocab_size, self.model.config.max_seq_len
        if max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1; found {max_tokens}")
        if not prompt_ids:
            raise UserError("the prompt is empty. Give some text to continue.")
        if len(prompt_ids) >= max_seq_len:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens; this model takes at most {max_seq_len - 1}, which "
                f"leaves one to generate of its longest sequence of {max_seq_len}. Shorten the prompt."
            )
        foreign = [token for token in prompt_ids if not 0 <= token < vocab_size]
        if foreign:
            raise UserError(f"the prompt has the token id {foreign[0]}; this model's ids are 0 to {vocab_size - 1}.")


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
