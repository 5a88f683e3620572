"""Where the text of a run comes from and how it becomes samples. Pure data."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from dsmoe_ray.config_io import Config


class DataConfig(Config):
    """Text sources, tokenizer and packing."""

    paths: Annotated[list[str], Field(min_length=1)]
    """Files or directories. ``{stdlib}`` stands for the running Python's standard library."""
    format: Literal["text", "jsonl", "parquet"] = "text"
    include: str = "*"
    """Glob that a file found in a directory must match by name."""
    exclude: list[str] = []
    """Names of sub-directories to leave out."""
    field: str = "text"
    """JSONL key or parquet column that holds the text."""
    tokenizer: str | None = None
    """Path of a ``tokenizer.json``; by default a byte-level BPE of ``model.vocab_size`` is trained on the data."""
    held_out_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Share of documents kept for evaluation, chosen by a hash of their name (files) or content (rows)."""
    document_boundaries: bool = False
    """Tokens attend within their own document only, and no loss crosses from one to the next."""
    prepared_dir: str | None = None
    """Where token shards are kept; by default ``data`` in the run directory."""
    shard_tokens: PositiveInt = 16_777_216
    """Tokens in one shard file."""
