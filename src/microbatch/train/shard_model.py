"""Spread a job's model over the ranks, its gradients and its optimizer's state with it: ZeRO-2 and ZeRO-3."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from microbatch.errors import ConfigError
from microbatch.memory.recompute import blocks_of
from microbatch.ranks.fsdp import fully_sharded
from microbatch.train.job import Job
from microbatch.train.state import optimizers_of


def spread(job: Job, *, how: str) -> None:
    """Apply `torch.distributed.fsdp.fully_shard` to a job's model, and let its optimizers have the shards.

    The blocks that the model repeats are gathered one at a time, and what is left, such as embeddings and heads, is
    gathered as a whole. What blocks share with others, such as tied weights, is part of that rest. Parameters of no
    dimension, such as a temperature, cannot be shared out: every rank keeps them.

    Args:
        job: Its model and its optimizers are changed in place, before the first step.
        how: ``"zero2"`` keeps weights gathered from forward to backward; ``"zero3"`` gathers those of blocks twice.

    Raises:
        ConfigError: The model is sharded already, an optimizer has state, or a unit has trained parameters of several
            dtypes.

    Cost:
        A copy of this rank's share.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = job.model
    if fully_sharded(model):
        raise ConfigError(f"--shard {how}: the job has sharded its model itself; leave one of them out")
    for optimizer in optimizers_of(job.optimizer):
        if optimizer.state:
            raise ConfigError(
                f"--shard {how}: the job's {type(optimizer).__name__} has state of whole parameters. Make the job's "
                "optimizer without taking steps, or shard the model in the job before the optimizer is made"
            )
    before = dict(model.named_parameters(remove_duplicate=False))
    policy = MixedPrecisionPolicy(reduce_dtype=_wide(before.values()))
    blocks, numbers = _units(model), {each for each in model.parameters() if each.ndim == 0}
    # Where the model is, which may not be the machine's accelerator.
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for unit in [*blocks, model]:
        inside = [] if unit is not model else [each for block in blocks for each in block.parameters()]
        _check_dtypes(unit, without={id(each) for each in (*inside, *numbers)})
        after_forward = None if how == "zero3" else False
        fully_shard(unit, mesh=mesh, reshard_after_forward=after_forward, mp_policy=policy, ignored_params=numbers)
    after = dict(model.named_parameters(remove_duplicate=False))
    shards = {id(whole): after[name] for name, whole in before.items()}
    for optimizer in optimizers_of(job.optimizer):
        for group in optimizer.param_groups:
            group["params"][:] = [shards.get(id(each), each) for each in group["params"]]


def _units(model: nn.Module) -> list[nn.Module]:
    """List the repeated blocks that have all their parameters to themselves."""
    modules = {id(module): module for module in map(model.get_submodule, blocks_of(model))}
    blocks = list(modules.values())
    inside = Counter(id(each) for block in blocks for each in set(block.parameters()))
    held = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in held:
            inside.update(id(each) for each in module.parameters(recurse=False))
    return [block for block in blocks if all(inside[id(each)] == 1 for each in block.parameters())]


def _wide(parameters: Iterable[Tensor]) -> torch.dtype | None:
    """Say in what narrow gradients add up; `None` for the parameters' own, which is wide enough."""
    narrow = any(each.dtype in {torch.bfloat16, torch.float16} for each in parameters)
    return torch.float32 if narrow else None


def _check_dtypes(unit: nn.Module, *, without: set[int]) -> None:
    trained = [each for each in unit.parameters() if each.requires_grad and id(each) not in without]
    if len(dtypes := {each.dtype for each in trained}) > 1:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ConfigError(
            f"--shard: {type(unit).__name__} has trained parameters of {found}, which are gathered together. Give "
            "them one dtype, or shard the model in the job, with fully_shard applied to the parts that differ"
        )
