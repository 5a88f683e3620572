"""Learning rate and training routing as pure functions of the step."""

import hashlib
import math

from dsmoe_ray.model.config import GqaConfig, ModelConfig, MoeConfig, RoutingConfig, RoutingMode
from dsmoe_ray.model.layer_routing import DENSE, LayerRouting
from dsmoe_ray.training.config import TrainConfig, TrainRoutingConfig


def compute_lr(step: int, config: TrainConfig) -> float:
    """Return the learning rate of the step with this index, 0 being the first."""
    schedule = config.lr_schedule
    if step < schedule.warmup_steps:
        return config.lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "wsd":
        decay_steps = schedule.decay_steps or 1
        done = (step - (config.steps - decay_steps)) / decay_steps
        return config.lr * (1.0 - (1.0 - schedule.min_ratio) * min(max(done, 0.0), 1.0))
    done = (step - schedule.warmup_steps) / max(config.steps - schedule.warmup_steps, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return config.lr * (schedule.min_ratio + (1.0 - schedule.min_ratio) * cosine)


def compute_training_routing(step: int, config: TrainConfig, model: ModelConfig, *, seed: int) -> list[LayerRouting]:
    """Return the rules every layer trains with in the step with this index."""
    attention_experts = 1 if isinstance(model.attention, GqaConfig) else model.attention.num_experts
    ffn_experts = model.ffn.num_experts if isinstance(model.ffn, MoeConfig) else 1
    return [
        LayerRouting(
            _rule(config.routing_attention, attention_experts, step, draw=f"{seed}:{step}:{layer}:attention"),
            _rule(config.routing_ffn, ffn_experts, step, draw=f"{seed}:{step}:{layer}:ffn"),
        )
        for layer in range(model.num_layers)
    ]


def _rule(config: TrainRoutingConfig, num_experts: int, step: int, *, draw: str) -> RoutingConfig:
    if config.top_k is None:
        return DENSE
    top_k = config.top_k
    if config.mode == "random_k":
        # Keyed by seed, step and layer: the same on every rank, and after a resume.
        number = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:8], "big")
        top_k += number % (num_experts - top_k + 1)
    if config.mode == "anneal":
        assert config.end_step is not None
        done = min(max((step - config.start_step) / (config.end_step - config.start_step), 0.0), 1.0)
        top_k = round(num_experts + done * (top_k - num_experts))
    return DENSE if top_k == num_experts else RoutingConfig(mode=RoutingMode.TOP_K, top_k=top_k)
