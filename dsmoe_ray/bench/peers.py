"""Our step against the whole training step of models in ``transformers`` that have the same shape, all experts on.

A peer runs as its own users would run it at its best: SDPA attention, no cache, no auxiliary loss, and the fastest of
its implementations of experts, found by trying each. It does not compute our router losses; we do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from dsmoe_ray.bench.measure import Measurement, compare_speed
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.sides import build_alone, make_tokens, synchronize
from dsmoe_ray.bench.workloads import WORKLOADS, Dtype, Workload, build_run
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.model.config import GqaConfig, MoaConfig, ModelConfig, MoeConfig
from dsmoe_ray.training.config import TrainConfig

# batched_mm copies an expert's weights for every token: with all experts on, more memory than machines have.
_EXPERT_IMPLEMENTATIONS = ("grouped_mm", "eager")


@dataclass(frozen=True)
class Peer:
    """A model class of transformers, and which of our models has its shape."""

    workload: str
    build_config: Callable[[ModelConfig], Any]
    model_class: Callable[[Any], Any]
    expert_implementations: Sequence[str | None]


class PeerSide:
    """A peer's training step: forward with loss, backward, clipping, AdamW."""

    def __init__(self, model: torch.nn.Module, workload: Workload, recipe: TrainConfig, device: torch.device) -> None:
        self.tokens_per_step = workload.num_tokens_per_step
        self._model, self._device, self._seq_len = model, device, workload.seq_len
        self._clip_norm = recipe.clip_norm
        self._data = make_tokens(workload.model.vocab_size)
        self._next_sample = 0
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def run(self, num_steps: int) -> float:
        """Do this many steps and return the seconds they took, all work on a GPU included."""
        synchronize(self._device)
        start_s = monotonic_s()
        for _ in range(num_steps):
            self._step()
        synchronize(self._device)
        return monotonic_s() - start_s

    def _step(self) -> None:
        num_sequences = self.tokens_per_step // self._seq_len
        samples = [self._data.read_sample(self._next_sample + i, self._seq_len).tokens for i in range(num_sequences)]
        self._next_sample = (self._next_sample + num_sequences) % (self._data.num_samples(self._seq_len) // 2)
        tokens_BS = torch.stack([torch.as_tensor(sample[:-1]) for sample in samples]).to(self._device)
        # Labels are the tokens themselves: transformers shifts them by one.
        self._model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def compare_with_peer(settings: Settings, *, peer: str, dtype: Dtype) -> Measurement:
    """Return our tokens/s over the peer's; same process, turn by turn."""
    chosen = _PEERS[peer]
    workload = WORKLOADS[chosen.workload]
    config = build_run(workload, dtype=dtype)
    device = torch.device(settings.device)
    transformers.logging.set_verbosity_error()
    implementation, trial_s = _find_fastest(chosen, workload, config.train, device, dtype)
    baseline = _build_side(chosen, implementation, workload, config.train, device, dtype)
    ours = build_alone(config, device=settings.device)
    found = compare_speed(ours, baseline, settings.turns())
    return replace(
        found,
        details={
            "dtype": dtype,
            "transformers": transformers.__version__,
            "experts_implementation": implementation or "its own loop",
            "seconds_per_step_by_implementation": trial_s,
        },
    )


def _find_fastest(
    peer: Peer, workload: Workload, recipe: TrainConfig, device: torch.device, dtype: Dtype
) -> tuple[str | None, dict[str, float]]:
    """Return the implementation of experts whose second step is shortest, and the time of each."""
    trial_s: dict[str | None, float] = {}
    for implementation in peer.expert_implementations:
        side = _build_side(peer, implementation, workload, recipe, device, dtype)
        side.run(1)
        trial_s[implementation] = side.run(1)
    fastest = min(trial_s, key=trial_s.__getitem__)
    return fastest, {str(name): duration_s for name, duration_s in trial_s.items() if name is not None}


def _build_side(
    peer: Peer, implementation: str | None, workload: Workload, recipe: TrainConfig, device: torch.device, dtype: Dtype
) -> PeerSide:
    config = peer.build_config(workload.model)
    config._attn_implementation = "sdpa"
    if implementation is not None:
        config._experts_implementation = implementation
    torch.manual_seed(0)
    # In bfloat16 a peer also keeps weights and optimizer state in it, the way transformers trains fastest; ours do not.
    model = peer.model_class(config).to(device=device, dtype=getattr(torch, dtype)).train()
    return PeerSide(model, workload, recipe, device)


def _granitemoe_config(model: ModelConfig) -> Any:
    attention, ffn = model.attention, model.ffn
    assert isinstance(attention, GqaConfig) and isinstance(ffn, MoeConfig)
    return transformers.GraniteMoeConfig(
        **_sizes(model),
        num_attention_heads=attention.num_heads,
        intermediate_size=ffn.d_ff,
        num_local_experts=ffn.num_experts,
        num_experts_per_tok=ffn.num_experts,
        attention_multiplier=attention.head_dim**-0.5,
        rms_norm_eps=model.norm_eps,
        output_router_logits=False,
    )


def _jetmoe_config(model: ModelConfig) -> Any:
    attention, ffn = model.attention, model.ffn
    assert isinstance(attention, MoaConfig) and isinstance(ffn, MoeConfig)
    return transformers.JetMoeConfig(
        **_sizes(model),
        kv_channels=attention.head_dim,
        intermediate_size=ffn.d_ff,
        num_local_experts=ffn.num_experts,
        num_experts_per_tok=ffn.num_experts,
        rms_norm_eps=model.norm_eps,
        output_router_logits=False,
    )


def _sizes(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.attention.num_kv_heads,
        "max_position_embeddings": model.max_seq_len,
        "tie_word_embeddings": model.tie_embeddings,
    }


_PEERS = {
    "granitemoe": Peer("granite", _granitemoe_config, transformers.GraniteMoeForCausalLM, _EXPERT_IMPLEMENTATIONS),
    "jetmoe": Peer("jetmoe", _jetmoe_config, transformers.JetMoeForCausalLM, (None,)),
}
