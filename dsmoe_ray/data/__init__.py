"""Text to memory-mapped token shards, read in a deterministic, resumable order. Knows no model."""
