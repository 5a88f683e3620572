"""Peer: ``generate`` of transformers.

The first time it meets a batch size it tries the implementations of experts and keeps the fastest for it, so that a
caller who warms up compares with its best.
"""

from time import perf_counter

import torch
import transformers
from worker_protocol import parse_arguments, serve

_IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
# Not batched_mm, which copies the weights of every expert of every token: gigabytes for a batch of prompts.
_TRIED = ("grouped_mm", "eager")
_TRIAL_TOKENS = 6
_TRIAL_ROUNDS = 2


class _Stopwatch(transformers.StoppingCriteria):
    """Note when the first token of every sequence is there; never stops anything."""

    def __init__(self):
        self.first_token_s = None

    def __call__(self, input_ids, scores, **_):
        if self.first_token_s is None:
            self.first_token_s = perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TransformersEngine:
    """One model in one type."""

    def __init__(self, arguments):
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(arguments.threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
        ).eval()
        for parameter in self._model.parameters():
            # Loaded weights may be views of the mapped file, at addresses that slow kernels down.
            parameter.data = parameter.data.clone()
        self._choices = _TRIED if arguments.experts == "auto" else (arguments.experts,)
        self._cache = arguments.cache
        self._chosen = {}
        self.about = {"engine": f"transformers {transformers.__version__}", "torch": torch.__version__}

    @torch.inference_mode()
    def decode(self, prompts, num_output_tokens):
        """Generate with the implementation that suits this batch size."""
        self._choose(prompts)
        return self._generate(prompts, num_output_tokens)

    @torch.inference_mode()
    def compute_logprobs(self, prompts):
        """Return the log-probabilities of the token after each prompt."""
        self._choose(prompts)
        return self._model(torch.tensor(prompts), logits_to_keep=1).logits[:, -1].float().log_softmax(-1).tolist()

    def _choose(self, prompts):
        batch = len(prompts)
        if batch not in self._chosen:
            trial_s = {}
            for implementation in self._choices:
                self._model.set_experts_implementation(implementation)
                rounds = [sum(self._generate(prompts, _TRIAL_TOKENS)[:2]) for _ in range(_TRIAL_ROUNDS)]
                trial_s[implementation] = min(rounds)
            self._chosen[batch] = min(trial_s, key=trial_s.get)
            self.about[f"trial_s_at_batch_{batch}"] = trial_s
        self._model.set_experts_implementation(self._chosen[batch])
        self.about["experts_implementation"] = self._chosen[batch]

    def _generate(self, prompts, num_output_tokens):
        watch = _Stopwatch()
        tokens = torch.tensor(prompts)
        start_s = perf_counter()
        output = self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_output_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=self._cache,
            stopping_criteria=transformers.StoppingCriteriaList([watch]),
        )
        end_s = perf_counter()
        return watch.first_token_s - start_s, end_s - watch.first_token_s, output[:, tokens.shape[1] :].tolist()


def _add_options(parser):
    parser.add_argument("--experts", choices=("auto", *_IMPLEMENTATIONS), default="auto")
    parser.add_argument("--cache", choices=("dynamic", "static"), default=None)


if __name__ == "__main__":
    arguments = parse_arguments(__doc__, _add_options)
    serve(lambda: TransformersEngine(arguments))
