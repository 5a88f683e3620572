"""The runner in plain PyTorch: for a GPU, for a CPU without a compiler, and what compiled runners are held against.

Start at ``TorchRunner.start``. A step is laid out once (``step_plan.py``), then runs block by block; when a block has
sent its tokens to the experts it gives way, so that whoever drives two steps can let them take turns.

Shape suffixes: T tokens of the step, R rows whose logits are wanted, D model width, E experts, G KV heads, Q query
heads per KV head, d head_dim, V vocabulary.
"""

from collections.abc import Generator
from typing import Literal

import torch

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.inference.batch import ForwardBatch
from dsmoe_ray.inference.decode_graphs import Capture, DecodeGraphs, DecodeInputs
from dsmoe_ray.inference.expert_choice import Choice, TokenRules, choose
from dsmoe_ray.inference.micro_batches import MIN_MICRO_BATCH_TOKENS, split_batch, take_turns
from dsmoe_ray.inference.paged_attention import PagedKvCache
from dsmoe_ray.inference.row_math import ExactMath, FastMath, RowMath, rotate_exact
from dsmoe_ray.inference.sparse_experts import LocalExperts, experts_of
from dsmoe_ray.inference.step_plan import RuleShapes, StepPlan, StepPlanner, deal_rules, plan_decoding
from dsmoe_ray.model.attention import GqaAttention
from dsmoe_ray.model.dispatch import ExpertBackend
from dsmoe_ray.model.moa import MixtureOfAttention, gate_heads
from dsmoe_ray.model.moe import DenseFfn
from dsmoe_ray.model.rope import Rotate
from dsmoe_ray.model.router import Router
from dsmoe_ray.model.transformer import Block, Transformer


