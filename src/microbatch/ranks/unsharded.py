"""One all-gather of a fully sharded model's weights, and one reduce-scatter of its gradients, for a whole window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from microbatch.ranks.fsdp import fully_sharded, reshard, units_of


def hold_whole(model: nn.Module) -> list[Any]:
    """All-gather all weights, so that passes can run in any order until `scatter_whole`, as in a plain module.

    FSDP expects one forward and then its backward, and gathers and frees weights along the way. If forward passes of
    several microbatches are interleaved, that order does not exist. So each unit is put into the state that FSDP uses
    while activation checkpointing recomputes a block. In this state, hooks leave gathered weights alone.

    Args:
        model: A fully sharded model.

    Returns:
        The gathered weights.

    Raises:
        Exception: The error of this rank, such as running out of memory. The other ranks wait for this rank, so it
            first takes part in the all-gathers of the remaining units, and frees each unit at once.

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
    """Reduce-scatter the gradients of one backward, and free the gathered weights."""
    let_go(model)
    for root in _roots(model):
        # FSDP's own callback at the end of backward; it reduces every unit that has not been reduced yet.
        root._root_post_backward_final_callback()


def let_go(model: nn.Module) -> None:
    """Return a model's units to FSDP's normal state, after `hold_whole`."""
    for state in _states(model):
        state._training_state = type(state._training_state).IDLE


def _gather(unit: Any) -> None:
    unit.unshard()
    unit.wait_for_unshard()


def _roots(model: nn.Module) -> Iterator[Any]:
    """Yield the FSDP states of the outermost sharded modules, initialised if the model has not run yet."""
    inside: set[int] = set()
    for module in fully_sharded(model):
        if id(module) not in inside:
            inside.update(id(each) for each in module.modules())
            state: Any = module._get_fsdp_state()
            state._lazy_init()
            yield state


def _states(model: nn.Module) -> list[Any]:
    return [state for root in _roots(model) for state in root._state_ctx.all_states]
