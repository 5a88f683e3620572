"""One sequence on its way through the engine, and what a step does with it. Pure data, no decisions."""

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from dsmoe_ray.inference.block_pool import compute_block_key, compute_root_key
from dsmoe_ray.model.layer_routing import LayerRouting


class SequenceStatus(Enum):
    """Where a sequence is."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


def compute_rules_key(rules: Sequence[LayerRouting]) -> bytes:
    """Return what tells apart routing rules under which keys and values differ."""
    return ";".join(f"{layer.attention.to_spec()},{layer.ffn.to_spec()}" for layer in rules).encode()


class SequenceState:
    """Tokens of one sequence, how many of them are computed, and the blocks their keys and values lie in.

    Only the scheduler changes it.
    """

    __slots__ = (
        "_block_keys",
        "block_table",
        "max_total_tokens",
        "num_computed",
        "num_logits_done",
        "num_preemptions",
        "num_prefix_hit_tokens",
        "num_prompt_tokens",
        "rules",
        "rules_key",
        "sequence_id",
        "status",
        "token_ids",
        "wants_prompt_logits",
    )

    def __init__(
        self,
        sequence_id: Hashable,
        prompt_ids: Sequence[int],
        *,
        max_total_tokens: int,
        rules: Sequence[LayerRouting],
        rules_key: bytes | None = None,
        wants_prompt_logits: bool = False,
    ) -> None:
        """Make a sequence that has not been given to a scheduler.

        Args:
            sequence_id: What tells it apart from all others in the engine.
            prompt_ids: At least one token.
            max_total_tokens: Most tokens it can have, prompt included; the prompt's own if nothing is generated.
            rules: Routing rules, one entry a layer.
            rules_key: ``compute_rules_key(rules)`` if the caller has it.
            wants_prompt_logits: Logits after every token of the prompt are wanted, not only after the last.
        """
        assert 1 <= len(prompt_ids) <= max_total_tokens
        self.sequence_id = sequence_id
        self.token_ids = list(prompt_ids)
        self.num_prompt_tokens = len(prompt_ids)
        self.max_total_tokens = max_total_tokens
        self.rules = tuple(rules)
        self.rules_key = compute_rules_key(rules) if rules_key is None else rules_key
        self.wants_prompt_logits = wants_prompt_logits
        self.status = SequenceStatus.WAITING
        self.block_table = array("i")
        self.num_computed = 0
        self.num_logits_done = 0
        self.num_prefix_hit_tokens = 0
        self.num_preemptions = 0
        self._block_keys: list[bytes] = []

    @property
    def max_positions(self) -> int:
        """Return how many of its tokens can ever be computed: not the last, unless it is the prompt's."""
        return max(self.max_total_tokens - 1, self.num_prompt_tokens)

    @property
    def num_uncomputed(self) -> int:
        """Return how many tokens have no keys and values yet; 1 while it decodes."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_finished(self) -> bool:
        """Return whether it has left the scheduler, by its end or by being cancelled."""
        return self.status is SequenceStatus.FINISHED

    def block_keys(self, num_blocks: int, *, block_size: int) -> list[bytes]:
        """Return the prefix-cache keys of the first blocks, which must be full of known tokens."""
        keys = self._block_keys
        while len(keys) < num_blocks:
            start = len(keys) * block_size
            parent = keys[-1] if keys else compute_root_key(self.rules_key)
            keys.append(compute_block_key(parent, self.token_ids[start : start + block_size]))
        return keys[:num_blocks]


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence that a step computes."""

    sequence: SequenceState
    start: int
    """Position of the first token; all before it are in the KV cache."""
    num_tokens: int
    num_logits: int
    """After how many of its last tokens logits are wanted."""

    @property
    def samples(self) -> bool:
        """Return whether the last logits choose the sequence's next token."""
        return self.start + self.num_tokens == len(self.sequence.token_ids)


@dataclass(kw_only=True)
class ScheduledStep:
    """What one step computes: decoding sequences first, then pieces of prompts, each in order of arrival."""

    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[SequenceState] = field(default_factory=list)
    """Sequences that run since this step."""
    registered_blocks: list[int] = field(default_factory=list)
    """Blocks that can be found since this step, which fills them."""

    @property
    def num_tokens(self) -> int:
        """Return how many tokens it computes."""
        return sum(chunk.num_tokens for chunk in self.chunks)
