"""``dsmoe generate ARTIFACT --prompt TEXT``: continue a prompt, printed while it is written."""

from pathlib import Path
from typing import Annotated

import typer

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.generation import Generator
from dsmoe_ray.inference.loading import load_engine
from dsmoe_ray.inference.routing import DEPLOYED, ROUTING_HELP, resolve_routing
from dsmoe_ray.inference.sampling_config import SamplingConfig


def command(
    artifact: Annotated[Path, typer.Argument(help="Directory of a published model.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    routing: Annotated[str, typer.Option(metavar="SPEC", help=ROUTING_HELP)] = DEPLOYED,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token; 1 samples from the model's probabilities.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many most likely tokens only.")] = None,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens with this share together.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given many times.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Continue a prompt; the text goes to standard output as it is written, its speed to standard error."""
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    published = load_artifact(artifact)
    rules = resolve_routing(routing, published.model_config)
    # One text at a time: room for the model's longest sequence is enough.
    generator = Generator(load_engine(published, EngineConfig(max_num_seqs=1)))
    generation = generator.generate(prompt, max_tokens=max_tokens, routing=rules, sampling=sampling, stop=stop or ())
    piece = ""
    for piece in generation:
        # echo flushes, so that each piece is seen at once also through a pipe.
        typer.echo(piece, nl=False)
    if not piece.endswith("\n"):
        typer.echo()
    typer.echo(
        f"{generation.num_tokens} tokens, {generation.tokens_per_s:.0f} tokens/s, "
        f"the first after {1000 * generation.prefill_s:.0f} ms",
        err=True,
    )
