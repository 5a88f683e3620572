"""Peer: the engine of vLLM's CPU build, in this very process.

In one process neither side of a queue spins while it waits, so that two threads are two threads and an idle worker
is idle. Prefix caching is off: a prompt that is measured twice is computed twice.
"""

import os
import sys
from pathlib import Path
from time import perf_counter

from worker_protocol import parse_arguments, serve

_MAX_SEQUENCES = 32
_MAX_PROMPT_TOKENS = 8192
"""Of a whole batch: it is computed in one step."""


def set_environment(num_threads):
    """Start this program again under the OpenMP library that vLLM asks for; what it reads must be set before."""
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        return
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    os.environ.update(
        {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(num_threads),
            # Milliseconds that idle threads spin before they sleep.
            "KMP_BLOCKTIME": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": str(library),
        }
    )
    os.execv(sys.executable, [sys.executable, *sys.argv])


class VllmEngine:
    """One model in one type."""

    def __init__(self, arguments):
        import torch
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        torch.set_num_threads(arguments.threads)
        self._vllm = vllm
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=arguments.model,
                skip_tokenizer_init=True,
                dtype=arguments.dtype,
                seed=0,
                max_num_seqs=_MAX_SEQUENCES,
                max_num_batched_tokens=_MAX_PROMPT_TOKENS,
                enable_prefix_caching=False,
                enforce_eager=arguments.eager,
                disable_log_stats=True,
                max_logprobs=-1,
            )
        )
        self._next_id = 0
        self.about = {"engine": f"vllm {vllm.__version__}", "torch": torch.__version__}

    def decode(self, prompts, num_output_tokens):
        """Generate greedily; all prompts are added before the first step."""
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True, detokenize=False
        )
        start_s = perf_counter()
        ids = self._add(prompts, params)
        tokens, first_s = {}, None
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
            if first_s is None and len(tokens) == len(ids):
                assert all(len(own) == 1 for own in tokens.values()), "the prompts were not computed in one step"
                first_s = perf_counter()
        return first_s - start_s, perf_counter() - first_s, [tokens[request_id] for request_id in ids]

    def compute_logprobs(self, prompts):
        """Return the log-probabilities of the token after each prompt."""
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, logprobs=-1
        )
        ids = self._add(prompts, params)
        found = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                by_token = output.outputs[0].logprobs[0]
                found[output.request_id] = [by_token[token].logprob for token in range(len(by_token))]
        return [found[request_id] for request_id in ids]

    def _add(self, prompts, params):
        ids = [str(self._next_id + index) for index in range(len(prompts))]
        self._next_id += len(prompts)
        for request_id, prompt in zip(ids, prompts, strict=True):
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        return ids


def _add_options(parser):
    parser.add_argument("--eager", action="store_true", help="do not compile the model")


if __name__ == "__main__":
    arguments = parse_arguments(__doc__, _add_options)
    set_environment(arguments.threads)
    serve(lambda: VllmEngine(arguments))
