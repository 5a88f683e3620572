"""A worker of an engine that is none: it counts on from each prompt's last token. Run as a program.

python fake_peer.py [obedient | dying | silent | babbling | stillborn]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "performance"))

from worker_protocol import serve

VOCAB_SIZE = 4096


class FakeEngine:
    """Fixed times; misbehaves at the first request if told to."""

    def __init__(self, manner):
        if manner == "stillborn":
            raise RuntimeError("no model here")
        self._manner = manner
        self.about = {"engine": "fake 1.0"}

    def decode(self, prompts, num_output_tokens):
        if self._manner == "dying":
            raise RuntimeError("out of luck")
        if self._manner == "silent":
            sys.stdin.read()
        self.about["fastest"] = "counting"
        tokens = [[(prompt[-1] + 1 + step) % VOCAB_SIZE for step in range(num_output_tokens)] for prompt in prompts]
        return 0.25, 0.5, tokens

    def compute_logprobs(self, prompts):
        return [[-0.5 * token for token in prompt] for prompt in prompts]


if __name__ == "__main__":
    manner = sys.argv[1] if len(sys.argv) > 1 else "obedient"
    if manner == "babbling":
        print("hello", flush=True)
    else:
        # What libraries print must not mix with answers.
        serve(lambda: print("a banner") or FakeEngine(manner))
