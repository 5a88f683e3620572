"""Block and model. The forward pass is a loop over blocks; the loss is computed inside it, so that whoever shards the
weights sees one forward call.

Shape suffixes: B sequences, S positions, T = B * S tokens, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dsmoe_ray.model.attention import AttentionContext, GqaAttention, build_document_mask
from dsmoe_ray.model.config import GqaConfig, ModelConfig, MoeConfig
from dsmoe_ray.model.dispatch import LOCAL_EXCHANGE, TokenExchange
from dsmoe_ray.model.layer_routing import LayerRouting
from dsmoe_ray.model.losses import linear_cross_entropy
from dsmoe_ray.model.moa import MixtureOfAttention
from dsmoe_ray.model.moe import DenseFfn, MixtureOfExperts
from dsmoe_ray.model.norm import RmsNorm
from dsmoe_ray.model.rope import compute_rotations
from dsmoe_ray.model.router import Routing


class ModelOutput(NamedTuple):
    """What a forward pass returns; a layer without a mixture has no entry in the routings."""

    logits_BSV: torch.Tensor | None
    """Float32; None when targets were given."""
    loss_sum: torch.Tensor | None
    """Summed next-token loss in nats; None without targets."""
    attention_routings: list[Routing]
    ffn_routings: list[Routing]


class Block(nn.Module):
    """Attention, then feed-forward, each on a normed copy of the residual stream."""

    def __init__(self, config: ModelConfig, *, recompute_attention: bool) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.d_model, config.norm_eps)
        self.ffn_norm = RmsNorm(config.d_model, config.norm_eps)
        self.attention: GqaAttention | MixtureOfAttention
        if isinstance(config.attention, GqaConfig):
            self.attention = GqaAttention(config.attention, d_model=config.d_model)
        else:
            self.attention = MixtureOfAttention(config.attention, d_model=config.d_model)
        self.ffn: MixtureOfExperts | DenseFfn
        if isinstance(config.ffn, MoeConfig):
            self.ffn = MixtureOfExperts(config.ffn, d_model=config.d_model)
        else:
            self.ffn = DenseFfn(config.ffn, d_model=config.d_model)
        self.recompute_attention = recompute_attention
        self._run_attention: Callable[..., tuple[torch.Tensor, Routing | None]] = self._attend

    def forward(
        self, x_BSD: torch.Tensor, context: AttentionContext, routing: LayerRouting, exchange: TokenExchange
    ) -> tuple[torch.Tensor, Routing | None, Routing | None]:
        """Return the residual stream and the routings of attention and FFN."""
        if self.recompute_attention:
            attended, attention_routing = checkpoint(self._run_attention, x_BSD, context, routing, use_reentrant=False)
        else:
            attended, attention_routing = self._run_attention(x_BSD, context, routing)
        x_BSD = x_BSD + attended
        normed = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, DenseFfn):
            return x_BSD + self.ffn(normed), attention_routing, None
        fed, ffn_routing = self.ffn(normed, routing.ffn, exchange)
        return x_BSD + fed, attention_routing, ffn_routing

    def compile_attention(self) -> None:
        """Run the attention half, whose many small operations torch.compile fuses, as compiled code from now on."""
        self._run_attention = torch.compile(self._attend)

    def _attend(
        self, x_BSD: torch.Tensor, context: AttentionContext, routing: LayerRouting
    ) -> tuple[torch.Tensor, Routing | None]:
        normed = self.attention_norm(x_BSD)
        if isinstance(self.attention, GqaAttention):
            return self.attention(normed, context), None
        return self.attention(normed, context, routing.attention)


class Transformer(nn.Module):
    """Decoder-only language model. Weights are uninitialised; see ``model/init.py`` and ``artifact/load.py``."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32, activation_checkpointing: str = "none"
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.recompute_blocks = activation_checkpointing == "full"
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        selective = activation_checkpointing == "selective"
        self.blocks = nn.ModuleList(Block(config, recompute_attention=selective) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        cos, sin = compute_rotations(config.max_seq_len, config.attention.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        *,
        targets_BS: torch.Tensor | None = None,
        positions_BS: torch.Tensor | None = None,
        document_ids_BS: torch.Tensor | None = None,
        routing: Sequence[LayerRouting] | None = None,
        exchange: TokenExchange = LOCAL_EXCHANGE,
        last_logits_only: bool = False,
    ) -> ModelOutput:
        """Run all layers.

        Args:
            tokens_BS: Token ids ``(B, S)``.
            targets_BS: Next tokens; given, the summed loss is returned in place of logits. ``-100`` is ignored.
            positions_BS: Position of each token; by default 0, 1, ...
            document_ids_BS: Tokens attend within equal ids only.
            routing: Rules of each layer; by default every expert is on.
            exchange: How tokens meet FFN experts.
            last_logits_only: Return logits of the last position, ``(B, 1, V)``; not together with targets.

        Raises:
            ValueError: the sequence is too long, or targets were given with ``last_logits_only``.
        """
        if last_logits_only and targets_BS is not None:
            raise ValueError("last_logits_only returns logits and targets_BS a loss over all positions; give only one")
        context = self._attention_context(tokens_BS, positions_BS, document_ids_BS)
        rules = routing if routing is not None else [LayerRouting()] * self.config.num_layers
        x_BSD = self.embedding(tokens_BS).to(self.compute_dtype)
        attention_routings, ffn_routings = [], []
        for block, rule in zip(self.blocks, rules, strict=True):
            x_BSD, attention_routing, ffn_routing = self._run_block(block, x_BSD, context, rule, exchange)
            attention_routings += [attention_routing] if attention_routing is not None else []
            ffn_routings += [ffn_routing] if ffn_routing is not None else []
        hidden_BSD = self.norm(x_BSD[:, -1:] if last_logits_only else x_BSD)
        weight_VD = (self.embedding if self.head is None else self.head).weight.to(hidden_BSD.dtype)
        if targets_BS is not None:
            loss_sum = linear_cross_entropy(hidden_BSD.flatten(0, 1), weight_VD, targets_BS.flatten())
            return ModelOutput(None, loss_sum, attention_routings, ffn_routings)
        logits_BSV = functional.linear(hidden_BSD, weight_VD)
        return ModelOutput(
            logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32)), None, attention_routings, ffn_routings
        )

    def _run_block(self, block: nn.Module, *arguments: Any) -> tuple[torch.Tensor, Routing | None, Routing | None]:
        if self.recompute_blocks and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _attention_context(
        self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None, document_ids_BS: torch.Tensor | None
    ) -> AttentionContext:
        mask = None if document_ids_BS is None else build_document_mask(document_ids_BS)
        if positions_BS is not None:
            return AttentionContext(self.cos[positions_BS][:, :, None], self.sin[positions_BS][:, :, None], mask)
        num_positions = tokens_BS.shape[1]
        if num_positions > self.config.max_seq_len:
            raise ValueError(
                f"{num_positions} positions exceed max_seq_len={self.config.max_seq_len}; shorten the sequence or "
                "raise model.max_seq_len"
            )
        return AttentionContext(self.cos[None, :num_positions, None], self.sin[None, :num_positions, None], mask)
