"""A runner that computes nothing and checks everything a scheduler could get wrong about the KV cache."""

from dsmoe_ray.inference.batch import ForwardBatch


class FakeKvRunner:
    """Two layers over a paged cache. The first holds tokens, the second whole beginnings of sequences.

    As in a real model, what the second layer stores for a position depends on all positions before it: a block that is
    shared although the tokens before it differ, or one that was never filled or overwritten, is noticed by the next
    token that attends to it. A beginning is a number, another one for every other sequence of tokens and rules.
    """

    def __init__(self, *, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self._first_layer = {}
        self._second_layer = {}
        self._beginnings = {}

    def beginning_of(self, rules, tokens):
        """Return the number of a beginning."""
        number = self._number(tuple(rules))
        for token in tokens:
            number = self._number((number, token))
        return number

    def run(self, batch: ForwardBatch, *, fails=False) -> list[int]:
        """Return for every row of logits the beginning that ends with its token; or destroy what it writes to."""
        rows = [self._rows_of(batch, b) for b in range(batch.num_sequences)]
        written = [slot for slots, first, _ in rows for slot in slots[first:]]
        assert len(set(written)) == len(written), "two tokens are stored in one place"
        if fails:
            for slot in written:
                self._first_layer[slot] = self._second_layer[slot] = "half written"
            raise RuntimeError("the runner fails")
        for b, (slots, first, rules) in enumerate(rows):
            for position, row in enumerate(range(batch.query_starts[b], batch.query_starts[b + 1]), start=first):
                self._first_layer[slots[position]] = (rules, position, int(batch.token_ids_T[row]))
        beginnings = [self._attend_in_first_layer(*row) for row in rows]
        for (slots, first, _), numbers in zip(rows, beginnings, strict=True):
            self._second_layer.update(zip(slots[first:], numbers[first:], strict=True))
        for (slots, _, _), numbers in zip(rows, beginnings, strict=True):
            assert [self._second_layer.get(slot) for slot in slots] == numbers, "a block holds another beginning"
        by_row = [number for (_, first, _), numbers in zip(rows, beginnings, strict=True) for number in numbers[first:]]
        return [by_row[row] for row in batch.logits_rows_R]

    def _rows_of(self, batch, b):
        first = int(batch.first_positions_B[b])
        end = first + int(batch.query_starts[b + 1] - batch.query_starts[b])
        table = batch.block_tables[b].tolist()
        slots = [
            table[position // self.block_size] * self.block_size + position % self.block_size for position in range(end)
        ]
        assert all(0 <= block < self.num_blocks for block in table)
        return slots, first, batch.rules[batch.rule_idxs_B[b]]

    def _attend_in_first_layer(self, slots, _, rules):
        number, numbers = self._number(rules), []
        for position, slot in enumerate(slots):
            stored = self._first_layer.get(slot)
            assert stored is not None and stored[:2] == (rules, position), f"position {position} holds {stored}"
            number = self._number((number, stored[2]))
            numbers.append(number)
        return numbers

    def _number(self, beginning):
        return self._beginnings.setdefault(beginning, len(self._beginnings))
