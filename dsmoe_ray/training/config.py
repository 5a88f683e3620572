"""One training run: its model, data, ranks, recipe and checkpoints. Pure data: imports no torch, no ray."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dsmoe_ray.config_io import Config
from dsmoe_ray.data.config import DataConfig
from dsmoe_ray.model.config import MoaConfig, ModelConfig, MoeConfig
from dsmoe_ray.parallel.config import ParallelConfig

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class RunConfig(Config):
    """What the run is called and where it leaves its files."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")]
    dir: str
    """The run directory, on a filesystem that every rank sees."""
    seed: NonNegativeInt = 0


class TrainedModelConfig(ModelConfig):
    """The model of a run, with where its first weights come from."""

    init_from: str | None = None
    """Artifact directory to start from (fine-tuning); by default weights are drawn from the seed."""


class TrainRoutingConfig(Config):
    """Which experts a token uses while training."""

    mode: Literal["dense", "top_k", "random_k", "anneal"] = "dense"
    """``top_k``: the sparse-trained baseline. ``random_k``: drawn per layer and step. ``anneal``: falls with time."""
    top_k: PositiveInt | None = None
    """For ``top_k`` the k; for ``random_k`` the least k; for ``anneal`` the last k."""
    start_step: NonNegativeInt = 0
    """For ``anneal``: the last step that is fully dense."""
    end_step: PositiveInt | None = None
    """For ``anneal``: the first step at ``top_k``."""

    @model_validator(mode="after")
    def _has_what_its_mode_needs(self) -> Self:
        if (self.mode == "dense") != (self.top_k is None):
            raise ValueError(f"training routing mode {self.mode!r} with top_k={self.top_k}: all but 'dense' need top_k")
        if (self.mode == "anneal") != (self.end_step is not None):
            raise ValueError(f"end_step goes with mode 'anneal' only; got mode={self.mode!r}, end_step={self.end_step}")
        if self.end_step is not None and self.end_step <= self.start_step:
            raise ValueError(f"end_step must be after start_step; got {self.end_step} and {self.start_step}")
        return self


class LossConfig(Config):
    """Weights of the losses beside next-token cross-entropy; each is summed over its layers."""

    mutual_information_attention: NonNegativeFloat = 0.0
    mutual_information_ffn: NonNegativeFloat = 0.0
    load_balance: NonNegativeFloat = 0.0
    """Switch load-balance loss on FFN routers, for the sparse-trained baseline."""
    router_z: NonNegativeFloat = 0.0
    """Square of the log-sum-exp of FFN router logits, for the sparse-trained baseline."""


class LrScheduleConfig(Config):
    """Learning rate over the run: warm-up, then cosine decay or a plateau with a final decay (WSD)."""

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    min_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Last learning rate over the peak."""
    decay_steps: PositiveInt | None = None
    """For ``wsd``: length of the final linear decay."""

    @model_validator(mode="after")
    def _decay_fits_the_kind(self) -> Self:
        if (self.kind == "wsd") != (self.decay_steps is not None):
            raise ValueError(f"decay_steps goes with kind 'wsd' only; got kind={self.kind!r}, {self.decay_steps}")
        return self


class TrainConfig(Config):
    """The recipe."""

    steps: PositiveInt
    seq_len: PositiveInt
    num_tokens_per_step: PositiveInt
    """Tokens of one optimizer step over all ranks; a multiple of ``seq_len``."""
    num_tokens_per_micro_step: PositiveInt | None = None
    """Tokens one rank holds at a time; a step accumulates as many micro-steps as needed. By default one."""
    lr: PositiveFloat
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of AdamW's running means of gradients and of their squares."""
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type; weights, gradients and optimizer state stay float32."""
    routing_ffn: TrainRoutingConfig = TrainRoutingConfig()
    routing_attention: TrainRoutingConfig = TrainRoutingConfig()
    loss: LossConfig = LossConfig()
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """``selective`` recomputes attention only; ``full`` recomputes whole blocks."""
    compile: bool = False
    """Run the trunk's element-wise parts through torch.compile."""
    eval_every: PositiveInt | None = None
    """Steps between reports of held-out loss, dense and sparse."""
    eval_tokens: PositiveInt = 32768
    """Held-out tokens used by one such report."""
    steps_per_call: PositiveInt = 5
    """Steps a shard runs per call of the coordinator."""
    max_nonfinite_steps: PositiveInt = 5
    """Consecutive steps with a non-finite loss after which the run stops."""


