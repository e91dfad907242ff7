"""Facts about a model that `torch.distributed.fsdp.fully_shard` was applied to, and its gathered weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from microbatch.errors import ConfigError


def fully_sharded(model: nn.Module) -> list[Any]:
    """List the modules that `torch.distributed.fsdp.fully_shard` was applied to, in the model's order."""
    found: Any = sys.modules.get("torch.distributed.fsdp")
    return [] if found is None else [module for module in model.modules() if isinstance(module, found.FSDPModule)]


def wrapped_by_the_older(model: nn.Module) -> str | None:
    """Find a module that is wrapped in `FullyShardedDataParallel` (FSDP1), which `fully_shard` has replaced."""
    found: Any = sys.modules.get("torch.distributed.fsdp")
    wrapper = () if found is None else found.FullyShardedDataParallel
    return next((name for name, module in model.named_modules() if isinstance(module, wrapper)), None)


def group_and_device(model: nn.Module) -> tuple[Any, torch.device] | None:
    """Return the process group that reduces a fully sharded model's gradients, and the device that computes.

    Args:
        model: The model.

    Returns:
        The process group, or `None` for the default one; and the device, which differs from the parameters' own if they
        are offloaded. `None` instead of both if the model is not fully sharded.

    Raises:
        ConfigError: The model's mesh has two dimensions and does not span all ranks, so the group is ambiguous.
    """
    units = list(fsdp_units(model))
    if not units:
        return None
    mesh = units[0].mesh_info.mesh
    if mesh.size() == dist.get_world_size():
        return None, units[0].device
    if mesh.ndim > 1:
        raise ConfigError(
            f"the model is sharded and replicated over {mesh.size()} of {dist.get_world_size()} ranks, so the ranks "
            "whose gradients and counts add up are not known: pass ranks=mb.Ranks(group="
            'mesh["replicate", "shard"]._flatten("dp"))'
        )
    return mesh.get_group(), units[0].device


def unshared_bytes(model: nn.Module) -> int:
    """Return the bytes of all unsharded gradients on one rank, in the dtype in which they add up between passes."""
    return sum(each.numel() * dtype.itemsize for each, dtype in _trained(model))


def narrowest(model: nn.Module, *, alone: bool = False) -> torch.dtype | None:
    """Return the narrowest dtype in which a model's gradients add up between microbatches, before the reduce-scatter.

    Args:
        model: A fully sharded model.
        alone: Whether one backward makes all gradients, which then add up in the dtype of the computation.

    Returns:
        The dtype; `None` if no parameter is trained.
    """
    return min((dtype for _, dtype in _trained(model, alone=alone)), key=lambda dtype: dtype.itemsize, default=None)


def reshard(model: nn.Module) -> None:
    """Free the all-gathered weights, so that the model's parameters are the shards that its optimizer has."""
    for module in fully_sharded(model) if dist.is_available() and dist.is_initialized() else ():
        module.reshard()


def gather_roots(model: nn.Module) -> None:
    """All-gather the weights of the root unit, such as a temperature, for computation outside of forward."""
    for module in fully_sharded(model):
        if module._get_fsdp_state()._is_root:
            module.unshard()


def units_of(state: Any) -> Sequence[Any]:
    """List the FSDP units of a module: parameters that are all-gathered and reduce-scattered together."""
    # Private to torch, as are the values of the units' flags, which torch can set but not return. Until torch 2.11, a
    # state had one unit.
    units = getattr(state, "_fsdp_param_groups", None)
    if units is not None:
        return list(units)
    unit = getattr(state, "_fsdp_param_group", None)
    return [] if unit is None else [unit]


def fsdp_units(model: nn.Module) -> Iterator[Any]:
    """Go through all FSDP units of a model."""
    for module in fully_sharded(model):
        yield from units_of(module._get_fsdp_state())


def _trained(model: nn.Module, *, alone: bool = False) -> Iterator[tuple[Tensor, torch.dtype]]:
    """Yield the sharded trainable parameters, each with the dtype of its gradient before the reduce-scatter."""
    for unit in fsdp_units(model):
        policy = unit.mp_policy
        for parameter in (each.sharded_param for each in unit.fsdp_params):
            if parameter.requires_grad:
                wider = None if alone else policy.reduce_dtype
                yield parameter, wider or policy.param_dtype or parameter.dtype
