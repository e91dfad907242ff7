"""Control of a fully sharded model's collectives through the passes of one window, also after a rank failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from microbatch.ranks.fsdp import fsdp_units, fully_sharded, gather_roots, reshard
from microbatch.ranks.process_group import RankGroup

# What a window sets on each FSDP unit. Not every version of torch has all of these attributes.
FLAGS: dict[str, Any] = {
    "reduce_grads": True,
    "all_reduce_grads": True,
    "reshard_after_backward": True,
    # Sums, not averages: the window itself divides by the denominator.
    "gradient_divide_factor": 1.0,
    "force_sum_reduction_for_comms": True,
    # Ranks and microbatches may use different parameters, but every reduce-scatter needs the same layout.
    "reduce_scatter_unused_params": True,
}
_COLLECTIVES = {"_all_gather_comm": "gather", "_reduce_scatter_comm": "scatter"}


@dataclass(slots=True)
class _PassLog:
    """The collectives that the current pass has run so far.

    Attributes:
        ranks: Counts the collectives and their bytes.
        done: Collectives run in this pass.
        skip: Collectives to leave out next, because the other ranks have run them already.
        scattered: Units whose gradients were reduce-scattered.
    """

    ranks: RankGroup
    done: int = 0
    skip: int = 0
    scattered: list[Any] = field(default_factory=list[Any])


class _LoggedCollective:
    """A unit's all-gather or reduce-scatter, which logs its calls and skips some if the log asks for it."""

    def __init__(self, inner: Any, unit: Any, *, kind: str, log: _PassLog) -> None:
        self.inner, self._unit, self._kind, self._log = inner, unit, kind, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, **options: Any) -> Any:
        log = self._log
        if log.skip:
            log.skip -= 1
            output_tensor.zero_()
            return None
        log.done += 1
        gathers = self._kind == "gather"
        log.ranks.count(self._kind, output_tensor if gathers else input_tensor, size=group.size())
        if not gathers:
            log.scattered.append(self._unit)
            if self._unit.all_reduce_grads and hasattr(self._unit.mesh_info, "replicate_process_group"):
                log.ranks.count("sum", output_tensor, size=self._unit.mesh_info.replicate_process_group.size())
        return self.inner(output_tensor=output_tensor, input_tensor=input_tensor, group=group, **options)


