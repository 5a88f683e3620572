"""Who owns which block of the KV cache, and which blocks hold keys and values that a new sequence can take over.

A block in use has one or more users and is never given out. A block without users is free: at once for the next
allocation, or, if it is registered in the prefix cache, after all others, the longest unused first. Knows block ids,
never their contents.

A full block is registered under a key: a hash over the routing rules, all token ids before it and its own. With exact
numerics keys and values are a function of exactly these, so equal keys mean equal contents. With fast numerics contents
agree to rounding, but for one rule: ``threshold_top_k`` takes its mean over a step's tokens, so a block holds what came
of the step that filled it. Computing its tokens again would not give the same either, as they would have other
neighbours; who needs that sets numerics to exact.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

# Collisions of half as many bits have to be found before two prompts could be mistaken for each other.
_KEY_BYTES = 32


def compute_root_key(rules_key: bytes) -> bytes:
    """Return the parent key of a sequence's first block under some routing rules."""
    return blake2b(rules_key, digest_size=_KEY_BYTES, person=b"dsmoe-kv-rules").digest()


def compute_block_key(parent_key: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the key of a full block from the key of the block before it, or the root key, and its token ids."""
    # Parents have one length, so that no token can pass for a part of a parent.
    return blake2b(
        parent_key + array("i", token_ids).tobytes(), digest_size=_KEY_BYTES, person=b"dsmoe-kv-block"
    ).digest()


class BlockPool:
    """A fixed number of blocks with reference counts and a prefix cache over those that are full."""

    def __init__(self, *, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_users = [0] * num_blocks
        # The lowest id is given first, so that a quiet engine stays in a small part of the memory.
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._unused_cached: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Return how many blocks can be allocated: those without users, registered or not."""
        return len(self._blank) + len(self._unused_cached)

    @property
    def num_cached(self) -> int:
        """Return how many blocks the prefix cache can find, with users or without."""
        return len(self._key_of)

    def allocate(self) -> int:
        """Give out a block with one user; what was registered in it longest without users goes first.

        Raises:
            IndexError: no block is free.
        """
        if self._blank:
            block = self._blank.pop()
        elif self._unused_cached:
            block, _ = self._unused_cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        else:
            raise IndexError(f"all {self.num_blocks} blocks of the KV cache are in use")
        self._num_users[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Take one user away from each of a sequence's blocks, given in their order."""
        # The end of a sequence is worth less than its beginning: nothing finds it once the beginning is gone.
        for block in reversed(blocks):
            assert self._num_users[block] > 0, f"block {block} has no user"
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                if block in self._key_of:
                    self._unused_cached[block] = None
                else:
                    self._blank.append(block)

    def register(self, block: int, key: bytes) -> bool:
        """Let others find a full block by its key; return False if another block already has that key."""
        if key in self._block_of:
            return False
        assert block not in self._key_of, f"block {block} has a key"
        self._block_of[key] = block
        self._key_of[block] = key
        return True

    def forget(self, block: int) -> None:
        """Let nobody find a block any more, as its contents are not what its key says."""
        del self._block_of[self._key_of.pop(block)]
        if block in self._unused_cached:
            del self._unused_cached[block]
            self._blank.append(block)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest beginning of ``keys`` that is registered, without becoming their user."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def count_unused(self, blocks: Iterable[int]) -> int:
        """Return how many of these blocks have no user: sharing them takes that many from the free ones."""
        return sum(self._num_users[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Become a user of each of these registered blocks."""
        for block in blocks:
            if self._num_users[block] == 0:
                del self._unused_cached[block]
            self._num_users[block] += 1
