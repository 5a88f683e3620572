"""The layout of a step for ``TorchRunner``: where each token goes, what it attends to, how it chooses experts.

Shape suffixes: T tokens of the step, R rows whose logits are wanted, B sequences, M blocks of a sequence, S new
positions and C all positions of a sequence, G KV heads, Q query heads per KV head, d head_dim.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dsmoe_ray.inference.batch import ForwardBatch
from dsmoe_ray.inference.expert_choice import RuleNumbers, RulesShape, TokenRules, tabulate
from dsmoe_ray.inference.paged_attention import (
    WINDOW,
    ChunkRows,
    DecodingRows,
    ExactRows,
    PagedKvCache,
    additive_mask,
    find_slots,
)
from dsmoe_ray.inference.row_math import ExactMath, RowMath
from dsmoe_ray.model.config import MoaConfig, ModelConfig, MoeConfig
from dsmoe_ray.model.layer_routing import LayerRouting

RuleShapes = tuple[tuple[RulesShape | None, ...], ...]
"""Of each layer's attention and FFN; steps with equal shapes run the same operations."""
StepRules = tuple[tuple[LayerRouting, ...], ...]
_MAX_TABLES = 64
"""Distinct sets of rules whose tables are kept."""


class Attending(Protocol):
    """Some of a step's tokens and what they attend to."""

    def attend(self, cache: PagedKvCache, layer: int, q_TGQd: torch.Tensor, out_TGQd: torch.Tensor) -> None:
        """Fill the rows of these tokens."""


class LayerRules(NamedTuple):
    """The rules of one layer's mixtures; None where it has none."""

    attention: TokenRules | None
    ffn: TokenRules | None


