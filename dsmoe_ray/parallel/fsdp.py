"""Apply the sharding plan to a model: expert slices as DTensors on ``ep``, FSDP2 where data parallelism shards.

A rank works block by block: it takes the full value of each parameter, keeps its slice on its device and lets go of the
rest, so that host memory holds the full values of one block at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from dsmoe_ray.model.moe import MixtureOfExperts
from dsmoe_ray.model.transformer import Block, Transformer
from dsmoe_ray.parallel.mesh import World, build_trunk_mesh
from dsmoe_ray.parallel.sharding import is_expert_weight, plan_parameter

InitialValue = Callable[[str, torch.Size], torch.Tensor]
"""A parameter's name and full shape to its full value on the CPU, the same on every rank."""


def shard_model(model: Transformer, world: World, initial: InitialValue | None = None) -> None:
    """Move a model to this rank's device, keeping only what the plan puts here.

    Args:
        model: Unsharded, on the CPU. With ``initial`` its parameters may be uninitialised, or on ``meta``.
        world: Says which ranks there are and which one this is.
        initial: Gives every parameter's full value; by default the model's own, which must be equal on every rank.
    """
    sharding = _Sharding(model, world)
    for index, block in enumerate(model.blocks):
        _place_parameters(model, world, initial, prefix=f"blocks.{index}.")
        sharding.apply_to_block(block)
    _place_parameters(model, world, initial, prefix="")
    for name, buffer in list(model.named_buffers()):
        owner, leaf = _locate(model, name)
        setattr(owner, leaf, buffer.to(world.device))
    sharding.apply_to_root()


class _Sharding:
    """FSDP2 on the parts of one model that the plan gives to it."""

    def __init__(self, model: Transformer, world: World) -> None:
        self._model = model
        self._unmanaged = {
            name for name, _ in model.named_parameters() if not plan_parameter(name, world.config).managed_by_fsdp
        }
        self._trunk_mesh = build_trunk_mesh(world) if "embedding.weight" not in self._unmanaged else None
        self._experts_mesh = _experts_mesh(world)
        # Experts are cast to the compute type anyway: casting before the gather halves its bytes at bfloat16.
        self._experts_precision = MixedPrecisionPolicy(
            param_dtype=model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

    def apply_to_block(self, block: nn.Module) -> None:
        """Shard a block's experts over ``dp_shard``, and the rest of it as the trunk."""
        if self._experts_mesh is not None and isinstance(block, Block) and isinstance(block.ffn, MixtureOfExperts):
            experts = fully_shard(
                block.ffn.experts,
                mesh=self._experts_mesh,
                mp_policy=self._experts_precision,
                # Each mixture may be a root of its own; unlike a model's root it is not needed at once again.
                reshard_after_forward=True,
            )
            _sum_gradients(experts)
        if self._trunk_mesh is not None:
            _sum_gradients(fully_shard(block, mesh=self._trunk_mesh, ignored_params=self._ignored()))

    def apply_to_root(self) -> None:
        """Shard what lies outside blocks; one root also lets FSDP2 gather the next unit while one computes."""
        mesh = self._trunk_mesh or self._experts_mesh
        if mesh is not None:
            _sum_gradients(fully_shard(self._model, mesh=mesh, ignored_params=self._ignored()))
            self._model.register_forward_hook(_reshard_after_evaluation)

    def _ignored(self) -> set[nn.Parameter]:
        return {parameter for name, parameter in self._model.named_parameters() if name in self._unmanaged}


def _sum_gradients(module: FSDPModule) -> None:
    """Make FSDP2 add gradients: it averages by default, with an operation that gloo lacks."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _reshard_after_evaluation(model: nn.Module, arguments: Any, output: Any) -> None:
    """Free the root's gathered weights: FSDP2 keeps them for a backward pass that does not come."""
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()


def _experts_mesh(world: World) -> DeviceMesh | None:
    if world.mesh is None or world.config.dp_shard == 1:
        return None
    return world.mesh["dp_shard"] if world.config.dp_replicate == 1 else world.mesh["dp_replicate", "dp_shard"]


def _place_parameters(model: nn.Module, world: World, initial: InitialValue | None, *, prefix: str) -> None:
    """Give parameters on the CPU or ``meta`` their values on this rank's device; leave those already placed."""
    for name, parameter in list(model.named_parameters()):
        if not name.startswith(prefix) or isinstance(parameter, DTensor):
            continue
        if prefix == "" and name.startswith("blocks."):
            continue
        full = parameter.detach() if initial is None else initial(name, parameter.shape)
        owner, leaf = _locate(model, name)
        setattr(owner, leaf, nn.Parameter(_keep_own_part(full, name, world), requires_grad=parameter.requires_grad))


def _keep_own_part(full: torch.Tensor, name: str, world: World) -> torch.Tensor:
    if not is_expert_weight(name) or world.mesh is None or world.config.ep == 1:
        return full.to(world.device)
    num_held = full.shape[0] // world.config.ep
    # A copy, so that the full tensor can be freed.
    mine = full[world.ep_rank * num_held : (world.ep_rank + 1) * num_held].to(world.device, copy=True)
    return DTensor.from_local(mine, world.mesh["ep"], [Shard(0)], run_check=False)


def _locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
