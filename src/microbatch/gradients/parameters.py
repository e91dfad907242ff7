"""The trainable parameters of a window, with the names that error messages use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Named:
    """A trainable parameter and its name in error messages."""

    name: str
    parameter: nn.Parameter | Tensor


def trainable(model: nn.Module, optimizers: Iterable[Optimizer]) -> list[Named]:
    """List the parameters that a window accumulates gradients for: the model's and the optimizers', each once.

    Args:
        model: The model. Its parameters come first.
        optimizers: Their parameters come next. They may hold some that the model does not, such as the temperature of a
            loss module.

    Returns:
        Every parameter with ``requires_grad`` set, in a fixed order; a tied parameter appears once.
    """
    found: dict[int, Named] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(id(parameter), Named(name, parameter))
    for o, optimizer in enumerate(optimizers):
        for g, group in enumerate(optimizer.param_groups):
            for p, parameter in enumerate(group["params"]):
                found.setdefault(id(parameter), Named(f"optimizer {o}, group {g}, parameter {p}", parameter))
    return [named for named in found.values() if named.parameter.requires_grad]