class StepPlan(NamedTuple):
    """Everything about a step but its hidden states; on the device of the model."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    write_slots_T: torch.Tensor
    attending: tuple[Attending, ...]
    rules: tuple[LayerRules, ...]
    logits_rows_R: torch.Tensor | None
    """None for all rows."""


class RuleTable:
    """The rules of a step, in all layers, as numbers."""

    def __init__(self, rules: StepRules, config: ModelConfig) -> None:
        self.rules = rules
        shapes, numbers = [], []
        for layer in range(config.num_layers):
            for part, mixture in enumerate((config.attention, config.ffn)):
                num_experts = mixture.num_experts if isinstance(mixture, MoaConfig | MoeConfig) else None
                shape, columns = tabulate([one[layer][part] for one in rules], num_experts or 1)
                shapes.append(None if num_experts is None else shape)
                numbers.append(columns)
        self.shapes: RuleShapes = tuple(zip(shapes[::2], shapes[1::2], strict=True))
        self._numbers = [np.stack(column) for column in zip(*numbers, strict=True)]
        """The columns of ``RuleNumbers``, each ``(parts of all layers, rules)``."""
        self._are_read = any(shape is not None and not shape.uniform for shape in shapes)

    def of_tokens(self, rule_idxs_T: np.ndarray) -> RuleNumbers:
        """Return the numbers of each token, ``(parts of all layers, T)`` each; of none where nothing reads them."""
        idxs = rule_idxs_T if self._are_read else rule_idxs_T[:0]
        return RuleNumbers(*(column[:, idxs] for column in self._numbers))


def deal_rules(shapes: RuleShapes, numbers: Sequence[torch.Tensor]) -> tuple[LayerRules, ...]:
    """Deal what ``RuleTable.of_tokens`` returned, wherever it was moved to, to layers."""
    rows = iter(zip(*numbers, strict=True))
    dealt = []
    for layer in shapes:
        parts = [(shape, next(rows)) for shape in layer]
        dealt.append(LayerRules(*(None if shape is None else TokenRules(shape, *row) for shape, row in parts)))
    return tuple(dealt)


class StepPlanner:
    """Lays out steps for one model and cache."""

    def __init__(self, config: ModelConfig, cache: PagedKvCache, numerics: RowMath, device: torch.device) -> None:
        self._config, self._cache, self._math, self._device = config, cache, numerics, device
        self._tables: dict[tuple[int, ...], RuleTable] = {}

    def plan(self, batch: ForwardBatch) -> StepPlan:
        """Lay out any step."""
        query_lens_B = np.diff(batch.query_starts)
        sequences_T = np.repeat(np.arange(batch.num_sequences), query_lens_B)
        starts_T = np.repeat(batch.query_starts[:-1], query_lens_B)
        positions_T = batch.first_positions_B[sequences_T] + np.arange(batch.num_tokens) - starts_T
        slots_T = find_write_slots(batch.block_tables, sequences_T, positions_T, self._cache.block_size)
        table = self.find_rule_table(batch.rules)
        columns = table.of_tokens(batch.rule_idxs_B[sequences_T])
        numbers = [self._move(torch.from_numpy(column)) for column in columns]
        all_wanted = len(batch.logits_rows_R) == batch.num_tokens
        return StepPlan(
            self._to_device(batch.token_ids_T),
            self._to_device(positions_T),
            self._to_device(slots_T),
            tuple(self._plan_attention(batch, query_lens_B)),
            deal_rules(table.shapes, numbers),
            None if all_wanted else self._to_device(batch.logits_rows_R),
        )

    def find_rule_table(self, rules: StepRules) -> RuleTable:
        """Return the rules as numbers, made once for each set of the same objects."""
        # Hashing the rules of all layers would cost as much as the table; the table keeps its objects alive.
        key = tuple(map(id, rules))
        table = self._tables.get(key)
        if table is None:
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            table = self._tables[key] = RuleTable(rules, self._config)
        return table

    def _plan_attention(self, batch: ForwardBatch, query_lens_B: np.ndarray) -> list[Attending]:
        tables = self._to_device(batch.block_tables)
        lengths_B = batch.first_positions_B + query_lens_B
        if isinstance(self._math, ExactMath):
            return [self._plan_exact(batch, index, tables, int(lengths_B[index])) for index in range(len(lengths_B))]
        decoding = np.flatnonzero(query_lens_B == 1)
        attending: list[Attending] = []
        if len(decoding):
            rows = None if len(decoding) == batch.num_tokens else self._to_device(batch.query_starts[decoding])
            chosen = tables if len(decoding) == len(tables) else tables[self._to_device(decoding)]
            num_blocks = -(-int(lengths_B[decoding].max()) // self._cache.block_size)
            attending.append(
                plan_decoding(
                    self._cache, chosen, self._to_device(lengths_B[decoding]), num_blocks=num_blocks, rows_B=rows
                )
            )
        for index in np.flatnonzero(query_lens_B > 1):
            attending.append(self._plan_chunk(batch, int(index), tables, int(lengths_B[index])))
        return attending

    def _plan_chunk(self, batch: ForwardBatch, index: int, tables: torch.Tensor, length: int) -> ChunkRows:
        rows = slice(int(batch.query_starts[index]), int(batch.query_starts[index + 1]))
        slots_C = self._find_slots(tables[index], length)[:length]
        first = int(batch.first_positions_B[index])
        if first == 0:
            return ChunkRows(rows, slots_C, None)
        positions_C = torch.arange(length, device=self._device)
        mask_SC = additive_mask(positions_C[first:, None] >= positions_C, self._cache.k_LNGd.dtype)
        return ChunkRows(rows, slots_C, mask_SC)

    def _plan_exact(self, batch: ForwardBatch, index: int, tables: torch.Tensor, length: int) -> ExactRows:
        assert isinstance(self._math, ExactMath)
        rows = slice(int(batch.query_starts[index]), int(batch.query_starts[index + 1]))
        slots_C = self._find_slots(tables[index], length)[:length]
        padded_C = torch.nn.functional.pad(slots_C, (0, -length % WINDOW), value=self._cache.zero_slot)
        return ExactRows(self._math, rows, int(batch.first_positions_B[index]), padded_C)

    def _find_slots(self, table_M: torch.Tensor, length: int) -> torch.Tensor:
        num_blocks = -(-length // self._cache.block_size)
        return find_slots(self._cache, table_M, torch.tensor(length, device=self._device), num_blocks=num_blocks)

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return self._move(torch.from_numpy(values.astype(np.int64)))

    def _move(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self._device, non_blocking=True)


def find_write_slots(
    block_tables_BM: np.ndarray, sequences_T: np.ndarray, positions_T: np.ndarray, block_size: int
) -> np.ndarray:
    """Return the slot of each token from its sequence and its position there."""
    blocks_T = block_tables_BM[sequences_T, positions_T // block_size].astype(np.int64)
    return blocks_T * block_size + positions_T % block_size


def plan_decoding(
    cache: PagedKvCache,
    block_tables_BM: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    num_blocks: int,
    rows_B: torch.Tensor | None = None,
) -> DecodingRows:
    """Lay out the attention of sequences that decode one token, over ``num_blocks`` blocks each; all on the device."""
    slots_BC = find_slots(cache, block_tables_BM, lengths_B, num_blocks=num_blocks)
    positions_C = torch.arange(slots_BC.shape[1], device=slots_BC.device)
    mask_BC = additive_mask(positions_C < lengths_B[:, None], cache.k_LNGd.dtype)
    return DecodingRows(rows_B, slots_BC, mask_BC[:, None, None])
