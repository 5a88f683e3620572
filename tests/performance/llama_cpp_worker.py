"""Peer: llama.cpp through the low-level interface of ``llama-cpp-python``; a batch takes its steps in one call each."""

import ctypes
from pathlib import Path
from time import perf_counter

import llama_cpp
import numpy as np
from hf_to_gguf import write_gguf
from worker_protocol import parse_arguments, serve

_CACHE_TYPES = {"float16": 1, "float32": 0, "bfloat16": 30}
_POSITIONS_PER_SEQUENCE = 256


class _Batch:
    """Input of one decode call, filled through numpy views of llama.cpp's own arrays."""

    def __init__(self, num_tokens):
        self.raw = llama_cpp.llama_batch_init(num_tokens, 0, 1)

        def view(pointer, dtype):
            return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(dtype)), (num_tokens,))

        self._tokens, self._positions = view(self.raw.token, ctypes.c_int32), view(self.raw.pos, ctypes.c_int32)
        self._num_ids, self._wanted = view(self.raw.n_seq_id, ctypes.c_int32), view(self.raw.logits, ctypes.c_int8)
        self._num_ids[:] = 1

    def fill(self, tokens, positions, sequence_ids, wanted):
        """Set one row for each token."""
        size = len(tokens)
        self.raw.n_tokens = size
        self._tokens[:size], self._positions[:size], self._wanted[:size] = tokens, positions, wanted
        for row, sequence_id in enumerate(sequence_ids):
            self.raw.seq_id[row][0] = sequence_id


class LlamaCppEngine:
    """One model in one type; a context for each batch size, made when it is first asked for."""

    def __init__(self, arguments):
        path = Path(arguments.model) / f"{arguments.dtype}.gguf"
        if not path.exists():
            write_gguf(Path(arguments.model), path, arguments.dtype)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = arguments.load_mode
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._settings = arguments
        self._contexts = {}
        self.about = {
            "engine": f"llama-cpp-python {llama_cpp.__version__}",
            "system": llama_cpp.llama_print_system_info().decode(),
        }

    def decode(self, prompts, num_output_tokens):
        """Generate greedily, all sequences in step."""
        context, batch = self._context_for(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        prompts = np.array(prompts, dtype=np.int32)
        num_sequences, num_prompt_tokens = prompts.shape
        ids = np.arange(num_sequences)
        outputs = np.empty((num_output_tokens, num_sequences), np.int32)
        start_s = perf_counter()
        outputs[0] = self._run_prompts(context, batch, prompts).argmax(-1)
        first_s = perf_counter()
        for step in range(1, num_output_tokens):
            positions = np.full(num_sequences, num_prompt_tokens + step - 1)
            batch.fill(outputs[step - 1], positions, ids, 1)
            outputs[step] = self._run(context, batch, num_sequences).argmax(-1)
        end_s = perf_counter()
        return first_s - start_s, end_s - first_s, outputs.T.tolist()

    def compute_logprobs(self, prompts):
        """Return the log-probabilities of the token after each prompt."""
        context, batch = self._context_for(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        logits = self._run_prompts(context, batch, np.array(prompts, dtype=np.int32)).astype(np.float64)
        return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).tolist()

    def _run_prompts(self, context, batch, prompts):
        num_sequences, length = prompts.shape
        positions = np.tile(np.arange(length), num_sequences)
        batch.fill(prompts.ravel(), positions, np.repeat(np.arange(num_sequences), length), positions == length - 1)
        return self._run(context, batch, num_sequences)

    def _run(self, context, batch, num_rows):
        code = llama_cpp.llama_decode(context, batch.raw)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (num_rows, self._vocab_size))

    def _context_for(self, num_sequences):
        if num_sequences not in self._contexts:
            settings, params = self._settings, llama_cpp.llama_context_default_params()
            params.n_ctx = _POSITIONS_PER_SEQUENCE * num_sequences
            params.n_batch = params.n_ctx
            params.n_ubatch = settings.ubatch
            params.n_seq_max = num_sequences
            params.n_threads = params.n_threads_batch = settings.threads
            params.flash_attn_type = settings.flash_attention
            params.kv_unified = settings.kv_unified
            params.type_k = params.type_v = _CACHE_TYPES[settings.kv_type]
            params.no_perf = True
            context = llama_cpp.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"llama.cpp cannot make a context for {num_sequences} sequences")
            self._contexts[num_sequences] = context, _Batch(params.n_batch)
        return self._contexts[num_sequences]


def _add_options(parser):
    parser.add_argument("--flash-attention", type=int, choices=(-1, 0, 1), default=-1, help="-1: llama.cpp decides")
    parser.add_argument("--ubatch", type=int, default=512, help="most tokens of one pass through the layers")
    parser.add_argument("--kv-unified", action="store_true", help="one cache for all sequences")
    parser.add_argument(
        "--kv-type", choices=tuple(_CACHE_TYPES), default="float16", help="llama.cpp's default: float16"
    )
    parser.add_argument("--load-mode", type=int, default=llama_cpp.llama_model_default_params().load_mode)


if __name__ == "__main__":
    arguments = parse_arguments(__doc__, _add_options)
    serve(lambda: LlamaCppEngine(arguments))
