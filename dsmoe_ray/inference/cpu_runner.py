"""The runner for CPUs, on compiled kernels: all layers in one call, or, where experts are elsewhere, one for the trunk
of each layer.

Weights are used where they lie, in the mapped files of the artifact. Numerics are exact in either mode: a kernel sums
each output in one order whatever else it computes; only the mean that ``threshold_top_k`` takes differs.

Shape suffixes: T tokens of a step, R rows whose logits are wanted, D model width, E experts, V vocabulary, G KV heads.
"""

from collections.abc import Generator
from typing import Any, Literal

import numpy as np
import torch

from dsmoe_ray.inference.batch import ForwardBatch
from dsmoe_ray.inference.cpu_experts import CpuExperts
from dsmoe_ray.inference.cpu_library import (
    BLOCK_SIZE,
    DTYPES,
    LayerWeights,
    Model,
    RouterWeights,
    load_kernels,
    point,
    reference,
)
from dsmoe_ray.inference.cpu_step import CpuStep
from dsmoe_ray.inference.int8_weights import Int8Model
from dsmoe_ray.inference.micro_batches import MIN_MICRO_BATCH_TOKENS, split_batch, take_turns
from dsmoe_ray.inference.sparse_experts import experts_of
from dsmoe_ray.model.attention import GqaAttention
from dsmoe_ray.model.config import GqaConfig, ModelConfig
from dsmoe_ray.model.dispatch import ExpertBackend
from dsmoe_ray.model.moe import DenseFfn
from dsmoe_ray.model.router import Router
from dsmoe_ray.model.transformer import Transformer


class CpuRunner:
    """A model on a CPU with its paged KV cache; see ``inference/runner.py``."""

    block_size = BLOCK_SIZE

    def __init__(
        self,
        model: Transformer,
        *,
        num_blocks: int,
        max_tokens: int,
        max_seqs: int,
        numerics: Literal["exact", "fast"] = "exact",
        num_threads: int | None = None,
        experts: ExpertBackend | None = None,
        min_micro_batch_tokens: int = MIN_MICRO_BATCH_TOKENS,
        int8: Int8Model | None = None,
    ) -> None:
        """Take the weights of ``model`` where they lie.

        Args:
            model: Its weights, float32 or bfloat16, decide what is computed in.
            num_blocks: Blocks of the KV cache.
            max_tokens: Most tokens of a step.
            max_seqs: Most sequences of a step.
            numerics: See ``EngineConfig``.
            num_threads: By default as many as PyTorch uses.
            experts: Where FFN experts are computed; by default here.
            min_micro_batch_tokens: Where they are elsewhere, steps of twice as many and more run as two micro-batches
                that take turns.
            int8: Stands in for the model's own matrices; keys and values are bfloat16 then.

        Raises:
            KernelsUnavailableError: the kernels cannot be built on this machine.
        """
        self.config, self.num_blocks = model.config, num_blocks
        num_threads = num_threads or torch.get_num_threads()
        dtype = torch.int8 if int8 else model.embedding.weight.dtype
        self._kernels = load_kernels()
        if experts is None:
            layers = int8.experts if int8 else experts_of(model)
            experts = CpuExperts(layers, max_tokens=max_tokens, num_threads=num_threads)
        self.experts = experts
        self._min_micro_batch_tokens = min_micro_batch_tokens
        self._mean_over_step = numerics == "fast"
        self._transformer, self._int8 = model, int8
        self._cache = _allocate_cache(model.config, num_blocks, torch.bfloat16 if int8 else dtype)
        self._model = _describe_model(model, self._cache, num_threads, mean_over_step=self._mean_over_step)
        if int8:
            _put_int8(int8, self._model)
        self._model_ref = reference(self._model)
        # Memory that is not written is not taken: the second one costs nothing where nothing takes turns.
        self._steps = [CpuStep(model.config, dtype, max_tokens=max_tokens, max_seqs=max_seqs) for _ in range(2)]

    @property
    def kv_cache_bytes(self) -> int:
        """Return the memory of all blocks."""
        return self._cache.nbytes

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute one step; see ``ModelRunner.run``."""
        logits_RV = torch.empty(len(batch.logits_rows_R), self.config.vocab_size)
        if isinstance(self.experts, CpuExperts):
            self._steps[0].take(batch)
            self._run_all_layers(self._steps[0], self.experts)
            self._finish(self._steps[0], batch, logits_RV)
            return logits_RV
        parts = split_batch(batch, min_tokens=self._min_micro_batch_tokens, mean_over_step=self._mean_over_step)
        steps = self._steps[: len(parts)]
        for step, part in zip(steps, parts, strict=True):
            step.take(part)
        take_turns([self._run_layers(step) for step in steps])
        outputs = logits_RV.split([len(part.logits_rows_R) for part in parts])
        for step, part, output in zip(steps, parts, outputs, strict=True):
            self._finish(step, part, output)
        return logits_RV

    def watch_routing(self) -> np.ndarray:
        """Return a number, ``(1,)`` float64, that grows by the seconds that routers, selection and grouping take."""
        routing_s = np.zeros(1)
        for step in self._steps:
            step.watch_routing(routing_s)
        if isinstance(self.experts, CpuExperts):
            self.experts.watch_routing(routing_s)
        return routing_s

    def _run_all_layers(self, step: CpuStep, experts: CpuExperts) -> None:
        """Run all layers in one call: with experts here there is nothing to wait for between two calls."""
        y_TD = torch.empty(step.num_tokens, self.config.d_model)
        step.take_outputs(y_TD)
        experts.bind(*step.expert_inputs(), y_TD)
        self._kernels.dsmoe_layers(self._model_ref, step.address, *experts.addresses)

    def _run_layers(self, step: CpuStep) -> Generator[None, None, None]:
        """Run the trunk of one layer after another, pausing while the experts of each work elsewhere."""
        x_TD, assignment = step.expert_inputs()
        self._kernels.dsmoe_embed(self._model_ref, step.address)
        for layer in range(self.config.num_layers):
            self._kernels.dsmoe_trunk(self._model_ref, step.address, layer)
            handle = self.experts.dispatch(layer, x_TD, assignment)
            yield
            # The next layer's trunk begins by adding it, in float32 whatever came.
            step.take_outputs(self.experts.combine(handle).float().contiguous())

    def _finish(self, step: CpuStep, batch: ForwardBatch, logits_RV: torch.Tensor) -> None:
        rows_R = np.ascontiguousarray(batch.logits_rows_R, np.int32)
        self._kernels.dsmoe_finish(self._model_ref, step.address, rows_R.ctypes.data, len(rows_R), logits_RV.data_ptr())


def count_block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the memory of one block of the KV cache, all layers together; heads are padded to whole vectors."""
    return (
        2 * config.num_layers * config.attention.num_kv_heads * BLOCK_SIZE * _padded_head_dim(config) * dtype.itemsize
    )


