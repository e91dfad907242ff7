"""A fully sharded model in a window: which of its passes communicate what, and how a rank that failed keeps step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from microbatch.errors import ConfigError
from microbatch.ranks.process_group import Ranks

# What a window sets, of each unit: a group of parameters that are gathered, and whose gradients are scattered, at once.
# Not every version of torch has all of them.
_FLAGS: dict[str, Any] = {
    "reduce_grads": True,
    "all_reduce_grads": True,
    "reshard_after_backward": True,
    # Sums, not averages: the window knows what to divide by.
    "gradient_divide_factor": 1.0,
    "force_sum_reduction_for_comms": True,
    # Ranks may use different parameters, and microbatches too: what is scattered has to be laid out alike.
    "reduce_scatter_unused_params": True,
}
_WIRES = {"_all_gather_comm": "gather", "_reduce_scatter_comm": "scatter"}


def fully_sharded(model: nn.Module) -> list[Any]:
    """List the modules that `torch.distributed.fsdp.fully_shard` was applied to.

    Args:
        model: The module.

    Returns:
        Those of its modules, in their order; none where nobody has imported it.
    """
    found: Any = sys.modules.get("torch.distributed.fsdp")
    return [] if found is None else [module for module in model.modules() if isinstance(module, found.FSDPModule)]


def wrapped_by_the_older(model: nn.Module) -> str | None:
    """Name a module that is wrapped in `FullyShardedDataParallel`, which `fully_shard` has replaced.

    Args:
        model: The module.

    Returns:
        Its path; `None` if there is none.
    """
    found: Any = sys.modules.get("torch.distributed.fsdp")
    wrapper = () if found is None else found.FullyShardedDataParallel
    return next((name for name, module in model.named_modules() if isinstance(module, wrapper)), None)


def group_and_device(model: nn.Module) -> tuple[Any, torch.device] | None:
    """Say who shares a fully sharded model's gradients, and where it computes.

    Args:
        model: The module.

    Returns:
        The process group, `None` for the default one; and the device, which is not the parameters' own where they are
        offloaded. `None` where nothing is fully sharded.

    Raises:
        ConfigError: Nobody has said which group: the mesh has two dimensions, and there are other ranks beside it.
    """
    units = list(_units(model))
    if not units:
        return None
    mesh = units[0].mesh_info.mesh
    if mesh.size() == dist.get_world_size():
        return None, units[0].device
    if mesh.ndim > 1:
        raise ConfigError(
            "the model is sharded and replicated over ranks that are not all there are: say over which gradients and "
            'counts add up, process_group=mesh["replicate", "shard"]._flatten("dp")'
        )
    return mesh.get_group(), units[0].device


def unshared_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's gradients before they are scattered.

    Args:
        model: Fully sharded.

    Returns:
        Bytes of all of them on one rank, as they are between the microbatches of a window.
    """
    return sum(each.numel() * dtype.itemsize for each, dtype in _trained(model))


def narrowest(model: nn.Module, *, alone: bool = False) -> torch.dtype | None:
    """Say in what a model's gradients would add up between microbatches, before they are scattered.

    Args:
        model: Fully sharded.
        alone: Whether all of them are in one backward, which adds up in what it computes in.

    Returns:
        The narrowest dtype; `None` where nothing is trained.
    """
    return min((dtype for _, dtype in _trained(model, alone=alone)), key=lambda dtype: dtype.itemsize, default=None)


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights, so that a model's parameters are those that its optimizer has.

    Args:
        model: The module; nothing happens where it is not sharded.
    """
    for module in fully_sharded(model):
        module.reshard()


def gather_roots(model: nn.Module) -> None:
    """Gather the weights that are in none of a model's inner units, such as a temperature, to compute with.

    Args:
        model: The module, after a forward pass; nothing happens where it is not sharded.

    Cost:
        One all-gather where they are not there already; all ranks call this.
    """
    for module in fully_sharded(model):
        if module._get_fsdp_state()._is_root:
            module.unshard()


@dataclass(slots=True)
class _Line:
    """What a pass has said to the other ranks so far."""

    ranks: Ranks
    done: int = 0
    skip: int = 0
    scattered: list[Any] = field(default_factory=list[Any])


class _Wire:
    """Passes a unit's collectives on, counts them, and leaves out those that were said before a pass failed."""

    def __init__(self, inner: Any, unit: Any, *, kind: str, line: _Line) -> None:
        self.inner, self._unit, self._kind, self._line = inner, unit, kind, line

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, **options: Any) -> Any:
        line = self._line
        if line.skip:
            line.skip -= 1
            output_tensor.zero_()
            return None
        line.done += 1
        gathers = self._kind == "gather"
        line.ranks.count(self._kind, output_tensor if gathers else input_tensor, size=group.size())
        if not gathers:
            line.scattered.append(self._unit)
            if self._unit.all_reduce_grads and hasattr(self._unit.mesh_info, "replicate_process_group"):
                line.ranks.count("sum", output_tensor, size=self._unit.mesh_info.replicate_process_group.size())
        return self.inner(output_tensor=output_tensor, input_tensor=input_tensor, group=group, **options)


