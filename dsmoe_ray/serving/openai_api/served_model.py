"""What the gateway knows of the model it serves: names, tokens, limits, defaults. Reads no weights."""

import hashlib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmoe_ray.artifact.manifest import CHAT_TEMPLATE, GENERATION, MANIFEST
from dsmoe_ray.artifact.side_files import SideFiles, read_side_files
from dsmoe_ray.data.tokenizer import TextTokenizer
from dsmoe_ray.errors import ArtifactError, RequestError
from dsmoe_ray.inference.published_tokenizer import build_tokenizer
from dsmoe_ray.inference.sampling_config import SamplingConfig
from dsmoe_ray.serving.chat_template import ChatTemplate
from dsmoe_ray.serving.openai_api.errors import ApiError
from dsmoe_ray.serving.openai_api.routing import RequestRouting

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class ServedModel:
    """A published model as those see it who call the API."""

    def __init__(self, published: SideFiles, *, name: str | None = None) -> None:
        """Read what is published beside the weights.

        Raises:
            ArtifactError: the tokenizer, the chat template or the defaults for generation cannot be used.
        """
        self.name = name or published.directory.resolve().name
        self.config = published.model_config
        self.fingerprint = f"fp_{hashlib.sha256(published.manifest.to_bytes()).hexdigest()[:12]}"
        """Changes with the weights, or anything else of the model."""
        self.created_s = int((published.directory / MANIFEST).stat().st_mtime)
        self.tokenizer: TextTokenizer = build_tokenizer(published)
        self.chat_template: ChatTemplate | None = None
        if published.chat_template is not None:
            origin = str(published.directory / CHAT_TEMPLATE)
            self.chat_template = ChatTemplate(
                published.chat_template, self.tokenizer, origin=origin, bos_token=self._find_bos_token(published)
            )
        self.sampling_defaults = _read_sampling_defaults(published)
        """Fields of ``SamplingConfig`` where a request does not say."""
        self._longest_token_bytes = self.tokenizer.longest_token_bytes
        self.routing = RequestRouting(published.model_config)
        self.end_of_text = self.tokenizer.backend.id_to_token(self.tokenizer.end_of_text_id)

    def _find_bos_token(self, published: SideFiles) -> str:
        token_id = published.generation_config.get("bos_token_id", self.tokenizer.end_of_text_id)
        return (self.tokenizer.backend.id_to_token(token_id) if type(token_id) is int else None) or ""

    def encode(self, text: str, *, parse_special: bool | None = False) -> list[int]:
        """Return the tokens of a prompt.

        Args:
            text: Any text.
            parse_special: Whether names of special tokens are those tokens; None only if there is nothing else.
        """
        if parse_special is None and text in self.tokenizer.special_ids:
            return [self.tokenizer.special_ids[text]]
        if parse_special:
            return self.tokenizer.encode_with_special(text)
        return [int(token) for token in self.tokenizer.encode(text)]

    def count_tokens_at_least(self, text: str) -> int:
        """Return how many tokens a prompt has at least, by its length alone; 0 where that tells nothing."""
        return -(-len(text) // self._longest_token_bytes) if self._longest_token_bytes else 0

    def check_ids(self, ids: Sequence[Any], *, param: str) -> None:
        """Raise ``ApiError`` unless these are tokens of the model."""
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < self.config.vocab_size:
                raise ApiError(
                    f"{param} has {reprlib.repr(token_id)}, which is no token id; this model's ids are 0 to "
                    f"{self.config.vocab_size - 1}.",
                    param=param,
                )

    def name_token(self, token_id: int) -> str:
        """Return how an answer spells a token: its text, its name, or its bytes where they are no whole characters."""
        data = self.tokenizer.bytes_of(token_id)
        if not data:
            return self.tokenizer.backend.id_to_token(token_id) or ""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def load_served_model(directory: Path, *, name: str | None = None) -> ServedModel:
    """Return the model of an artifact; ``name`` is what clients call it, by default the directory's.

    Raises:
        ArtifactError: there is none, or it is damaged.
        DataError: its tokenizer cannot be used.
    """
    return ServedModel(read_side_files(directory), name=name)


def _read_sampling_defaults(published: SideFiles) -> dict[str, Any]:
    given = published.generation_config
    defaults = {name: given[name] for name in _SAMPLING_DEFAULTS if given.get(name) is not None}
    # The API's own default is to sample; other software writes 0 for all tokens.
    defaults.setdefault("temperature", 1.0)
    if defaults.get("top_k") == 0:
        del defaults["top_k"]
    try:
        SamplingConfig(**defaults)
    except RequestError as error:
        raise ArtifactError(f"{published.directory / GENERATION}: {error}. Write the artifact anew.") from error
    return defaults
