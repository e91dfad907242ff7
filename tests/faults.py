"""Memory that ends at a chosen operator, or in backward."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1.00 GiB")


class RunsOut(TorchDispatchMode):
    """Refuse the n-th operator that asks for memory, instead of running it; once for each number given.

    The count begins when a loss function is first called, and ends where ranks talk or the optimizer begins.
    """

    def __init__(self, *at: int, error: BaseException = FULL) -> None:
        super().__init__()
        self.at = set(at)
        self.error = error
        self.asked = 0
        self.armed = False
        self.refused: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.armed = self.armed and func.namespace != "c10d"
        asks = not (func._schema.is_mutable or func.is_view or func.namespace == "profiler")
        if self.armed and asks:
            self.asked += 1
            if self.asked in self.at:
                self.refused.append(str(func))
                self.armed = False  # until the loss is asked for again
                raise copy.copy(self.error)
        return func(*args, **(kwargs or {}))


class EndsAt(TorchDispatchMode):
    """Refuse the n-th operator inside the block, whichever it is; count the operators.

    Args:
        at: The operator, from 0; -1 for none.
    """

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.operators, self.refused = at, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        if self.operators - 1 == self.at:
            self.refused = str(func)
            raise copy.copy(FULL)
        return func(*args, **(kwargs or {}))


class FullInBackward(torch.autograd.Function):
    """Return a tensor as it is, and end in backward as memory does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - the signature is autograd's
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004 - likewise
        raise copy.copy(FULL)
