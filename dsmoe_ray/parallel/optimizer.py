"""The optimizer, and what must happen to gradients between the backward pass and its step.

FSDP2 and the exchange have already summed some gradients over some axes; ``reduce_gradients`` sums the rest, and the
norm counts every element of the model once, wherever it lies.
"""

from collections.abc import Iterator

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from dsmoe_ray.parallel.collectives import Transfer, all_reduce_sum_, start_all_reduce_sum_
from dsmoe_ray.parallel.mesh import World, axis_coordinates
from dsmoe_ray.parallel.sharding import is_expert_weight, plan_parameter

_BUCKET_BYTES = 32 * 2**20
# As torch.nn.utils.clip_grad_norm_ has it.
_NORM_EPS = 1e-6


def build_optimizer(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return a fused AdamW; norm scales do not decay.

    Its groups are the same for every mesh, and each holds either plain or sharded tensors, never both:
    experts, trunk matrices, norm scales.
    """
    groups: dict[str, list[nn.Parameter]] = {"experts": [], "matrices": [], "norms": []}
    for name, parameter in model.named_parameters():
        kind = "experts" if is_expert_weight(name) else "norms" if parameter.ndim == 1 else "matrices"
        groups[kind].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": 0.0 if kind == "norms" else weight_decay}
            for kind, parameters in groups.items()
            if parameters
        ],
        lr=lr,
        betas=betas,
        eps=eps,
        fused=True,
    )


@torch.no_grad()
def reduce_gradients(model: nn.Module, world: World) -> None:
    """Sum gradients over the axes on which nobody has yet, once the last micro-step is done.

    A missing gradient counts as zero, since its peers may have one.

    Raises:
        ExchangeError: a peer is dead, hung or unreachable.
    """
    by_axes: dict[tuple[str, ...], list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        axes = plan_parameter(name, world.config).reduce_axes
        if not axes:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_axes.setdefault(axes, []).append(_local(parameter.grad))
    # Buckets of all groups are under way at once.
    started = [bucket for axes, gradients in by_axes.items() for bucket in _start_buckets(gradients, world, axes)]
    for transfer, flat, gradients in started:
        transfer.wait()
        if flat is not None:
            _unflatten_into(gradients, flat)


@torch.no_grad()
def clip_grad_norm(model: nn.Module, world: World, max_norm: float) -> torch.Tensor:
    """Scale gradients so that their global norm is at most ``max_norm``; call it after ``reduce_gradients``.

    Returns:
        The norm before scaling over all parameters of the model, float32 scalar on the device, the same bits on every
        rank. When it is not finite the gradients are not usable, and the step must be skipped.

    Raises:
        ExchangeError: a peer is dead, hung or unreachable.
    """
    coordinates = axis_coordinates(world.config, world.rank)
    gradients, counted = [], []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        gradients.append(_local(parameter.grad))
        if plan_parameter(name, world.config).is_counted_on(coordinates):
            counted.append(gradients[-1])
    square = torch.zeros((), dtype=torch.float64, device=world.device)
    if counted:
        square += torch.stack(torch._foreach_norm(counted)).double().square().sum()
    norm = all_reduce_sum_(square, name="gradient norm").sqrt().float()
    torch._foreach_mul_(gradients, (max_norm / (norm + _NORM_EPS)).clamp(max=1.0))
    return norm


def _local(gradient: torch.Tensor) -> torch.Tensor:
    """Return the part of a gradient that lies here, sharing its memory."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


Bucket = tuple[Transfer, torch.Tensor | None, list[torch.Tensor]]
"""A sum under way, the flat tensor it is formed in (None: in place) and the gradients it is for."""


def _start_buckets(gradients: list[torch.Tensor], world: World, axes: tuple[str, ...]) -> Iterator[Bucket]:
    name = f"sum of gradients over {', '.join(axes)}"
    for bucket in _split_into_buckets(gradients):
        in_place = len(bucket) == 1 and bucket[0].is_contiguous()
        flat = bucket[0] if in_place else torch.cat([gradient.flatten() for gradient in bucket])
        yield start_all_reduce_sum_(flat, _group_over(world, axes), name), None if in_place else flat, bucket


def _split_into_buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    size_bytes = 0
    for gradient in gradients:
        if bucket and size_bytes + gradient.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size_bytes = [], 0
        bucket.append(gradient)
        size_bytes += gradient.nbytes
    if bucket:
        yield bucket


def _unflatten_into(gradients: list[torch.Tensor], flat: torch.Tensor) -> None:
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])


def _group_over(world: World, axes: tuple[str, ...]) -> distributed.ProcessGroup | None:
    """Return the ranks that differ along these axes only; None stands for all ranks."""
    covers_all = world.config.world_size == _product(getattr(world.config, axis) for axis in axes)
    if covers_all:
        return None
    if len(axes) > 1:
        raise ValueError(f"no process group spans exactly the axes {axes}")
    return world.group(axes[0])


def _product(values: Iterator[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result
