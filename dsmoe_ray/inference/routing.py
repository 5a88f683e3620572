"""The routing rules of all layers, from what a person asks for."""

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.model.config import ModelConfig, MoeConfig, RoutingConfig, RoutingMode
from dsmoe_ray.model.transformer import LayerRouting, deployed_routing

DEPLOYED = "deployed"


def resolve_routing(spec: str, config: ModelConfig) -> list[LayerRouting]:
    """Return the rules of each layer.

    Args:
        spec: ``deployed`` (as the artifact says), ``dense`` (every expert of attention and FFN), or a rule for the FFN
            as ``RoutingConfig.parse`` reads it, with attention as deployed.
        config: The model.

    Raises:
        ConfigError: it is no such text, or impossible with this model.
    """
    deployed = deployed_routing(config)
    if spec.strip() == DEPLOYED:
        return deployed
    rule = RoutingConfig.parse(spec)
    if rule.mode is RoutingMode.DENSE:
        return [LayerRouting()] * config.num_layers
    if not isinstance(config.ffn, MoeConfig):
        raise ConfigError(f"routing {spec!r}: this model has one dense FFN, no experts to choose from. Use dense.")
    try:
        rule.check_against(config.ffn.num_experts)
    except ValueError as error:
        raise ConfigError(f"routing {spec!r}: {error}") from error
    return [LayerRouting(layer.attention, rule) for layer in deployed]


def name_routing(spec: str, config: ModelConfig) -> str:
    """Return what a person calls a setting: what they wrote, and for ``deployed`` the rule that it stands for."""
    if spec.strip() != DEPLOYED:
        return spec.strip()
    attention, ffn = deployed_routing(config)[0]
    if attention.mode is RoutingMode.DENSE:
        return ffn.to_spec()
    return f"attention {attention.to_spec()}, ffn {ffn.to_spec()}"
