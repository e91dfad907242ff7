"""Copy a job's weights and optimizer state, and put them back as often as needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from microbatch.train.encode import own
from microbatch.train.state import load_model, load_optimizer, model_tensors


class Kept:
    """Copy weights, buffers and optimizer state, and set the gradients aside.

    Args:
        model: The module to be trained for a while.
        optimizers: Its optimizers.

    Cost:
        A copy of weights, buffers and optimizer state on the host.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model, self._optimizers = model, tuple(optimizers)
        tensors, self._extra = model_tensors(model)
        self._weights = {name: own(tensor) for name, tensor in tensors.items()}
        self._states = [_copied(optimizer.state_dict()) for optimizer in self._optimizers]
        # A scheduler puts a function of its own in the place of the optimizer's.
        self._steps = [vars(optimizer).get("step") for optimizer in self._optimizers]
        self._gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        for parameter, _ in self._gradients:
            parameter.grad = None

    def put_back(self, *, gradients: bool = True) -> None:
        """Put weights, buffers and optimizer state back, as often as needed.

        Args:
            gradients: Whether to put the gradients back too; if not, there are none.
        """
        load_model(self._model, self._weights, self._extra)
        for optimizer, state, step in zip(self._optimizers, self._states, self._steps, strict=True):
            load_optimizer(optimizer, _copied(state))
            vars(optimizer).pop("step", None)
            if step is not None:
                vars(optimizer)["step"] = step
        for parameter, gradient in self._gradients:
            parameter.grad = gradient if gradients else None


def _copied(node: Any) -> Any:
    """Copy nested state, tensors to the host."""
    if isinstance(node, Tensor):
        return own(node)
    if isinstance(node, dict):
        return {key: _copied(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_copied(value) for value in node]
    return node
