"""Decoding steps as CUDA graphs: recorded once for each size, then replayed without Python between kernels.

Sizes are few: the number of sequences is rounded up to a power of two, and so is the number of blocks of the longest
one. A row of padding repeats the step's last sequence, and so touches no expert that would not be touched anyway, but
writes to the scratch slot and counts in no mean. What is recorded is a plain function of tensors; calling it gives the
same without a graph.

Shape suffixes: B sequences, rows of padding among them, M blocks of a sequence, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dsmoe_ray.inference.batch import ForwardBatch
from dsmoe_ray.inference.expert_choice import NO_GROUP
from dsmoe_ray.inference.paged_attention import PagedKvCache
from dsmoe_ray.inference.step_plan import RuleShapes, RuleTable, find_write_slots

_MAX_GRAPHS = 64
"""Graphs that are kept; the one that was recorded first goes first."""

Replay = Callable[[], torch.Tensor]
Capture = Callable[[Replay], Replay]
"""Records what a function launches; what it returns launches that again and gives the same tensor each time."""


class DecodeInputs(NamedTuple):
    """A decoding step as tensors of fixed shapes, on the device."""

    tokens_3B: torch.Tensor
    """Token ids, positions, and the slots to write to."""
    block_tables_BM: torch.Tensor
    numbers: tuple[torch.Tensor, ...]
    """See ``RuleTable.of_tokens``."""


Decode = Callable[[DecodeInputs, RuleShapes], torch.Tensor]
"""From inputs to logits ``(B, V)`` without a question to the device."""


@dataclass(frozen=True)
class _Recorded:
    inputs: DecodeInputs
    replay: Replay


class DecodeGraphs:
    """All graphs of one runner."""

    def __init__(
        self, decode: Decode, cache: PagedKvCache, *, max_seqs: int, max_blocks: int, capture: Capture | None = None
    ) -> None:
        """Record nothing yet.

        Args:
            decode: What to record.
            cache: Where sequences lie.
            max_seqs: Most sequences of a step.
            max_blocks: Blocks of the longest sequence.
            capture: By default the recording of a CUDA graph.
        """
        self._decode, self._cache = decode, cache
        self._max_seqs, self._max_blocks = max_seqs, max_blocks
        self._capture = capture if capture is not None else CudaGraphCapture(cache.k_LNGd.device)
        self._recorded: dict[tuple[int, int, RuleShapes], _Recorded] = {}

    @property
    def num_recorded(self) -> int:
        """Return how many graphs there are."""
        return len(self._recorded)

    def takes(self, batch: ForwardBatch) -> bool:
        """Tell whether a step is one of decoding only, and not too large."""
        decodes = batch.num_tokens == batch.num_sequences == len(batch.logits_rows_R)
        return decodes and batch.num_sequences <= self._max_seqs

    def run(self, batch: ForwardBatch, table: RuleTable) -> torch.Tensor:
        """Run a step that ``takes`` accepts; return its logits ``(B, V)``, which the next step overwrites."""
        num_seqs = batch.num_sequences
        longest = int(batch.first_positions_B.max()) // self._cache.block_size + 1
        padded_seqs = _round_up(num_seqs)
        num_blocks = min(_round_up(longest), max(self._max_blocks, longest))
        inputs = self._lay_out(batch, table, padded_seqs=padded_seqs, num_blocks=num_blocks)
        key = (padded_seqs, num_blocks, table.shapes)
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._record(key, inputs)
        else:
            _copy(inputs, recorded.inputs)
        return recorded.replay()[:num_seqs]

    def _record(self, key: tuple[int, int, RuleShapes], inputs: DecodeInputs) -> _Recorded:
        device = self._cache.k_LNGd.device
        held = DecodeInputs(
            inputs.tokens_3B.to(device, copy=True),
            inputs.block_tables_BM.to(device, copy=True),
            tuple(column.to(device, copy=True) for column in inputs.numbers),
        )
        shapes = key[2]
        if len(self._recorded) >= _MAX_GRAPHS:
            del self._recorded[next(iter(self._recorded))]
        recorded = _Recorded(held, self._capture(lambda: self._decode(held, shapes)))
        self._recorded[key] = recorded
        return recorded

    def _lay_out(self, batch: ForwardBatch, table: RuleTable, *, padded_seqs: int, num_blocks: int) -> DecodeInputs:
        """Return the step's inputs on the CPU, padded."""
        num_seqs = batch.num_sequences
        rows_B = np.minimum(np.arange(padded_seqs), num_seqs - 1)
        positions_B = batch.first_positions_B[rows_B]
        slots_B = find_write_slots(batch.block_tables, rows_B, positions_B, self._cache.block_size)
        slots_B[num_seqs:] = self._cache.scratch_slot
        tables_BM = np.zeros((padded_seqs, num_blocks), np.int64)
        width = min(num_blocks, batch.block_tables.shape[1])
        tables_BM[:, :width] = batch.block_tables[rows_B, :width]
        numbers = table.of_tokens(batch.rule_idxs_B[rows_B])
        numbers.group[:, num_seqs:] = NO_GROUP
        tokens_3B = np.stack([batch.token_ids_T[rows_B], positions_B, slots_B]).astype(np.int64)
        columns = tuple(torch.from_numpy(column) for column in numbers)
        return DecodeInputs(torch.from_numpy(tokens_3B), torch.from_numpy(tables_BM), columns)


class CudaGraphCapture:
    """Records CUDA graphs that share one pool of memory, as no two ever run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Replay) -> Replay:
        """Run once, so that libraries take their workspace, then record."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function()
            torch.cuda.current_stream().wait_stream(side)
            # Other threads may go on using the GPU.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = function()

        def replay() -> torch.Tensor:
            with torch.cuda.device(self._device):
                graph.replay()
            return output

        return replay


def _round_up(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()


def _copy(source: DecodeInputs, target: DecodeInputs) -> None:
    target.tokens_3B.copy_(source.tokens_3B)
    target.block_tables_BM.copy_(source.block_tables_BM)
    for held, column in zip(target.numbers, source.numbers, strict=True):
        if column.numel():
            held.copy_(column)
