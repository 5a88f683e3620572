"""Special tokens, chat template and what stands beside a tokenizer, in the forms that ``transformers`` has for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dsmoe_ray.artifact.hugging_face.checkpoint import read_object, read_text
from dsmoe_ray.artifact.manifest import CHAT_TEMPLATE, GENERATION
from dsmoe_ray.errors import ArtifactError

TOKENIZER_CONFIG = "tokenizer_config.json"
_ROLES = ("bos", "eos", "pad")


def special_token_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of the tokens that begin, end and pad a text, None where there is none.

    Without a key, ``transformers`` would take defaults that mean other tokens in another vocabulary.
    """
    return {f"{role}_token_id": fields.get(f"{role}_token_id") for role in _ROLES}


def describe_tokenizer(tokenizer_json: str, token_ids: Mapping[str, Any], *, max_seq_len: int) -> dict[str, Any]:
    """Return the fields of ``tokenizer_config.json``: the special tokens by their text.

    Raises:
        ArtifactError: the tokenizer is none, or lacks one of the tokens.
    """
    try:
        backend = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # The binding raises nothing narrower.
        raise ArtifactError(f"the artifact's tokenizer.json is not one of the `tokenizers` library: {error}") from error
    fields: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        # It would change spaces before punctuation, so that text does not come back as it was.
        "clean_up_tokenization_spaces": False,
    }
    for role in _ROLES:
        token_id = token_ids[f"{role}_token_id"]
        # A list names several tokens that end a text; the first is the one to write.
        first = token_id[0] if isinstance(token_id, list) and token_id else token_id
        fields[f"{role}_token"] = None if first is None else _text_of(backend, first, role)
    # Batches need one; nothing attends to padding, so any token will do.
    fields["pad_token"] = fields["pad_token"] or fields["eos_token"]
    return fields


def _text_of(backend: Tokenizer, token_id: Any, role: str) -> str:
    text = backend.id_to_token(token_id) if type(token_id) is int and 0 <= token_id < 1 << 32 else None
    if text is None:
        raise ArtifactError(
            f"generation_config.json names token {token_id!r} as {role}_token_id, which the tokenizer does not have."
        )
    return text


def read_generation_config(directory: Path, config: Mapping[str, Any], *, vocab_size: int) -> dict[str, Any]:
    """Return a model's defaults for generation; special tokens that they lack are those of its ``config.json``.

    Raises:
        ArtifactError: the file is damaged, or names a token that the model does not have.
    """
    fields = read_object(directory / GENERATION) or {}
    # What library wrote the file means nothing here.
    generation = {name: value for name, value in fields.items() if not name.startswith(("_", "transformers_"))}
    for name, value in special_token_ids({**config, **generation}).items():
        ids = value if isinstance(value, list) else [value]
        if value is None or ids == [-1]:
            # -1 is how some say that there is none.
            generation.pop(name, None)
            continue
        if not ids or not all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in ids):
            raise ArtifactError(f"{directory}: {name}={value!r:.80} is no token id below vocab_size={vocab_size}.")
        generation[name] = value
    return generation


def read_chat_template(directory: Path) -> str | None:
    """Return a model's chat template, from a file of its own or from ``tokenizer_config.json``; None without one.

    Raises:
        ArtifactError: a file is damaged.
    """
    template = read_text(directory / CHAT_TEMPLATE)
    if template is not None:
        return template
    path = directory / TOKENIZER_CONFIG
    found = (read_object(path) or {}).get("chat_template")
    if isinstance(found, list):
        # Several by name; the one that is used unless another is asked for.
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[0].get("template") if named else None
    if found is None:
        return None
    if not isinstance(found, str) or not _is_encodable(found):
        raise ArtifactError(f"{path}: chat_template must be text; found {found!r:.80}.")
    return found


def _is_encodable(text: str) -> bool:
    """Return whether a string is Unicode text; JSON may hold halves of characters that are not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
