"""The line protocol of the peers' workers; the other end is ``dsmoe_ray/bench/peer_process.py``.

A worker says one JSON line when it is ready, then answers each request line with one line, until its input ends:

    {"op": "decode", "prompts": [[1, 2], [3, 4]], "output_tokens": 64}
        -> {"prefill_s": 0.1, "decode_s": 1.2, "tokens": [[5, ...], [6, ...]]}
    {"op": "logprobs", "prompts": [[1, 2], [3, 4]]}
        -> {"logprobs": [[-9.1, ...], [-8.2, ...]]}, of every token as the next one of each prompt

Tokens are the greedy ones; an end-of-text token ends nothing. ``prefill_s`` runs until every sequence has its first
output token, ``decode_s`` from there until the last. Standard library only: each peer has an environment of its own.
"""

import argparse
import json
import os
import sys


def parse_arguments(description, add_options=None):
    """Return what every worker is started with, and the options of this one."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory in the GraniteMoe format, float32")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    if add_options is not None:
        add_options(parser)
    return parser.parse_args()


def claim_stdout():
    """Return the real standard output; whatever else prints from now on goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def serve(build_engine):
    """Build the engine, say that it is ready, and answer requests until they end.

    Args:
        build_engine: Returns an object with ``about`` (a dict to report), ``decode(prompts, num_output_tokens)``
            that returns (prefill_s, decode_s, tokens), and ``compute_logprobs(prompts)``.
    """
    answers = claim_stdout()
    engine = build_engine()
    _answer(answers, {"ready": True, **engine.about})
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "decode":
            prefill_s, decode_s, tokens = engine.decode(request["prompts"], request["output_tokens"])
            _answer(answers, {"prefill_s": prefill_s, "decode_s": decode_s, "tokens": tokens, **engine.about})
        elif request["op"] == "logprobs":
            _answer(answers, {"logprobs": engine.compute_logprobs(request["prompts"])})
        else:
            raise ValueError(f"unknown op {request['op']!r}; known are decode and logprobs")


def _answer(answers, values):
    answers.write(json.dumps(values) + "\n")
    answers.flush()