class Sharded:
    """Steer a fully sharded model's communication through one window.

    Every pass, forward and backward, is one that all ranks make together. ``lean`` scatters the sum of the gradients
    after each, and keeps a shard; ``fast`` adds whole gradients up, scatters them in the last pass, and gathers what
    is not let go of after forward only once. Where the model is replicated too, the sum over replicas waits for the
    last pass either way.

    A rank that fails cannot leave: the others wait for its part of what they communicate. It makes the rest of the
    window's passes with a few rows, and in the one that failed leaves out what it has said already.

    Args:
        model: Fully sharded.
        ranks: Who shares its gradients.

    Attributes:
        passes: Passes made so far.
        planned: Passes that every rank makes.
        fast: Whether gradients are scattered in the last one only.
        outputs: What the pass's forward has returned, as nodes of the graph, with what makes zeros like them.
        silent: Whether the pass is to add nothing to any gradient.
        whole: Whether all passes of the window are made as those of a plain module.

    Source:
        Laws R2, R4, R6, R7.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model = model
        self._units = list(_units(model))
        self._before = [{name: getattr(unit, name) for name in _FLAGS if hasattr(unit, name)} for unit in self._units]
        self._line = _Line(ranks)
        self._wires: list[tuple[Any, str, Any]] = []
        self._hooks: list[RemovableHandle] = []
        self._held: list[Any] = []
        self._watched: set[int] = set()
        self._used: set[int] = set()
        self.passes = self.planned = 0
        self.fast = self.silent = self.whole = False
        self.outputs: list[tuple[GradientEdge, Callable[[], Tensor]]] = []

    def open(self) -> None:
        """Begin: take over the flags, and watch what is said."""
        for unit in self._units:
            for name, value in _FLAGS.items():
                if hasattr(unit, name):
                    setattr(unit, name, value)
            for name, kind in _WIRES.items():
                if hasattr(unit, name):
                    self._wires.append((unit, name, getattr(unit, name)))
                    setattr(unit, name, _Wire(getattr(unit, name), unit, kind=kind, line=self._line))
        self._hooks.append(self._model.register_forward_hook(self._went_forward))

    def expect(self, passes: int, *, fast: bool) -> None:
        """Learn what all ranks will do.

        Args:
            passes: How many each of them makes.
            fast: Whether gradients are scattered in the last one only.
        """
        self.planned, self.fast = passes, fast

    def begin(self) -> None:
        """Set the flags of the next pass, before its forward."""
        last = self.whole or self.passes >= self.planned - 1
        for unit in self._units:
            unit.reduce_grads = last or not self.fast
            # Partial sums can wait only where each pass lays them out alike.
            unit.all_reduce_grads = unit.reduce_grads and (last or not hasattr(unit, "reduce_scatter_unused_params"))
            unit.reshard_after_backward = last or not self._keeps(unit)
        self._nothing_said()

    def start_over(self) -> None:
        """Begin with the passes once more."""
        self.passes = 0
        self._nothing_said()

    def between(self) -> None:
        """Set the flags of a loss that is computed between two rounds of passes, and gather what it may take."""
        for unit in self._units:
            # What it leaves in a unit is scattered with the first pass that does so.
            unit.reduce_grads = unit.all_reduce_grads = False
            unit.reshard_after_backward = not self._keeps(unit)
        gather_roots(self._model)

    @property
    def said(self) -> bool:
        """Whether the pass has communicated."""
        return self._line.done > 0

    def went_forward(self) -> None:
        """Watch which parameters backward will reach, before it."""
        for unit in self._units:
            for each in unit.fsdp_params:
                whole = getattr(each, "_unsharded_param", None)
                if whole is not None and id(whole) not in self._watched and whole.requires_grad:
                    self._watched.add(id(whole))
                    reached = partial(self._reached, id(each.sharded_param))
                    self._hooks.append(whole.register_post_accumulate_grad_hook(reached))

    def went(self) -> None:
        """Count a pass, after its backward."""
        self.passes += 1
        self._nothing_said()

    @property
    def held(self) -> set[int]:
        """The ids of the parameters whose gradients add up over the ranks by themselves."""
        return {id(each.sharded_param) for unit in self._units for each in unit.fsdp_params}

    def used(self, parameter: Tensor) -> bool:
        """Tell whether a backward on this rank has reached a parameter.

        Args:
            parameter: One of those that are `held`.

        Returns:
            Whether one has.
        """
        return id(parameter) in self._used

    def rejoin(self) -> None:
        """Begin the pass that failed once more, without what it has said to the others."""
        said, scattered, held = self._line.done, self._line.scattered, self._held
        self.drop()
        # What earlier passes have left gathered is not gathered by the others in this one.
        self._line.skip = len(held)
        for unit in held:
            unit.unshard()
            unit.wait_for_unshard()
        self.begin()
        self._line.skip = said
        for unit in scattered:
            unit.all_reduce_grads = False

    def drop(self) -> None:
        """Forget what passes have left: gathered weights, gradients, and how far the last one came."""
        for unit in self._units:
            unit._partial_reduce_output = None
            for each in unit.fsdp_params:
                each.unsharded_accumulated_grad = None
                if getattr(each, "_unsharded_param", None) is not None:
                    each._unsharded_param.grad = None
        for module in fully_sharded(self._model):
            if module._get_fsdp_state()._is_root and hasattr(module, "reset_iter_state"):
                module.reset_iter_state()
        reshard(self._model)

    def close(self) -> None:
        """End: put the flags back, and watch no more."""
        for hook in self._hooks:
            hook.remove()
        for unit, name, inner in self._wires:
            setattr(unit, name, inner)
        for unit, flags in zip(self._units, self._before, strict=True):
            for name, value in flags.items():
                setattr(unit, name, value)
        self._hooks, self._wires, self.outputs = [], [], []

    def _nothing_said(self) -> None:
        """Come to where a pass that fails would begin again."""
        self._held = [unit for unit in self._units if unit.is_unsharded]
        self._line.done, self._line.skip, self._line.scattered = 0, 0, []
        self.outputs = []

    def _keeps(self, unit: Any) -> bool:
        # All of these are there when forward ends: to keep them until the next costs nothing at the peak.
        return self.fast and unit.post_forward_mesh_info is None

    def _went_forward(self, module: nn.Module, given: Any, output: Any) -> None:
        del module, given
        for each in () if self.whole else tree_leaves(output):
            if isinstance(each, Tensor) and each.requires_grad:
                zeros = partial(torch.zeros, each.shape, dtype=each.dtype, device=each.device)
                self.outputs.append((get_gradient_edge(each), zeros))
                # A loss that is not to count may be NaN, and 0 times that is NaN too.
                each.register_hook(self._silenced)

    def _reached(self, key: int, parameter: Tensor) -> None:
        del parameter
        self._used.add(key)

    def _silenced(self, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.silent else None


def _trained(model: nn.Module, *, alone: bool = False) -> Iterator[tuple[Tensor, torch.dtype]]:
    """Walk over the sharded parameters that are trained, each with the dtype of its gradient before it is scattered."""
    for unit in _units(model):
        policy = unit.mp_policy
        for parameter in (each.sharded_param for each in unit.fsdp_params):
            if parameter.requires_grad:
                wider = None if alone else policy.reduce_dtype
                yield parameter, wider or policy.param_dtype or parameter.dtype


def _units(model: nn.Module) -> Iterator[Any]:
    for module in fully_sharded(model):
        yield from units_of(module._get_fsdp_state())


def units_of(state: Any) -> Sequence[Any]:
    """List the groups of parameters that one `fully_shard` has made.

    Args:
        state: What it keeps of its module.

    Returns:
        Each is gathered, and its gradients are scattered, at once.
    """
    # Private to torch, like the flags' values, which can be set and not be asked for. Until 2.11 there was one.
    units = getattr(state, "_fsdp_param_groups", None)
    if units is not None:
        return list(units)
    unit = getattr(state, "_fsdp_param_group", None)
    return [] if unit is None else [unit]
