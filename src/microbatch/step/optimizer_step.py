"""Let an optimizer step, once more if memory ends before it has changed anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from microbatch.errors import OutOfMemoryError
from microbatch.memory.out_of_memory import is_out_of_memory, let_go


def apply(optimizer: Optimizer, step: Callable[[], object], *, device: torch.device) -> None:
    """Take an optimizer's step.

    The activations are gone by now, so a smaller microbatch would not help. An optimizer that ran out of memory before
    it wrote to any weight, or to any state that was there, as when it makes its first state, is tried once more with
    the allocator's cache emptied. One that has begun to write is not: nobody could put its half of a step back.

    Args:
        optimizer: Whose parameters and state are watched.
        step: Takes its step.
        device: Where the model is.

    Raises:
        OutOfMemoryError: Memory ended again, or the weights may be partly updated; the message says which.

    Cost:
        Reads the version of every parameter and state tensor: about a microsecond a parameter.
    """
    before = Versions(optimizer)
    failure = _attempt(step)
    if failure is None:
        return
    if not before.put_back():
        raise OutOfMemoryError(
            f"out of memory inside {type(optimizer).__name__}.step(), after it had begun to write: weights may be "
            "partly updated, so go on from a checkpoint. A smaller microbatch does not help here; what can: foreach="
            "False or fused=True, which need less beside the state, or state that is narrower or on the host. "
            f"The error itself: {failure}"
        ) from failure
    let_go(failure, device)
    failure = _attempt(step)
    if failure is not None:
        untouched = before.put_back()
        raise OutOfMemoryError(
            f"out of memory inside {type(optimizer).__name__}.step(), and again when tried once more: "
            f"{'no weight was changed' if untouched else 'weights may be partly updated'}. A smaller microbatch does "
            "not help here; what can: an optimizer with less state, or state on the host. The error itself: "
            f"{failure}"
        ) from failure


def _attempt(step: Callable[[], object]) -> Exception | None:
    try:
        step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return error
    return None


class Versions:
    """What an optimizer's parameters and state are like at a moment, by torch's own counts of writes to them.

    Args:
        optimizer: It.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = [(each, each._version) for group in optimizer.param_groups for each in group["params"]]
        self._state: dict[Any, Mapping[str, tuple[Any, int]]] = {
            parameter: {name: (value, _version(value)) for name, value in state.items()}
            for parameter, state in optimizer.state.items()
        }

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizer writes to."""
        return [each for each, _ in self._parameters]

    @property
    def stateless(self) -> bool:
        """Whether there was no state."""
        return not any(self._state.values())

    def put_back(self) -> bool:
        """Take away state that was made since.

        Returns:
            Whether all else is as it was.
        """
        if any(each._version != version for each, version in self._parameters):
            return False
        state = self._optimizer.state
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
