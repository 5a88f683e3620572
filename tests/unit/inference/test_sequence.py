"""Keys of blocks and of rules; whether a chunk samples."""

import pytest

from dsmoe_ray.inference.sequence import Chunk, SequenceState, compute_rules_key
from dsmoe_ray.model.config import RoutingConfig
from dsmoe_ray.model.layer_routing import LayerRouting

DENSE = RoutingConfig()
TOP_2 = RoutingConfig.parse("top_k=2")


ONE_LAYER = (LayerRouting(),)


def make_sequence(token_ids, rules=ONE_LAYER):
    return SequenceState(0, token_ids, max_total_tokens=50, rules=rules)


@pytest.mark.parametrize(
    "rules",
    [
        [LayerRouting(), LayerRouting()],
        [LayerRouting(ffn=TOP_2)],
        [LayerRouting(attention=TOP_2)],
        [LayerRouting(ffn=RoutingConfig.parse("threshold=0.5"))],
        [LayerRouting(ffn=RoutingConfig.parse("threshold=0.5000000000000001"))],
    ],
    ids=["another number of layers", "ffn", "attention", "another mode", "the last digit"],
)
def test_every_difference_of_rules_makes_another_key(rules):
    others = [[LayerRouting()], [LayerRouting(ffn=RoutingConfig.parse("threshold=0.5000000000000002"))]]
    assert compute_rules_key(rules) not in [compute_rules_key(other) for other in others]
    assert compute_rules_key(rules) == compute_rules_key(tuple(rules))


def test_keys_of_blocks_stay_when_a_sequence_grows():
    sequence = make_sequence([1, 2, 3, 4])
    before = sequence.block_keys(2, block_size=2)
    sequence.token_ids += [5, 6]
    after = sequence.block_keys(3, block_size=2)
    assert after[:2] == before and len(set(after)) == 3
    assert sequence.block_keys(1, block_size=2) == before[:1]
    assert make_sequence([1, 2, 3, 4, 5, 6]).block_keys(3, block_size=2) == after


def test_equal_tokens_under_other_rules_have_other_keys():
    sequences = [make_sequence([1, 2]), make_sequence([1, 2], rules=[LayerRouting(ffn=TOP_2)])]
    first, second = (sequence.block_keys(1, block_size=2) for sequence in sequences)
    assert first != second


def test_a_chunk_samples_when_it_reaches_the_last_known_token():
    sequence = make_sequence([1, 2, 3])
    assert not Chunk(sequence, 0, 2, 0).samples
    assert Chunk(sequence, 2, 1, 1).samples
