"""The routing rules of all layers, from what a person asks for.

A setting is one text: ``deployed``, ``dense``, a rule for the FFN (``top_k=8``), or rules by part, joined by a slash:
``attention:top_k=6/ffn:threshold=0.48``. A part that is not named runs as deployed.
"""

from typing import NamedTuple

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.model.config import MoaConfig, ModelConfig, MoeConfig, RoutingConfig, RoutingMode
from dsmoe_ray.model.layer_routing import DENSE, LayerRouting, expand_routing

DEPLOYED = "deployed"
RULES_HELP = "top_k=K, threshold=E, threshold_top_k=E, top_p=P or per_layer_top_k=K,K,... (one K a layer)"
ROUTING_HELP = (
    f"deployed (as the artifact says), dense (every expert), or a rule for the FFN experts: {RULES_HELP}. By part: "
    "attention:RULE/ffn:RULE, where a rule may also be dense; a part that is not named runs as deployed."
)


class PartRules(NamedTuple):
    """The rules of attention and FFN, each for all layers."""

    attention: RoutingConfig = DENSE
    ffn: RoutingConfig = DENSE


def resolve_routing(spec: str, config: ModelConfig) -> list[LayerRouting]:
    """Return the rules of each layer.

    Args:
        spec: ``deployed`` (as the artifact says), ``dense`` (every expert of attention and FFN), a rule for the FFN as
            ``RoutingConfig.parse`` reads it, with attention as deployed, or rules by part: ``attention:RULE/ffn:RULE``,
            one of them or both, a part left out as deployed.
        config: The model.

    Raises:
        ConfigError: it is no such text, or impossible with this model.
    """
    rules = _parse(spec.strip(), config)
    return expand_routing(rules.attention, rules.ffn, num_layers=config.num_layers)


def name_routing(spec: str, config: ModelConfig) -> str:
    """Return what a person calls a setting: what they wrote, and for ``deployed`` the rule that it stands for."""
    if spec.strip() != DEPLOYED:
        return spec.strip()
    deployed = deployed_rules(config)
    if deployed.attention.mode is RoutingMode.DENSE:
        return deployed.ffn.to_spec()
    return f"attention:{deployed.attention.to_spec()}/ffn:{deployed.ffn.to_spec()}"


def deployed_rules(config: ModelConfig) -> PartRules:
    """Return the rules that the model runs with unless told otherwise; dense for a part without a mixture."""
    parts = (config.attention, config.ffn)
    return PartRules(*(part.router.inference if isinstance(part, MoaConfig | MoeConfig) else DENSE for part in parts))


def _parse(spec: str, config: ModelConfig) -> PartRules:
    deployed = deployed_rules(config)
    if spec == DEPLOYED:
        return deployed
    if ":" in spec:
        return _parse_parts(spec, config)
    rule = RoutingConfig.parse(spec)
    if rule.mode is RoutingMode.DENSE:
        return PartRules()
    _check(rule, "ffn", spec, config)
    return deployed._replace(ffn=rule)


def _parse_parts(spec: str, config: ModelConfig) -> PartRules:
    found: dict[str, RoutingConfig] = {}
    for text in spec.split("/"):
        part, separator, rule = (piece.strip() for piece in text.partition(":"))
        if part not in PartRules._fields or not separator:
            raise ConfigError(f"routing {spec!r}: {text!r} is not attention:RULE or ffn:RULE, for example ffn:top_k=8.")
        if part in found:
            raise ConfigError(f"routing {spec!r} gives {part} twice; keep one.")
        found[part] = RoutingConfig.parse(rule)
        if found[part].mode is not RoutingMode.DENSE:
            _check(found[part], part, spec, config)
    return deployed_rules(config)._replace(**found)


def _check(rule: RoutingConfig, part: str, spec: str, config: ModelConfig) -> None:
    mixture = getattr(config, part)
    if not isinstance(mixture, MoaConfig | MoeConfig):
        kind = "one dense FFN" if part == "ffn" else "plain attention"
        raise ConfigError(f"routing {spec!r}: this model has {kind}, no experts to choose from. Use dense.")
    try:
        rule.check_against(mixture.num_experts, num_layers=config.num_layers)
    except ValueError as error:
        raise ConfigError(f"routing {spec!r}: {error}") from error
