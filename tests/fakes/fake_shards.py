"""Shards without processes: they answer at once, count steps, and fail where a test says so."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmoe_ray.durable import write_durably
from dsmoe_ray.training.checkpoint_commit import WrittenPart, staging_path
from dsmoe_ray.training.metrics import EvalMetrics, StepMetrics
from dsmoe_ray.training.run_directory import read_probe
from dsmoe_ray.training.shard_group import ShardDescription, ShardStatus
from dsmoe_ray.training.states import Replies


def make_metrics(step: int, *, loss: float | None = None, tokens: int = 128) -> StepMetrics:
    """Return a row whose loss tells its step."""
    return StepMetrics(
        step=step,
        loss=1.0 / step if loss is None else loss,
        loss_total=1.0,
        mi_attention=0.0,
        mi_ffn=0.0,
        router_entropy_ffn=0.0,
        load_balance=1.0,
        router_z=0.0,
        balance=1.0,
        grad_norm=1.0,
        lr=0.1,
        tokens=tokens,
        step_time_s=0.1,
        skipped=False,
    )


@dataclass
class FakeCall:
    """Carried out when first looked at; looked at again for as long as somebody does not answer."""

    carry_out: Callable[[], Replies]
    replies: Replies | None = None

    def poll(self, timeout_s: float) -> Replies:
        """Return the answers."""
        if self.replies is None or (self.replies.waiting and not self.replies.failed):
            self.replies = self.carry_out()
        return self.replies


@dataclass
class FakeShard:
    """One rank: alive or not, in a world or not, and its step."""

    alive: bool = True
    hangs: bool = False
    in_world: bool = False
    step: int = 0
    launches: int = 1


@dataclass
class FakeShards:
    """A group of them; ``dies_at``, ``hangs_at`` and ``raises_at`` say at which step what happens, once."""

    num_shards: int
    checkpoints: Path
    dies_at: dict[int, int] = field(default_factory=dict)
    hangs_at: dict[int, int] = field(default_factory=dict)
    raises_at: dict[int, Exception] = field(default_factory=dict)
    dies_when_asked: dict[str, int] = field(default_factory=dict)
    """Method to rank."""
    saves_wait: bool = False
    """A save never ends while this is set."""
    blind_ranks: tuple[int, ...] = ()
    """Ranks that do not see the run directory."""
    asked: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    shards: dict[int, FakeShard] = field(default_factory=dict)

    def launch(self, ranks: Sequence[int]) -> None:
        """Make fresh shards."""
        for rank in ranks:
            launches = self.shards[rank].launches + 1 if rank in self.shards else 1
            self.shards[rank] = FakeShard(launches=launches)

    def ask(self, method: str, *arguments: Any, ranks: Sequence[int] | None = None) -> FakeCall:
        """Have a call carried out when its answers are looked at."""
        self.asked.append((method, arguments))
        return FakeCall(lambda: self._carry_out(method, arguments, range(self.num_shards) if ranks is None else ranks))

    def close(self) -> None:
        """Do nothing."""

    def names_asked(self) -> list[str]:
        """Return the methods called so far, in order."""
        return [method for method, _ in self.asked]

    def _carry_out(self, method: str, arguments: tuple[Any, ...], ranks: Sequence[int]) -> Replies:
        if method in self.dies_when_asked:
            self.shards[self.dies_when_asked.pop(method)].alive = False
        lost = {rank: "killed" for rank in ranks if not self.shards[rank].alive}
        waiting = tuple(rank for rank in ranks if self.shards[rank].alive and self.shards[rank].hangs)
        live = [rank for rank in ranks if rank not in lost and rank not in waiting]
        return getattr(self, f"_{method}")(live, lost, waiting, *arguments)

    def _describe(self, live: list[int], lost: dict[int, str], waiting: tuple[int, ...], probe: Path) -> Replies:
        values = {
            rank: ShardDescription(
                "host", "10.0.0.1", "node", 100 + rank, 29500, None if rank in self.blind_ranks else read_probe(probe)
            )
            for rank in live
        }
        return Replies(values, lost=lost, waiting=waiting)

    def _join(self, live: list[int], lost: dict[int, str], waiting: tuple[int, ...], *where: Any) -> Replies:
        if lost or waiting:
            return Replies(lost=lost, cut_off=dict.fromkeys(live, "a rank did not arrive"), waiting=waiting)
        for rank in live:
            self.shards[rank].in_world, self.shards[rank].step = True, 0
        return Replies(dict.fromkeys(live))

    def _restore(
        self, live: list[int], lost: dict[int, str], waiting: tuple[int, ...], checkpoint: Path | None
    ) -> Replies:
        step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
        for rank in live:
            self.shards[rank].step = step
        return Replies(dict.fromkeys(live, step), lost=lost, waiting=waiting)

    def _run_steps(self, live: list[int], lost: dict[int, str], waiting: tuple[int, ...], num_steps: int) -> Replies:
        rows = []
        for _ in range(num_steps):
            step = self.shards[live[0]].step + 1 if live else 0
            lost, waiting, live = self._apply_script(step, live, lost, waiting)
            if step in self.raises_at:
                return Replies(errors=dict.fromkeys(live, self.raises_at.pop(step)))
            if lost or waiting or not all(self.shards[rank].in_world for rank in live):
                for rank in live:
                    self.shards[rank].in_world = False
                cut_off = {} if waiting else dict.fromkeys(live, "a peer is gone")
                return Replies(lost=lost, cut_off=cut_off, waiting=(*waiting, *live) if waiting else ())
            for rank in live:
                self.shards[rank].step = step
            rows.append(make_metrics(step))
        return Replies(dict.fromkeys(live, rows))

    def _apply_script(
        self, step: int, live: list[int], lost: dict[int, str], waiting: tuple[int, ...]
    ) -> tuple[dict[int, str], tuple[int, ...], list[int]]:
        if step in self.dies_at:
            rank = self.dies_at.pop(step)
            self.shards[rank].alive = False
            lost = {**lost, rank: "killed"}
        if step in self.hangs_at:
            rank = self.hangs_at.pop(step)
            self.shards[rank].hangs = True
            waiting = (*waiting, rank)
        return lost, waiting, [rank for rank in live if rank not in lost and rank not in waiting]

    def _evaluate(self, live: list[int], lost: dict[int, str], waiting: tuple[int, ...]) -> Replies:
        metrics = EvalMetrics(
            step=self.shards[0].step, loss_dense=1.0, loss_sparse=1.1, tokens=64, load_share=[[0.5, 0.5]]
        )
        return Replies(dict.fromkeys(live, metrics), lost=lost, waiting=waiting)

    def _start_checkpoint(self, live: list[int], lost: dict[int, str], waiting: tuple[int, ...], step: int) -> Replies:
        self._saving = step
        return Replies(dict.fromkeys(live), lost=lost, waiting=waiting)

    def _finish_checkpoint(self, live: list[int], lost: dict[int, str], waiting: tuple[int, ...]) -> Replies:
        if self.saves_wait:
            return Replies(waiting=tuple(live))
        parts = {}
        for rank in live:
            folder = staging_path(self.checkpoints, self._saving) / f"rank-{rank:05d}"
            folder.mkdir(parents=True)
            digest = write_durably(folder / "data", f"{self._saving}".encode())
            parts[rank] = WrittenPart(rank, {f"{folder.name}/data": digest}, 1, self.num_shards, {})
        return Replies(parts, lost=lost, waiting=waiting)

    def _leave(self, live: list[int], lost: dict[int, str], waiting: tuple[int, ...]) -> Replies:
        for rank in live:
            self.shards[rank].in_world = False
        return Replies(dict.fromkeys(live), lost=lost, waiting=waiting)

    def _ping(self, live: list[int], lost: dict[int, str], waiting: tuple[int, ...]) -> Replies:
        return Replies({rank: ShardStatus(self.shards[rank].step, None) for rank in live}, lost=lost, waiting=waiting)
