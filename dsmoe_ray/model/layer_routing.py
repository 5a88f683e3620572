"""The routing rules of each layer, as data: what a request may ask for and a runner obeys. Imports no torch."""

from typing import NamedTuple

from dsmoe_ray.model.config import GqaConfig, ModelConfig, MoeConfig, RoutingConfig

DENSE = RoutingConfig()
"""Every expert."""


class LayerRouting(NamedTuple):
    """The routing rules of one layer; none of them is a table of all layers."""

    attention: RoutingConfig = DENSE
    ffn: RoutingConfig = DENSE


def deployed_routing(config: ModelConfig) -> list[LayerRouting]:
    """Return the routing the model runs with at inference, per layer."""
    attention = DENSE if isinstance(config.attention, GqaConfig) else config.attention.router.inference
    ffn = config.ffn.router.inference if isinstance(config.ffn, MoeConfig) else DENSE
    return expand_routing(attention, ffn, num_layers=config.num_layers)


def expand_routing(attention: RoutingConfig, ffn: RoutingConfig, *, num_layers: int) -> list[LayerRouting]:
    """Return the rules of each layer from those of all layers."""
    return [LayerRouting(attention.at_layer(layer), ffn.at_layer(layer)) for layer in range(num_layers)]
