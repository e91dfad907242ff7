"""What one forward pass does: the statistics it takes, the random numbers it draws, and how precisely it computes."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from microbatch.checking.switches import Frozen, Statistics, is_random
from microbatch.loss.loss import Loss
from microbatch.memory.module_of_op import Where


@dataclass(frozen=True, slots=True)
class Survey:
    """Say what one forward pass over the whole batch did.

    Attributes:
        statistics: Of every batch normalisation that took them from its batch, by module.
        random: Modules that drew random numbers; ``"loss"`` for what is outside of all of them.
        narrowest: Narrowest floating-point precision that was computed in.
        divisors: By term of the loss, the number by which the last operation divided it; a plain loss is the term "".
    """

    statistics: Statistics
    random: tuple[str, ...]
    narrowest: torch.dtype
    divisors: Mapping[str, float]


def survey(where: Where, forward: Callable[[], object]) -> Survey:
    """Look at a forward pass.

    Args:
        where: Which module runs.
        forward: Runs it.

    Returns:
        What it did.
    """
    before = _host_random()
    look, statistics, divisions = _Look(where), Frozen(where), _Divisions()
    with torch.no_grad(), statistics, divisions, look:
        returned = forward()
    drawn = list(look.random)
    if _host_random() != before and not drawn:
        drawn = ["python's or numpy's own random numbers"]
    return Survey(dict(statistics.seen), tuple(drawn), look.narrowest, divisions.of(returned))


def draw_apart(device: torch.device) -> None:
    """Draw a number from every generator, so that what follows is another draw than the whole batch's.

    From the same state, a CPU draws the same for one dropout layer however the batch is cut: luck, which no second
    layer has, nor another device.

    Args:
        device: The device whose generator is meant beside the host's.
    """
    torch.rand((), device=device)
    random.random()  # noqa: S311 - nothing secret
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.random()


class _Divisions(TorchFunctionMode):
    """Write down which single numbers were divided by a number, unless what was divided is a sum of terms."""

    def __init__(self) -> None:
        super().__init__()
        self._divided: dict[int, tuple[Tensor, float]] = {}  # with the tensor, so that no other has its id
        self._sums: dict[int, Tensor] = {}

    def __torch_function__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and record what it divides and adds."""
        out = func(*args, **(kwargs or {}))
        if not (isinstance(out, Tensor) and out.ndim == 0 and len(args) > 1 and isinstance(args[0], Tensor)):
            return out
        if func in _ADDS:
            self._sums[id(out)] = out
        elif func in _DIVIDES and isinstance(args[1], int | float) and id(args[0]) not in self._sums:
            self._divided[id(out)] = out, float(args[1])
        return out

    def of(self, returned: object) -> dict[str, float]:
        """Return the divisors of what a loss function returned, by term."""
        terms = returned if isinstance(returned, Mapping) else {"": returned}
        sums = {str(name): each.sum if isinstance(each, Loss) else each for name, each in terms.items()}
        return {name: self._divided[id(each)][1] for name, each in sums.items() if id(each) in self._divided}


_ADDS = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})
_DIVIDES = frozenset({torch.div, torch.true_divide, Tensor.div, Tensor.div_, Tensor.true_divide, Tensor.__truediv__})


class _Look(TorchDispatchMode):
    """Write down which modules draw random numbers, and in which precision is computed."""

    def __init__(self, where: Where) -> None:
        super().__init__()
        self.random: dict[str, None] = {}
        self.narrowest = torch.float64
        self._where = where

    def __torch_dispatch__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Look at an operator, and run it."""
        out = func(*args, **(kwargs or {}))
        if is_random(func, args, kwargs or {}):
            self.random[self._where.here()[0] or "loss"] = None
        for each in tree_leaves(out):
            # Single numbers are counts and constants more often than what is computed.
            if isinstance(each, Tensor) and (each.is_floating_point() or each.is_complex()) and each.numel() > 1:
                self.narrowest = max(self.narrowest, each.dtype.to_real(), key=lambda dtype: torch.finfo(dtype).eps)
        return out


def _host_random() -> bytes:
    numpy: Any = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    return pickle.dumps((random.getstate(), numpy))