def _padded_head_dim(config: ModelConfig) -> int:
    return -(-config.attention.head_dim // BLOCK_SIZE) * BLOCK_SIZE


def _allocate_cache(config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (config.num_layers, 2, num_blocks, config.attention.num_kv_heads, BLOCK_SIZE * _padded_head_dim(config))
    # Zeros: channels that only pad a head are read with the others.
    return torch.zeros(shape, dtype=dtype)


def _describe_model(model: Transformer, cache: torch.Tensor, num_threads: int, *, mean_over_step: bool) -> Model:
    config = model.config
    attention = config.attention
    layers = (LayerWeights * config.num_layers)()
    for index, block in enumerate(model.blocks):
        layers[index] = _describe_layer(block, cache[index])
    head = model.embedding if model.head is None else model.head
    return Model(
        dtype=DTYPES[model.embedding.weight.dtype],
        d_model=config.d_model,
        num_layers=config.num_layers,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        heads_interleaved=not isinstance(attention, GqaConfig),
        vocab_size=config.vocab_size,
        num_threads=num_threads,
        mean_over_step=mean_over_step,
        norm_eps=config.norm_eps,
        cos=point(model.cos),
        sin=point(model.sin),
        layers=layers,
        embedding=point(model.embedding.weight),
        head=point(head.weight),
        norm=point(model.norm.weight),
    )


def _describe_layer(block: Any, cache: torch.Tensor) -> LayerWeights:
    attention = block.attention
    return LayerWeights(
        attention_norm=point(block.attention_norm.weight),
        ffn_norm=point(block.ffn_norm.weight),
        wq=point(attention.wq),
        wk=point(attention.wk),
        wv=point(attention.wv),
        wo=point(attention.wo),
        attention_router=_describe_router(None if isinstance(attention, GqaAttention) else attention.router),
        ffn_router=_describe_router(None if isinstance(block.ffn, DenseFfn) else block.ffn.router),
        k_cache=point(cache[0]),
        v_cache=point(cache[1]),
    )


def _describe_router(router: Router | None) -> RouterWeights:
    if router is None:
        return RouterWeights()
    return RouterWeights(
        hidden=None if router.hidden is None else point(router.hidden.weight),
        proj=point(router.proj.weight),
        d_hidden=router.config.d_hidden or 0,
        num_experts=router.proj.out_features,
        gate_scale=router.config.gate_scale,
        renormalize=router.config.gates == "renormalized",
    )


def _put_int8(int8: Int8Model, model: Model) -> None:
    """Put packed matrices in the place of a described model's own."""
    model.dtype = DTYPES[torch.int8]
    model.embedding = point(int8.embedding_VD)
    model.head, model.head_scales = point(int8.head.values), point(int8.head.scales)
    for index, trunk in enumerate(int8.trunk):
        layer = model.layers[index]
        for name in ("wq", "wk", "wv", "wo"):
            packed = getattr(trunk, name)
            setattr(layer, name, point(packed.values))
            setattr(layer, f"{name}_scales", point(packed.scales))
        for part in ("attention_router", "ffn_router"):
            hidden = getattr(trunk, f"{part}_hidden")
            getattr(layer, part).hidden = None if hidden is None else point(hidden)
