"""Peer over HTTP: vLLM's own OpenAI-compatible server on a CPU, with the settings of ``vllm_worker.py``.

``vllm_server.py --model DIR --dtype T --threads N --port P`` becomes vLLM's server.
"""

import argparse
import os
import sys
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--port", required=True)
    parser.add_argument("--max-seqs", default="32")
    arguments = parser.parse_args()
    os.environ.update(
        {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(arguments.threads),
            # Milliseconds that idle threads spin before they sleep.
            "KMP_BLOCKTIME": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": str(Path(sys.prefix) / "lib" / "libiomp5.so"),
        }
    )
    # What "vllm serve" starts. That command asks for the version of "vllm", but the CPU wheel has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    model = ["--model", arguments.model, "--served-model-name", "bench", "--dtype", arguments.dtype]
    options = [*model, "--host", "127.0.0.1", "--port", arguments.port]
    limits = ["--max-num-seqs", arguments.max_seqs, "--max-num-batched-tokens", "8192", "--no-enable-prefix-caching"]
    os.execv(command[0], [*command, *options, *limits])


if __name__ == "__main__":
    main()
