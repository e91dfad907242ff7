"""Take an optimizer's step, and try again if memory runs out before the step has changed anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from microbatch.errors import OutOfMemoryError
from microbatch.memory.least_memory import state_copies
from microbatch.memory.out_of_memory import is_out_of_memory, let_go


def apply(before: Versions, step: Callable[[], object], *, device: torch.device) -> None:
    """Take an optimizer's step.

    At this point the activations are freed, so a smaller microbatch does not help. If memory runs out before the
    optimizer has written to a weight or to existing state, the step is tried once more with an empty allocator cache.
    If the optimizer has begun to write, its partial step cannot be undone.

    Raises:
        OutOfMemoryError: Memory ran out again, or the weights may be partly updated; the message tells which.
    """
    optimizer = before.optimizer
    failure = _attempt(partial(_reserved, optimizer, step))
    if failure is None:
        return
    if not before.put_back():
        raise OutOfMemoryError(
            f"out of memory inside {type(optimizer).__name__}.step(), after it had begun to write: weights may be "
            "partly updated, so continue from a checkpoint. A smaller microbatch does not help here. These can help: "
            "foreach=False or fused=True, which need less temporary memory; or optimizer state in a narrower dtype or "
            f"on the host. The original error: {failure}"
        ) from failure
    let_go(failure, device)
    failure = _attempt(partial(_reserved, optimizer, step))
    if failure is not None:
        untouched = before.put_back()
        raise OutOfMemoryError(
            f"out of memory inside {type(optimizer).__name__}.step(), and again when tried once more: "
            f"{'no weight was changed' if untouched else 'weights may be partly updated'}. A smaller microbatch does "
            "not help here. These can help: an optimizer with less state, or state on the host. The original error: "
            f"{failure}"
        ) from failure


def zero_grad(optimizer: Optimizer) -> None:
    """Call an optimizer's `zero_grad`, unless it is torch's own and every gradient is `None` already."""
    own = getattr(optimizer.zero_grad, "__func__", None) is Optimizer.zero_grad
    if not own or any(each.grad is not None for group in optimizer.param_groups for each in group["params"]):
        optimizer.zero_grad()


def _reserved(optimizer: Optimizer, step: Callable[[], object]) -> None:
    """Take a step; if it is the first, make sure of the memory for the state that it creates, before it writes."""
    if not optimizer.state:
        held = [
            torch.empty_like(each)
            for group in optimizer.param_groups
            if (copies := state_copies(optimizer, group))
            for each in group["params"]
            if each.grad is not None
            for _ in range(copies)
        ]
        del held
    step()


def _attempt(step: Callable[[], object]) -> Exception | None:
    try:
        step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error
    return None


class Versions:
    """Record the version counters of an optimizer's parameters and state, to find later writes.

    Cost:
        Reads the version of every parameter and state tensor: about a microsecond a parameter.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._parameters = [(each, each._version) for group in optimizer.param_groups for each in group["params"]]
        self._state: dict[Any, Mapping[str, tuple[Any, int]]] = {
            parameter: {name: (value, _version(value)) for name, value in state.items()}
            for parameter, state in optimizer.state.items()
        }

    @property
    def parameters(self) -> list[Tensor]:
        """The optimizer's parameters."""
        return [each for each, _ in self._parameters]

    @property
    def stateless(self) -> bool:
        """Whether the optimizer had no state."""
        return not any(self._state.values())

    @property
    def untouched(self) -> bool:
        """Whether no parameter was written to since."""
        return all(each._version == version for each, version in self._parameters)

    def put_back(self) -> bool:
        """Remove state that the optimizer has created since, and return whether all else is unchanged."""
        if not self.untouched:
            return False
        state = self.optimizer.state
        for parameter in [each for each in state if each not in self._state]:
            del state[parameter]
        for parameter, known in self._state.items():
            held = state[parameter]
            for name in [name for name in held if name not in known]:
                del held[name]
            for name, (value, version) in known.items():
                if held.get(name) is not value or _version(value) != version:
                    return False
        return True


def _version(value: object) -> int:
    return value._version if isinstance(value, Tensor) else 0