class TorchRunner:
    """A ``ModelRunner`` for the device that the model is on."""

    def __init__(
        self,
        model: Transformer,
        *,
        num_blocks: int,
        block_size: int,
        numerics: Literal["exact", "fast"],
        experts: ExpertBackend | None = None,
        max_graph_seqs: int = 64,
        min_micro_batch_tokens: int = MIN_MICRO_BATCH_TOKENS,
    ) -> None:
        """Take memory for keys and values.

        Args:
            model: Its weights are used in place where they are in its compute type.
            num_blocks: Blocks of the KV cache.
            block_size: Positions in one block.
            numerics: ``exact`` makes a row's result independent of its batch, bit by bit; on a CPU.
            experts: Who runs FFN experts; by default this process.
            max_graph_seqs: On a GPU and with experts here, up to so many decoding sequences replay a CUDA graph.
            min_micro_batch_tokens: With experts elsewhere, steps of twice as many and more run as two micro-batches
                that take turns.

        Raises:
            ConfigError: exact numerics on another device than a CPU.
        """
        device = model.embedding.weight.device
        if numerics == "exact" and device.type != "cpu":
            raise ConfigError(
                f"numerics 'exact' is computed on a CPU; the model is on {device}. Use 'fast', or load it to the CPU."
            )
        self.config, self.block_size, self.num_blocks = model.config, block_size, num_blocks
        self._model = model
        self._math: RowMath = ExactMath() if numerics == "exact" else FastMath()
        self._cache = PagedKvCache(
            model.config, num_blocks=num_blocks, block_size=block_size, dtype=model.compute_dtype, device=device
        )
        self._experts = LocalExperts(experts_of(model), numerics=self._math) if experts is None else experts
        self._min_micro_batch_tokens = None if experts is None else min_micro_batch_tokens
        self._planner = StepPlanner(model.config, self._cache, self._math, device)
        self._static_experts = LocalExperts(experts_of(model), numerics=self._math, static_shapes=True)
        self._graphs: DecodeGraphs | None = None
        if device.type == "cuda" and experts is None and max_graph_seqs:
            self._graphs = self.build_graphs(max_graph_seqs)

    @property
    def kv_cache_bytes(self) -> int:
        """Return the memory of all blocks, filled or not."""
        return self._cache.size_bytes

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute one step and return its logits ``(R, V)``, float32 on the CPU."""
        if self._graphs is not None and self._graphs.takes(batch):
            return self._graphs.run(batch, self._planner.find_rule_table(batch.rules)).cpu()
        parts = [batch]
        if self._min_micro_batch_tokens is not None:
            mean_over_step = isinstance(self._math, FastMath)
            parts = split_batch(batch, min_tokens=self._min_micro_batch_tokens, mean_over_step=mean_over_step)
        logits = take_turns([self.start(part) for part in parts])
        return (logits[0] if len(logits) == 1 else torch.cat(logits)).cpu()

    @torch.inference_mode()
    def start(self, batch: ForwardBatch) -> Generator[None, None, torch.Tensor]:
        """Compute one step, giving way after each block's tokens went to its experts; return logits ``(R, V)``."""
        return (yield from self._compute(self._planner.plan(batch), self._experts, shrink=True))

    @torch.inference_mode()
    def decode(self, inputs: DecodeInputs, shapes: RuleShapes) -> torch.Tensor:
        """Compute a step of decoding sequences; return logits ``(B, V)``.

        A plain function of tensors: it asks the device nothing, and no shape in it depends on a value.
        """
        token_ids_B, positions_B, slots_B = inputs.tokens_3B
        attending = plan_decoding(
            self._cache, inputs.block_tables_BM, positions_B + 1, num_blocks=inputs.block_tables_BM.shape[1]
        )
        rules = deal_rules(shapes, inputs.numbers)
        plan = StepPlan(token_ids_B, positions_B, slots_B, (attending,), rules, None)
        return finish(self._compute(plan, self._static_experts, shrink=False))

    def build_graphs(self, max_seqs: int, capture: Capture | None = None) -> DecodeGraphs:
        """Return graphs of ``decode``, none recorded yet."""
        max_blocks = -(-self.config.max_seq_len // self.block_size)
        return DecodeGraphs(self.decode, self._cache, max_seqs=max_seqs, max_blocks=max_blocks, capture=capture)

    def _compute(self, plan: StepPlan, experts: ExpertBackend, *, shrink: bool) -> Generator[None, None, torch.Tensor]:
        """Run the blocks.

        Args:
            plan: The step.
            experts: Who runs FFN experts.
            shrink: Ask the device how many experts tokens use where rules leave it open.
        """
        model = self._model
        rotations = (model.cos[plan.positions_T][:, None], model.sin[plan.positions_T][:, None])
        x_TD = model.embedding(plan.token_ids_T).to(model.compute_dtype)
        for layer, (block, rules) in enumerate(zip(model.blocks, plan.rules, strict=True)):
            assert isinstance(block, Block)
            x_TD = x_TD + self._attend(layer, block, x_TD, plan, rotations)
            normed_TD = block.ffn_norm(x_TD)
            if isinstance(block.ffn, DenseFfn):
                x_TD = x_TD + self._feed(block.ffn, normed_TD)
                continue
            assert rules.ffn is not None
            choice = self._choose(block.ffn.router, normed_TD, rules.ffn)
            handle = experts.dispatch(layer, normed_TD, choice.assignment(shrink=shrink))
            yield
            x_TD = x_TD + experts.combine(handle).to(x_TD.dtype)
        if plan.logits_rows_R is not None:
            x_TD = x_TD.index_select(0, plan.logits_rows_R)
        head = model.embedding if model.head is None else model.head
        hidden_RD = model.norm(x_TD)
        return self._math.linear(hidden_RD, head.weight.to(hidden_RD.dtype)).float()

    def _attend(
        self, layer: int, block: Block, x_TD: torch.Tensor, plan: StepPlan, rotations: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        attention, normed_TD = block.attention, block.attention_norm(x_TD)
        num_kv_heads = attention.config.num_kv_heads
        k_TGd, v_TGd = (
            self._linear(normed_TD, weight).unflatten(1, (num_kv_heads, -1)) for weight in (attention.wk, attention.wv)
        )
        self._cache.write(layer, plan.write_slots_T, self._rotate(k_TGd, rotations), v_TGd)
        if isinstance(attention, GqaAttention):
            q_THd = self._rotate(
                self._linear(normed_TD, attention.wq).unflatten(1, (attention.config.num_heads, -1)), rotations
            )
            out_TGQd = self._attend_all(layer, q_THd.unflatten(1, (num_kv_heads, -1)), plan)
            return self._linear(out_TGQd.flatten(1), attention.wo.t())
        rules = plan.rules[layer].attention
        assert isinstance(attention, MixtureOfAttention) and rules is not None
        gates_TE = self._choose(attention.router, normed_TD, rules).all_gates()
        q_TD = self._linear(normed_TD, attention.wq.flatten(0, 1))
        q_THd = self._rotate(q_TD.unflatten(1, (attention.config.num_heads, -1)), rotations)
        q_TGEd = q_THd.unflatten(1, (-1, num_kv_heads)).transpose(1, 2)
        out_TEGd = self._attend_all(layer, q_TGEd, plan).transpose(1, 2)
        gated_TW = gate_heads(out_TEGd[None], gates_TE[None])[0]
        return self._linear(gated_TW, attention.wo.flatten(0, 1).t())

    def _attend_all(self, layer: int, q_TGQd: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        out_TGQd = torch.zeros_like(q_TGQd, memory_format=torch.contiguous_format)
        for attending in plan.attending:
            attending.attend(self._cache, layer, q_TGQd, out_TGQd)
        return out_TGQd

    def _feed(self, ffn: DenseFfn, x_TD: torch.Tensor) -> torch.Tensor:
        linear = None if ffn.w3 is None else self._linear(x_TD, ffn.w3)
        return self._linear(self._math.activate(self._linear(x_TD, ffn.w1), linear), ffn.w2.t())

    def _choose(self, router: Router, x_TD: torch.Tensor, rules: TokenRules) -> Choice:
        hidden = x_TD if router.hidden is None else self._math.silu(self._linear(x_TD, router.hidden.weight))
        probs_TE = self._linear(hidden.float(), router.proj.weight).softmax(dim=-1)
        return choose(
            probs_TE,
            rules,
            renormalize=router.config.gates == "renormalized",
            gate_scale=router.config.gate_scale,
            exact=isinstance(self._math, ExactMath),
        )

    def _linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        return self._math.linear(x_TK, weight_NK.to(x_TK.dtype))

    def _rotate(self, x_THd: torch.Tensor, rotations: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if isinstance(self._math, ExactMath):
            return rotate_exact(x_THd, *rotations)
        return Rotate.apply(x_THd, *rotations)


def finish(step: Generator[None, None, torch.Tensor]) -> torch.Tensor:
    """Drive a step alone to its end."""
    while True:
        try:
            next(step)
        except StopIteration as end:
            return end.value
