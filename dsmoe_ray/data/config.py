"""Where the text of a run comes from and how it becomes samples. Pure data."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, StringConstraints, model_validator

from dsmoe_ray.config_io import Config

TextFormat = Literal["text", "jsonl", "parquet"]


class DataConfig(Config):
    """Text sources, tokenizer and packing."""

    paths: Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1)]
    """Files or directories. ``{stdlib}`` stands for the running Python's standard library."""
    format: TextFormat = "text"
    """``text``: a file is a document; ``jsonl``: a line is one; ``parquet``: a row is one."""
    include: str = "*"
    """Glob that a file found in a directory must match by name. Hidden files and directories are left out."""
    exclude: list[str] = []
    """Names of sub-directories to leave out."""
    field: str = "text"
    """JSONL key or parquet column that holds the text."""
    tokenizer: str | None = None
    """Path of a ``tokenizer.json``; by default a byte-level BPE of ``model.vocab_size`` is trained on the data."""
    held_out_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Share of documents kept for evaluation, chosen by a hash of their name (files) or content (rows); of two or
    more files at least one."""
    document_boundaries: bool = False
    """Tokens attend within their own document only, and no loss crosses from one to the next."""
    prepared_dir: str | None = None
    """Where token shards are kept; by default ``data`` in the run directory."""
    shard_tokens: PositiveInt = 16_777_216
    """Tokens in one shard file."""

    @model_validator(mode="after")
    def _patterns_are_names(self) -> Self:
        # Both are compared with bare names, so one with a slash would silently match nothing.
        for key, patterns in (("include", [self.include]), ("exclude", self.exclude)):
            for pattern in patterns:
                if not pattern or "/" in pattern:
                    raise ValueError(f"{key} holds {pattern!r}; give a name without '/', as in '*.py' or 'tests'")
        return self
