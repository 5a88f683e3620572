"""The tokenizer of a published model, as everyone uses it who turns its texts into tokens. Imports no torch."""

from dsmoe_ray.artifact.side_files import SideFiles
from dsmoe_ray.data.tokenizer import TextTokenizer, parse_tokenizer


def build_tokenizer(published: SideFiles) -> TextTokenizer:
    """Return the tokenizer with the tokens that end a text.

    Raises:
        DataError: it is none, or does not fit the model.
    """
    return parse_tokenizer(
        published.tokenizer_json,
        source=f"the tokenizer of {published.directory}",
        vocab_size=published.model_config.vocab_size,
        end_ids=published.eos_token_ids,
    )