class Sharded:
    """Control when a fully sharded model gathers weights and scatters gradients, for the passes of one window.

    All ranks run every forward and backward pass together. The mode ``lean`` reduce-scatters gradients after each pass
    and keeps only a shard of their sum. The mode ``fast`` adds up unsharded gradients and reduce-scatters them in the
    last pass. It also keeps weights gathered between passes if forward does not reshard them. If the model is
    replicated too, the all-reduce over replicas waits for the last pass in both modes.

    A rank that fails cannot stop, because the other ranks wait for its part of their collectives. So it runs the rest
    of the window's passes with a few rows. When it repeats the pass that failed, it skips the collectives that this
    pass had run already.

    Args:
        model: A fully sharded model.
        ranks: The ranks that share its gradients.

    Attributes:
        passes: Passes finished so far.
        planned: Passes that every rank runs.
        fast: Whether gradients are reduce-scattered in the last pass only.
        outputs: Outputs of the pass's forward, as nodes of the graph; each with a function that makes zeros of the
            output's shape and dtype.
        silent: Whether the current pass must add nothing to any gradient.
        whole: Whether the weights stay gathered for the whole window, so that passes run as in a plain module.

    Source:
        Laws R2, R4, R6, R7.
    """

    def __init__(self, model: nn.Module, ranks: RankGroup) -> None:
        self._model = model
        self._units = list(fsdp_units(model))
        self._before = [{name: getattr(unit, name) for name in FLAGS if hasattr(unit, name)} for unit in self._units]
        self._log = _PassLog(ranks)
        self._collectives: list[tuple[Any, str, Any]] = []
        self._hooks: list[RemovableHandle] = []
        self._held: list[Any] = []
        self._watched: set[int] = set()
        self._used: set[int] = set()
        self.passes = self.planned = 0
        self.fast = self.silent = self.whole = False
        self.outputs: list[tuple[GradientEdge, Callable[[], Tensor]]] = []

    def open(self) -> None:
        """Set the units' flags, and start to log their collectives."""
        for unit in self._units:
            for name, value in FLAGS.items():
                if hasattr(unit, name):
                    setattr(unit, name, value)
            for name, kind in _COLLECTIVES.items():
                if hasattr(unit, name):
                    inner = getattr(unit, name)
                    self._collectives.append((unit, name, inner))
                    setattr(unit, name, _LoggedCollective(inner, unit, kind=kind, log=self._log))
        self._hooks.append(self._model.register_forward_hook(self._record_outputs))

    def expect(self, passes: int, *, fast: bool) -> None:
        """Set the number of passes and the mode that all ranks have agreed on.

        Args:
            passes: Passes that every rank runs.
            fast: Whether gradients are reduce-scattered in the last pass only.
        """
        self.planned, self.fast = passes, fast

    def begin(self) -> None:
        """Set the units' flags for the next pass, before its forward."""
        last = self.whole or self.passes >= self.planned - 1
        for unit in self._units:
            unit.reduce_grads = last or not self.fast
            # Partial sums can wait only if every pass has the same layout.
            unit.all_reduce_grads = unit.reduce_grads and (last or not hasattr(unit, "reduce_scatter_unused_params"))
            unit.reshard_after_backward = last or not self._keeps(unit)
        self._reset_log()

    def start_over(self) -> None:
        """Reset the count of passes, for a second round of them."""
        self.passes = 0
        self._reset_log()

    def between(self) -> None:
        """Prepare the units for a loss that is computed between two rounds of passes.

        The weights of the root unit are gathered, because the loss may use them.
        """
        for unit in self._units:
            # The loss's gradients stay in the unit, and are reduce-scattered by the next pass that does so.
            unit.reduce_grads = unit.all_reduce_grads = False
            unit.reshard_after_backward = not self._keeps(unit)
        gather_roots(self._model)

    @property
    def said(self) -> bool:
        """Whether the pass has run any collective."""
        return self._log.done > 0

    def went_forward(self) -> None:
        """Install hooks, after a forward, that record which parameters backward reaches."""
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
        self._reset_log()

    @property
    def held(self) -> set[int]:
        """Ids of the parameters whose gradients FSDP itself adds up over the ranks."""
        return {id(each.sharded_param) for unit in self._units for each in unit.fsdp_params}

    def used(self, parameter: Tensor) -> bool:
        """Return whether a backward on this rank has reached a parameter."""
        return id(parameter) in self._used

    def rejoin(self) -> None:
        """Prepare to repeat a pass that failed, without the collectives that it had run already."""
        done, scattered, held = self._log.done, self._log.scattered, self._held
        self.drop()
        # Weights that earlier passes have kept gathered are not gathered by the other ranks in this pass.
        self._log.skip = len(held)
        for unit in held:
            unit.unshard()
            unit.wait_for_unshard()
        self.begin()
        self._log.skip = done
        for unit in scattered:
            unit.all_reduce_grads = False

    def drop(self) -> None:
        """Free what the passes have left in the units: gathered weights, unsharded and partial gradients."""
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
        """Restore the units' flags and collectives, and remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        for unit, name, inner in self._collectives:
            setattr(unit, name, inner)
        for unit, flags in zip(self._units, self._before, strict=True):
            for name, value in flags.items():
                setattr(unit, name, value)
        self._hooks, self._collectives, self.outputs = [], [], []

    def _reset_log(self) -> None:
        """Reset the log of collectives, where the next pass begins."""
        self._held = [unit for unit in self._units if unit.is_unsharded]
        self._log.done, self._log.skip, self._log.scattered = 0, 0, []
        self.outputs = []

    def _keeps(self, unit: Any) -> bool:
        # Without a reshard after forward, all weights are gathered when forward ends anyway, so the peak is the same.
        return self.fast and unit.post_forward_mesh_info is None

    def _record_outputs(self, module: nn.Module, given: Any, output: Any) -> None:
        del module, given
        for each in () if self.whole else tree_leaves(output):
            if isinstance(each, Tensor) and each.requires_grad:
                zeros = partial(torch.zeros, each.shape, dtype=each.dtype, device=each.device)
                self.outputs.append((get_gradient_edge(each), zeros))
                # A gradient must be replaced by zeros, not multiplied by 0: a loss that does not count may be NaN.
                each.register_hook(self._silenced)

    def _reached(self, key: int, parameter: Tensor) -> None:
        del parameter
        self._used.add(key)

    def _silenced(self, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.silent else None
