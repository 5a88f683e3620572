"""What a run takes over from the model it starts from, ``model.init_from``, beside the weights. Loads no torch."""

from pathlib import Path

from dsmoe_ray.artifact.manifest import TOKENIZER, read_manifest, read_side_file
from dsmoe_ray.data.sources import expand_path
from dsmoe_ray.data.tokenizer import load_tokenizer, parse_tokenizer
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.training.config import TrainingRunConfig


def adopt_tokenizer(config: TrainingRunConfig) -> TrainingRunConfig:
    """Return the run with the tokenizer of the model it starts from, whose embeddings mean nothing under another.

    Raises:
        ArtifactError: there is no artifact, or it is damaged.
        ConfigError: ``data.tokenizer`` is another tokenizer.
        DataError: a tokenizer cannot be read, or has ids beyond ``model.vocab_size``.
    """
    if config.model.init_from is None:
        return config
    directory = Path(config.model.init_from).expanduser().absolute()
    content = read_side_file(directory, TOKENIZER, read_manifest(directory)).decode()
    theirs = parse_tokenizer(content, source=str(directory / TOKENIZER), vocab_size=config.model.vocab_size)
    given = config.data.tokenizer
    if given is not None and load_tokenizer(expand_path(given)).digest != theirs.digest:
        raise ConfigError(
            f"data.tokenizer={given} is not the tokenizer of model.init_from={config.model.init_from}, so its ids "
            "would mean other tokens than the weights were trained on. Leave out data.tokenizer."
        )
    data = config.data.model_copy(update={"tokenizer": str(directory / TOKENIZER)})
    return config.model_copy(update={"data": data})
