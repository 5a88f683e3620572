"""Everything of a published model but its weights: sizes, tokenizer, chat template, defaults. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_ray.artifact.manifest import (
    CHAT_TEMPLATE,
    GENERATION,
    TOKENIZER,
    ArtifactManifest,
    read_generation_config,
    read_manifest,
    read_model_config,
    read_side_file,
)
from dsmoe_ray.errors import ArtifactError
from dsmoe_ray.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class SideFiles:
    """The verified small files of an artifact; see ``read_side_files``."""

    directory: Path
    manifest: ArtifactManifest
    model_config: ModelConfig
    generation_config: dict[str, Any]
    """Defaults for generation, such as ``eos_token_id``."""
    tokenizer_json: str
    """Content of the verified ``tokenizer.json``."""
    chat_template: str | None
    """Jinja template that turns a conversation into a prompt, if the model has one."""

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a text, as the defaults for generation name them; empty if they do not.

        Raises:
            ArtifactError: they name what is no token of the model.
        """
        found = self.generation_config.get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < self.model_config.vocab_size:
                raise ArtifactError(
                    f"{self.directory / GENERATION}: eos_token_id={found!r:.80} is no token id below "
                    f"vocab_size={self.model_config.vocab_size}. Write the artifact anew."
                )
        return ids


def read_side_files(directory: Path) -> SideFiles:
    """Read and verify everything of an artifact but its weights and their index.

    Raises:
        ArtifactError: there is none, or it is damaged, incomplete or of an unknown format; names the file.
    """
    manifest = read_manifest(directory)
    return SideFiles(
        directory=directory,
        manifest=manifest,
        model_config=read_model_config(directory, manifest),
        generation_config=read_generation_config(directory, manifest),
        tokenizer_json=_read_text(directory, TOKENIZER, manifest),
        chat_template=_read_text(directory, CHAT_TEMPLATE, manifest) if CHAT_TEMPLATE in manifest.side_files else None,
    )


def _read_text(directory: Path, name: str, manifest: ArtifactManifest) -> str:
    try:
        return read_side_file(directory, name, manifest).decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{directory / name} is not UTF-8: {error}.") from error
