"""Reference counts of blocks and the prefix cache over them."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsmoe_ray.inference.block_pool import BlockPool, compute_block_key, compute_root_key

ROOT = compute_root_key(b"dense")


def keys_of(token_ids, *, block_size=2, root=ROOT):
    keys, parent = [], root
    for start in range(0, len(token_ids), block_size):
        parent = compute_block_key(parent, token_ids[start : start + block_size])
        keys.append(parent)
    return keys


def fill(pool, keys):
    blocks = [pool.allocate() for _ in keys]
    assert all(pool.register(block, key) for block, key in zip(blocks, keys, strict=True))
    return blocks


def test_every_block_is_given_once_and_then_none():
    pool = BlockPool(num_blocks=3)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(IndexError, match="all 3 blocks"):
        pool.allocate()


def test_a_released_block_can_be_given_again():
    pool = BlockPool(num_blocks=1)
    pool.release([pool.allocate()])
    assert pool.num_free == 1
    assert pool.allocate() == 0


def test_a_shared_block_is_free_only_after_its_last_user():
    pool = BlockPool(num_blocks=1)
    (block,) = fill(pool, keys_of([1, 2]))
    pool.share([block])
    pool.release([block])
    assert pool.num_free == 0
    pool.release([block])
    assert pool.num_free == 1


def test_a_block_without_users_stays_findable_until_its_memory_is_needed():
    pool = BlockPool(num_blocks=2)
    keys = keys_of([1, 2])
    blocks = fill(pool, keys)
    pool.release(blocks)
    assert pool.find(keys) == blocks and pool.num_free == 2
    # The blank block goes first.
    assert pool.allocate() == 1 and pool.find(keys) == blocks
    assert pool.allocate() == 0 and pool.find(keys) == [] and pool.num_cached == 0


def test_the_longest_unused_goes_first_and_of_a_sequence_its_end():
    pool = BlockPool(num_blocks=4)
    old, new = keys_of([1, 2, 3, 4]), keys_of([5, 6, 7, 8])
    old_blocks, new_blocks = fill(pool, old), fill(pool, new)
    pool.release(old_blocks)
    pool.release(new_blocks)
    # Being used again makes the old one the newest.
    pool.share(old_blocks)
    pool.release(old_blocks)
    assert [pool.allocate() for _ in range(4)] == [new_blocks[1], new_blocks[0], old_blocks[1], old_blocks[0]]


def test_only_the_beginning_of_a_prompt_is_found():
    pool = BlockPool(num_blocks=3)
    keys = keys_of([1, 2, 3, 4, 5, 6])
    blocks = fill(pool, keys)
    assert pool.find(keys) == blocks
    pool.forget(blocks[1])
    assert pool.find(keys) == blocks[:1]


def test_equal_tokens_under_other_rules_or_after_other_tokens_have_other_keys():
    assert keys_of([1, 2, 3, 4])[1] != keys_of([9, 2, 3, 4])[1]
    assert keys_of([1, 2])[0] != keys_of([1, 2], root=compute_root_key(b"top_k=2"))[0]
    assert keys_of([1, 2]) == keys_of([1, 2])


def test_the_first_block_with_a_key_keeps_it():
    pool = BlockPool(num_blocks=2)
    (key,) = keys_of([1, 2])
    (first,) = fill(pool, [key])
    second = pool.allocate()
    assert not pool.register(second, key)
    pool.release([second])
    assert pool.find([key]) == [first] and pool.num_cached == 1


def test_a_forgotten_block_is_found_by_nobody_and_freed_like_a_blank_one():
    pool = BlockPool(num_blocks=1)
    (key,) = keys_of([1, 2])
    (block,) = fill(pool, [key])
    pool.release([block])
    pool.forget(block)
    assert pool.find([key]) == [] and pool.num_free == 1 and pool.num_cached == 0
    assert pool.allocate() == block


def test_sharing_takes_unused_blocks_from_the_free_ones():
    pool = BlockPool(num_blocks=3)
    used, unused = fill(pool, keys_of([1, 2])), fill(pool, keys_of([3, 4]))
    pool.release(unused)
    assert pool.count_unused(used + unused) == 1
    num_free = pool.num_free
    pool.share(used + unused)
    assert pool.num_free == num_free - 1


class PoolAgainstAModel(RuleBasedStateMachine):
    """Random calls against a plain model: users of each block, key of each block."""

    NUM_BLOCKS = 5

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(num_blocks=self.NUM_BLOCKS)
        self.users = [0] * self.NUM_BLOCKS
        self.keys = {}

    @precondition(lambda self: 0 in self.users)
    @rule()
    def allocate(self):
        block = self.pool.allocate()
        assert self.users[block] == 0
        # A block that somebody could still find is only taken when no other is left.
        if block in self.keys:
            assert all(users or other in self.keys for other, users in enumerate(self.users))
        self.users[block] = 1
        self.keys.pop(block, None)

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def release(self, block):
        if self.users[block]:
            self.pool.release([block])
            self.users[block] -= 1

    @rule(block=st.integers(0, NUM_BLOCKS - 1), name=st.integers(0, 7))
    def register(self, block, name):
        if self.users[block] and block not in self.keys:
            key = bytes([name])
            assert self.pool.register(block, key) == (key not in self.keys.values())
            if key not in self.keys.values():
                self.keys[block] = key

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def share(self, block):
        if block in self.keys:
            self.pool.share([block])
            self.users[block] += 1

    @rule(block=st.integers(0, NUM_BLOCKS - 1))
    def forget(self, block):
        if block in self.keys:
            self.pool.forget(block)
            del self.keys[block]

    @invariant()
    def counts_agree(self):
        assert self.pool.num_free == self.users.count(0)
        assert self.pool.num_cached == len(self.keys)
        for block, key in self.keys.items():
            assert self.pool.find([key]) == [block]


TestPoolAgainstAModel = PoolAgainstAModel.TestCase
TestPoolAgainstAModel.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
