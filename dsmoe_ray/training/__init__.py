"""Dense training on Ray actors: coordinator, expert shards, one step, checkpoints. Knows no serving."""
