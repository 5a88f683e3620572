"""The arrays of one step."""

import numpy as np

from dsmoe_ray.inference.batch import build_batch
from dsmoe_ray.inference.sequence import Chunk, ScheduledStep, SequenceState
from tests.fakes.scheduled_run import DENSE, SPARSE


def make_sequence(token_ids, *, blocks, rules=DENSE):
    sequence = SequenceState(str(token_ids), token_ids, max_total_tokens=100, rules=rules)
    sequence.block_table.extend(blocks)
    return sequence


def test_chunks_lie_one_after_another_with_positions_tables_and_wanted_rows():
    decoding = make_sequence([1, 2, 3], blocks=[5], rules=SPARSE)
    prompt = make_sequence([10, 11, 12, 13, 14], blocks=[7, 2])
    echo = make_sequence([20, 21, 22], blocks=[9], rules=tuple(SPARSE))
    chunks = [Chunk(decoding, 2, 1, 1), Chunk(prompt, 0, 4, 0), Chunk(echo, 1, 2, 2)]
    batch = build_batch(ScheduledStep(chunks=chunks))
    expected = {
        "token_ids_T": [3, 10, 11, 12, 13, 21, 22],
        "query_starts": [0, 1, 5, 7],
        "first_positions_B": [2, 0, 1],
        "block_tables": [[5, 0], [7, 2], [9, 0]],
        "rule_idxs_B": [0, 1, 0],
        "logits_rows_R": [0, 5, 6],
    }
    for name, values in expected.items():
        array = getattr(batch, name)
        assert array.dtype == np.int32 and array.tolist() == values, name
    assert batch.rules == (SPARSE, DENSE)
    assert (batch.num_tokens, batch.num_sequences) == (7, 3)


def test_a_step_without_wanted_logits_has_an_empty_array_of_rows():
    batch = build_batch(ScheduledStep(chunks=[Chunk(make_sequence([1, 2, 3], blocks=[0]), 0, 2, 0)]))
    assert batch.logits_rows_R.shape == (0,) and batch.logits_rows_R.dtype == np.int32


def test_later_growth_of_a_sequence_does_not_change_a_batch():
    sequence = make_sequence([1, 2], blocks=[3])
    batch = build_batch(ScheduledStep(chunks=[Chunk(sequence, 1, 1, 1)]))
    sequence.block_table[0] = 8
    sequence.block_table.append(4)
    assert batch.block_tables.tolist() == [[3]]
