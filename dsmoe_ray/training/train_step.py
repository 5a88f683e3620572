"""One rank of a training run: its part of the model, its optimizer, and one optimizer step (start at ``run_step``).

Runs in any process, with peers or alone; knows no Ray. Everything that a resume needs is in ``checkpoint_state``.
"""

import math
from pathlib import Path
from typing import Any

import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.errors import CheckpointError, ConfigError, TrainingError
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.dispatch import TokenExchange
from dsmoe_ray.model.init import draw_initial
from dsmoe_ray.model.layer_routing import LayerRouting, deployed_routing
from dsmoe_ray.model.rope import compute_rotations
from dsmoe_ray.model.transformer import Transformer
from dsmoe_ray.parallel.collectives import all_reduce_sum_
from dsmoe_ray.parallel.exchange import build_exchange
from dsmoe_ray.parallel.fsdp import InitialValue, shard_model
from dsmoe_ray.parallel.mesh import World
from dsmoe_ray.parallel.optimizer import build_optimizer, clip_grad_norm, reduce_gradients
from dsmoe_ray.training.batches import Batch, BatchReader
from dsmoe_ray.training.checkpoint import State, collect_state, load_checkpoint
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.debug import StepProfiler, apply_debug_switches
from dsmoe_ray.training.metrics import EvalMetrics, StepMetrics
from dsmoe_ray.training.router_statistics import StepStatistics
from dsmoe_ray.training.schedule import compute_lr, compute_training_routing

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Trainer:
    """One rank's model, optimizer and place in the run."""

    def __init__(
        self, config: TrainingRunConfig, *, world: World, data: TokenShards, held_out: TokenShards | None = None
    ) -> None:
        self.config, self.world = config, world
        self.step = 0
        """Steps done, which is also the index of the next one."""
        self._nonfinite_steps = 0
        self._held_out, self._data_digest = held_out, data.stream_digest
        self._batches = BatchReader(config, data, rank=world.rank, device=world.device)
        self._exchange: TokenExchange = build_exchange(world)
        self.model = build_model(config, world)
        self._profiler = StepProfiler(config.debug, Path(config.run.dir), rank=world.rank)
        self.optimizer = build_optimizer(
            self.model,
            lr=config.train.lr,
            betas=config.train.betas,
            eps=config.train.eps,
            weight_decay=config.train.weight_decay,
        )

    def run_step(self) -> StepMetrics:
        """Do one optimizer step on the global batch; every rank calls it and gets the same result.

        Raises:
            TrainingError: the loss or gradient was not finite for ``max_nonfinite_steps`` steps in a row.
            ExchangeError: a peer is gone.
        """
        start_s = monotonic_s()
        self._profiler.before_step(self.step)
        train = self.config.train
        lr = compute_lr(self.step, train)
        routing = compute_training_routing(self.step, train, self.config.model, seed=self.config.run.seed)
        statistics = StepStatistics(self._all_reduce, world_size=self.world.world_size)
        batches = self._batches.read_step(self.step)
        num_targets = self._count_targets(batches)
        with torch.autograd.set_detect_anomaly(self.config.debug.detect_anomaly):
            for batch in batches:
                self._run_micro_step(batch, routing, statistics, num_targets)
        reduce_gradients(self.model, self.world)
        grad_norm = float(clip_grad_norm(self.model, self.world, train.clip_norm))
        loss = statistics.loss_sum / num_targets
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._profiler.after_step(self.step)
        self.step += 1
        self._count_nonfinite(skipped, batches[0])
        return self._describe_step(statistics, loss, grad_norm, lr=lr, skipped=skipped, start_s=start_s)

    def checkpoint_state(self) -> State:
        """Return everything a resume needs, as live tensors and plain numbers."""
        progress = {"step": self.step, "nonfinite_steps": self._nonfinite_steps, "data_digest": self._data_digest}
        return {**collect_state(self.model, self.optimizer), "progress": progress}

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint, saved on any number of ranks.

        Raises:
            CheckpointError: it is damaged, of another model, or of a run on other tokens.
        """
        state = self.checkpoint_state()
        load_checkpoint(path, state)
        if state["progress"]["data_digest"] != self._data_digest:
            raise CheckpointError(
                f"{path} is of a run on other tokens than data now gives, so samples would be repeated or skipped. "
                "Bring back the data of the run, or start a new run with model.init_from on this one's artifact."
            )
        self.step = state["progress"]["step"]
        self._nonfinite_steps = state["progress"]["nonfinite_steps"]

    @torch.no_grad()
    def evaluate(self) -> EvalMetrics:
        """Measure held-out loss with every expert on and as deployed; every rank calls it and gets the same result."""
        if self._held_out is None:
            raise ConfigError("there is no held-out text to evaluate on; prepare the data with a held-out share")
        model = self.config.model
        batches = self._batches.read_held_out(self._held_out)
        num_targets = self._count_targets(batches)
        losses = []
        for routing in ([LayerRouting()] * model.num_layers, deployed_routing(model)):
            statistics = StepStatistics(self._all_reduce, world_size=self.world.world_size)
            for batch in batches:
                self._forward(batch, routing, statistics)
            losses.append(statistics.loss_sum / num_targets)
        load_share = [] if statistics.ffn.sums_LX is None else statistics.ffn.load_share.tolist()
        return EvalMetrics(
            step=self.step, loss_dense=losses[0], loss_sparse=losses[1], tokens=num_targets, load_share=load_share
        )

    def _run_micro_step(
        self, batch: Batch, routing: list[LayerRouting], statistics: StepStatistics, num_targets: int
    ) -> None:
        train = self.config.train
        loss_sum, attention, ffn = self._forward(batch, routing, statistics)
        loss = loss_sum / num_targets
        router_loss = statistics.router_loss(attention, ffn, train.loss, num_tokens=train.num_tokens_per_step)
        (loss if router_loss is None else loss + router_loss).backward()

    def _forward(self, batch: Batch, routing: list[LayerRouting], statistics: StepStatistics) -> tuple[Any, Any, Any]:
        output = self.model(
            batch.tokens_BS,
            targets_BS=batch.targets_BS,
            document_ids_BS=batch.document_ids_BS,
            routing=routing,
            exchange=self._exchange,
        )
        statistics.add_micro_step(
            output.loss_sum, output.attention_routings, output.ffn_routings, num_tokens=batch.tokens_BS.numel()
        )
        return output.loss_sum, output.attention_routings, output.ffn_routings

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        all_reduce_sum_(tensor, name="router statistics")

    def _count_targets(self, batches: list[Batch]) -> int:
        """Return targets of the step over all ranks; only document boundaries make it differ from the token count."""
        if not self.config.data.document_boundaries:
            return sum(batch.tokens_BS.numel() for batch in batches) * self.world.world_size
        count = torch.stack([(batch.targets_BS >= 0).sum() for batch in batches]).sum().reshape(1)
        self._all_reduce(count)
        return max(int(count.item()), 1)

    def _count_nonfinite(self, skipped: bool, batch: Batch) -> None:
        self._nonfinite_steps = self._nonfinite_steps + 1 if skipped else 0
        if self._nonfinite_steps < self.config.train.max_nonfinite_steps:
            return
        layer = find_nonfinite_layer(self.model, batch, self._exchange)
        raise TrainingError(
            f"rank {self.world.rank}: loss or gradient was not finite for {self._nonfinite_steps} steps in a row, up "
            f"to step {self.step}; first non-finite output: {layer}. Lower train.lr, or raise "
            "train.lr_schedule.warmup_steps."
        )

    def _describe_step(
        self, statistics: StepStatistics, loss: float, grad_norm: float, *, lr: float, skipped: bool, start_s: float
    ) -> StepMetrics:
        attention, ffn = statistics.attention.summary(), statistics.ffn.summary()
        return StepMetrics(
            step=self.step,
            loss=loss,
            loss_total=loss + statistics.router_loss_value(self.config.train.loss),
            mi_attention=attention["mi"],
            mi_ffn=ffn["mi"],
            router_entropy_ffn=ffn["entropy"],
            load_balance=ffn["load_balance"],
            router_z=ffn["router_z"],
            balance=ffn["balance"],
            grad_norm=grad_norm,
            lr=lr,
            tokens=self.config.train.num_tokens_per_step,
            step_time_s=monotonic_s() - start_s,
            skipped=skipped,
        )


def build_model(config: TrainingRunConfig, world: World) -> Transformer:
    """Return this rank's part of the model, with weights from the seed or from ``model.init_from``.

    Raises:
        ArtifactError: the artifact to start from is damaged.
        ConfigError: it holds a model of another shape.
    """
    with torch.device("meta"):
        model = Transformer(
            config.model,
            compute_dtype=_DTYPES[config.train.dtype],
            activation_checkpointing=config.train.activation_checkpointing,
        )
    # Not a parameter, so it has no initial value to be placed with.
    model.cos, model.sin = compute_rotations(
        config.model.max_seq_len, config.model.attention.head_dim, config.model.rope_theta
    )
    shard_model(model, world, _initial_values(config))
    apply_debug_switches(model, config.debug)
    if config.train.compile:
        for block in model.blocks:
            block.compile_attention()  # type: ignore[operator]
    return model


def _initial_values(config: TrainingRunConfig) -> InitialValue:
    model, seed = config.model, config.run.seed
    if model.init_from is None:
        return lambda name, shape: draw_initial(name, shape, model, seed=seed)
    artifact = load_artifact(Path(model.init_from))
    differences = _differences(_identity(artifact.model_config), _identity(model))
    if differences:
        raise ConfigError(
            f"model.init_from={model.init_from} is another model than this run's: {'; '.join(differences)}. "
            "Give the model section the values of the artifact."
        )
    weights = artifact.load_state_dict(torch.float32)

    return lambda name, shape: weights[name]


def _identity(model: ModelConfig) -> dict[str, Any]:
    """Return what the same weights need to be the same function; fine-tuning may change how far positions reach."""
    inference = {"router": {"inference": True}}
    free = dict.fromkeys(("init_from", "init_std", "max_seq_len", "rope_theta"), True)
    return model.model_dump(mode="json", exclude={**free, "attention": inference, "ffn": inference})


def _differences(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(theirs.keys() | ours.keys()):
        left, right = theirs.get(key), ours.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key} is {left} there and {right} here")
    return found


def find_nonfinite_layer(model: Transformer, batch: Batch, exchange: TokenExchange) -> str:
    """Return where the first non-finite value appears in a forward pass; every rank calls it."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not torch.isfinite(hidden).all():
                found.append(name)

        return hook

    handles = [block.register_forward_hook(watch(f"layer {layer}")) for layer, block in enumerate(model.blocks)]
    handles.append(model.embedding.register_forward_hook(watch("the embedding")))
    handles.append(model.norm.register_forward_hook(watch("the last norm")))
    with torch.no_grad():
        loss_sum = model(batch.tokens_BS, targets_BS=batch.targets_BS, exchange=exchange).loss_sum
    for handle in handles:
        handle.remove()
    if not torch.isfinite(loss_sum):
        found.append("the output head")
    return found[0] if found else "none in the forward pass, so the gradient"
