"""The trainable parameters of a window, with the names that error messages use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Named:
    """A trainable parameter and its name in error messages.

    Attributes:
        name: The name.
        parameter: The parameter.
        held: Whether an optimizer steps it, or there is no optimizer.
    """

    name: str
    parameter: nn.Parameter | Tensor
    held: bool = True


def trainable(model: nn.Module, optimizers: Iterable[Optimizer]) -> list[Named]:
    """List the parameters that a window accumulates gradients for: the model's and the optimizers', each once.

    Args:
        model: The model. Its parameters come first.
        optimizers: Their parameters come next. They may hold some that the model does not, such as the temperature of a
            loss module.

    Returns:
        Every parameter with ``requires_grad`` set, in a fixed order; a tied parameter appears once.
    """
    stepped = {
        id(parameter): Named(f"optimizer {o}, group {g}, parameter {p}", parameter)
        for o, optimizer in enumerate(optimizers)
        for g, group in enumerate(optimizer.param_groups)
        for p, parameter in enumerate(group["params"])
    }
    found: dict[int, Named] = {}
    for name, parameter in model.named_parameters():
        key = id(parameter)
        found.setdefault(key, Named(name, parameter, held=key in stepped or not stepped))
    for key, named in stepped.items():
        found.setdefault(key, named)
    return [named for named in found.values() if named.parameter.requires_grad]