class CheckpointConfig(Config):
    """When the state of the run is saved and how much of it is kept."""

    every_steps: PositiveInt | None = None
    """Steps between checkpoints; one is always taken at the end and on SIGTERM."""
    keep: PositiveInt = 2


class DebugConfig(Config):
    """Switches for finding faults; all cost speed."""

    deterministic: bool = False
    force_balanced_routing: bool = False
    """Replace router probabilities by uniform ones; where experts are selected, tokens take them in turn."""
    detect_anomaly: bool = False
    profile_steps: tuple[NonNegativeInt, PositiveInt] | None = None
    """First and last step to profile; traces go to ``profile/`` in the run directory."""

    @model_validator(mode="after")
    def _profiles_forward_in_time(self) -> Self:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps must be [first, last] with first <= last; got {list(self.profile_steps)}")
        return self


class TrainingRunConfig(Config):
    """A whole run, as in the YAML file."""

    run: RunConfig
    model: TrainedModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    debug: DebugConfig = DebugConfig()

    @property
    def sequences_per_rank(self) -> int:
        """Sequences one rank reads per step."""
        return self.train.num_tokens_per_step // self.train.seq_len // self.parallel.world_size

    @property
    def sequences_per_micro_step(self) -> int:
        """Sequences one rank holds at a time."""
        tokens = self.train.num_tokens_per_micro_step
        return self.sequences_per_rank if tokens is None else tokens // self.train.seq_len

    @model_validator(mode="after")
    def _experts_can_be_shared_out(self) -> Self:
        ffn = self.model.ffn
        self.parallel.check_against(ffn.num_experts if isinstance(ffn, MoeConfig) else None)
        return self

    @model_validator(mode="after")
    def _batch_can_be_shared_out(self) -> Self:
        train, world = self.train, self.parallel.world_size
        if train.seq_len > self.model.max_seq_len:
            raise ValueError(f"train.seq_len={train.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}")
        if train.num_tokens_per_step % (train.seq_len * world):
            raise ValueError(
                f"train.num_tokens_per_step={train.num_tokens_per_step} is not a multiple of seq_len * ranks = "
                f"{train.seq_len} * {world}; use {_next_multiple(train.num_tokens_per_step, train.seq_len * world)}"
            )
        tokens = train.num_tokens_per_micro_step
        if tokens is not None and (tokens % train.seq_len or self.sequences_per_rank % (tokens // train.seq_len)):
            raise ValueError(
                f"train.num_tokens_per_micro_step={tokens} must be a multiple of seq_len={train.seq_len} that divides "
                f"the {self.sequences_per_rank * train.seq_len} tokens of one rank"
            )
        return self

    @model_validator(mode="after")
    def _training_routing_is_possible(self) -> Self:
        for name, routing, mixture in (
            ("routing_ffn", self.train.routing_ffn, self.model.ffn),
            ("routing_attention", self.train.routing_attention, self.model.attention),
        ):
            if routing.mode == "dense" or routing.top_k is None:
                continue
            if not isinstance(mixture, MoeConfig | MoaConfig):
                raise ValueError(f"train.{name}.mode={routing.mode!r} needs a mixture; model has kind={mixture.kind!r}")
            if routing.top_k > mixture.num_experts:
                raise ValueError(
                    f"train.{name}.top_k must be at most num_experts; got {routing.top_k} of {mixture.num_experts}"
                )
        return self


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of
