"""A fully sharded model that is whole for a window: its weights gathered once, its gradients scattered once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from microbatch.ranks.fsdp import fully_sharded, reshard, units_of


def hold_whole(model: nn.Module) -> list[Any]:
    """Gather all weights, and let passes run in any order, as those of a plain module, until `scatter_whole`.

    Torch's own passes are one forward and one backward at a time, which gather and let go of weights as they come to
    them. Where forward passes of several microbatches take turns, there is no such order; so the hooks of the units are
    told what they are told where a checkpoint runs a block again: that the weights are there, and somebody else's.

    Args:
        model: Fully sharded.

    Returns:
        The gathered weights.

    Raises:
        Exception: What went wrong on this rank, memory that ended most of all. The others wait for its part of every
            unit, so it gathers the rest one by one, and lets go of each.

    Cost:
        One all-gather a unit; memory for all weights.
    """
    weights: list[Any] = []
    failure: Exception | None = None
    for state in _states(model):
        for unit in units_of(state):
            try:
                _gather(unit)
            except Exception as error:
                if failure is not None:
                    raise
                failure = error
                weights.clear()
                reshard(model)
                _gather(unit)
            if failure is None:
                weights += [each._unsharded_param for each in unit.fsdp_params]
            else:
                unit.reshard()
        state._training_state = type(state._training_state).PRE_BACKWARD
    if failure is not None:
        raise failure
    return weights


def scatter_whole(model: nn.Module) -> None:
    """Scatter what one backward has left, and let go of the weights.

    Args:
        model: What `hold_whole` was given.

    Cost:
        One reduce-scatter a unit.
    """
    let_go(model)
    for root in _roots(model):
        # What torch does at a backward's end: units that it has not come to are reduced now.
        root._root_post_backward_final_callback()


def let_go(model: nn.Module) -> None:
    """Let passes be torch's own again.

    Args:
        model: What `hold_whole` was given, or a module that was not.
    """
    for state in _states(model):
        state._training_state = type(state._training_state).IDLE


def _gather(unit: Any) -> None:
    unit.unshard()
    unit.wait_for_unshard()


def _roots(model: nn.Module) -> Iterator[Any]:
    """Walk over the outermost sharded modules' states; each learns what is inside of it, if it has not run yet."""
    inside: set[int] = set()
    for module in fully_sharded(model):
        if id(module) not in inside:
            inside.update(id(each) for each in module.modules())
            state: Any = module._get_fsdp_state()
            state._lazy_init()
            yield state


def _states(model: nn.Module) -> list[Any]:
    return [state for root in _roots(model) for state in root._state_ctx.all_states]
