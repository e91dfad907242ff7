"""Where gradients add up: in `.grad`, or in a wider buffer beside it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from microbatch.errors import GradientsTouchedError

_SOME = 8  # gradients that are watched between two backwards in the middle of a window


@dataclass(frozen=True, slots=True)
class Named:
    """A trainable parameter and the name that messages call it by."""

    name: str
    parameter: nn.Parameter | Tensor


def trainable(model: nn.Module, optimizers: Iterable[Optimizer]) -> list[Named]:
    """List what a window accumulates gradients for: the model's and the optimizers' parameters, each once.

    Args:
        model: The module; its parameters come first, frozen ones left out.
        optimizers: May hold parameters that the model does not, such as a temperature in a loss module.

    Returns:
        Parameters that require a gradient now, tied ones once, in a fixed order.
    """
    found: dict[int, Named] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(id(parameter), Named(name, parameter))
    for o, optimizer in enumerate(optimizers):
        for g, group in enumerate(optimizer.param_groups):
            for p, parameter in enumerate(group["params"]):
                found.setdefault(id(parameter), Named(f"optimizer {o}, group {g}, parameter {p}", parameter))
    return [named for named in found.values() if named.parameter.requires_grad]


class GradientSum:
    """Own the gradients of a window: set aside what was there, add up, hand over, or put everything back.

    A parameter at least as wide as ``dtype`` adds up in its own `.grad`, as autograd does anyway. A narrower one
    would stop growing (a bf16 sum of ones stops at 256), so each microbatch's gradient is moved into a buffer of the
    wider dtype as soon as autograd has written it, and cast back once, for the optimizer.

    Args:
        dtype: Precision in which gradients of narrower parameters add up.

    Source:
        Laws B4, P1, P2.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._named: list[Named] = []
        self._before: list[Tensor | None] = []
        self._buffers: dict[int, Tensor] = {}
        self._widened: dict[int, int] = {}
        self._hooks: list[RemovableHandle] = []
        self._watched: Sequence[int] = ()
        self._turn = 0
        self._mark: list[Tensor | None] = []
        self._versions: list[int | None] = []

    def open(self, named: Sequence[Named]) -> None:
        """Begin with no gradient, keeping references to those that are there.

        Args:
            named: The window's parameters.
        """
        self._named = list(named)
        self._before = [each.parameter.grad for each in named]
        self._buffers = {}
        self._watched = range(len(named))
        self._widened = {}
        self._mark = [None] * len(named)
        self._versions = [None] * len(named)
        for index, each in enumerate(named):
            each.parameter.grad = None
            if torch.promote_types(each.parameter.dtype, self._dtype) != each.parameter.dtype:
                self._widen(index, each.parameter)

    def mark(self, *, some: bool = False) -> None:
        """Remember what the sums look like after a backward.

        Args:
            some: Only of a few parameters, others each time. What touches every gradient, as zero_grad() does, is
                seen at once even so.

        Cost:
            A microsecond for each that is looked at, since after a backward none of them is in the cache.
        """
        number = len(self._named)
        first, self._turn = self._turn, self._turn + _SOME
        self._watched = [(first + i) % number for i in range(_SOME)] if some and number > _SOME else range(number)
        # Held until the next look; not longer, because a sum that somebody holds is copied when it is put back.
        self._mark = self._sums(self._watched)
        self._versions = _versions(self._mark)

    def check_untouched(self) -> None:
        """Refuse to go on when something else has written to the gradients since `mark`, or since the window opened.

        Raises:
            GradientsTouchedError: They were zeroed, clipped, or added to by another backward.
        """
        sums = self._sums(self._watched)
        versions = _versions(sums)
        if all(map(operator.is_, sums, self._mark)) and versions == self._versions:
            self._watched, self._mark, self._versions = (), [], []
            return
        now, marked = zip(sums, versions, strict=True), zip(self._mark, self._versions, strict=True)
        for index, (total, version), (total_then, version_then) in zip(self._watched, now, marked, strict=True):
            if total is not total_then or version != version_then:
                raise GradientsTouchedError(
                    f"the gradient of {self._named[index].name!r} was changed inside the window by something other "
                    "than window.backward: zero_grad(), clip_grad_norm_() and loss.backward() do not belong there; "
                    "the window zeroes, clips (max_grad_norm=) and adds up by itself"
                )

    def widens(self, parameter: Tensor) -> bool:
        """Tell whether a parameter's gradients add up in a wider buffer.

        Args:
            parameter: One of the window's.

        Returns:
            False where they add up in its own `.grad`.
        """
        return id(parameter) in self._widened

    def is_watched(self, parameter: Tensor) -> bool:
        """Tell whether somebody else waits for a parameter's gradient to have been accumulated.

        Args:
            parameter: One that `widens`.

        Returns:
            Whether it has hooks beside the window's own.
        """
        return len(parameter._post_accumulate_grad_hooks or ()) > 1  # pyright: ignore[reportPrivateUsage]

    def wide_sum(self, parameter: Tensor) -> Tensor:
        """Return the wider buffer of a parameter, made of zeros where there is none yet.

        Args:
            parameter: One that `widens`.

        Returns:
            The buffer, to be added to in place; shape of the parameter.
        """
        index = self._widened[id(parameter)]
        if index not in self._buffers:
            self._buffers[index] = torch.zeros_like(parameter, dtype=self._dtype, requires_grad=False)
        return self._buffers[index]

    def gradients(self) -> list[tuple[Named, Tensor]]:
        """List what has added up.

        Returns:
            Each parameter that got a gradient with its sum, in the wider dtype where there is one.
        """
        return [(each, total) for each, total in zip(self._named, self._all(), strict=True) if total is not None]

    @property
    def present(self) -> list[bool]:
        """Which parameters, in the order of `open`, have a gradient."""
        return [total is not None for total in self._all()]

    def fill(self, wanted: Sequence[bool]) -> None:
        """Give a sum of zero, dense, to parameters that got no gradient here but did on another rank.

        Args:
            wanted: For each parameter in the order of `open`, whether any rank has a gradient for it.
        """
        for index, (each, want) in enumerate(zip(self._named, wanted, strict=True)):
            parameter = each.parameter
            wide = torch.promote_types(parameter.dtype, self._dtype)
            if want and index not in self._buffers and parameter.grad is None:
                zeros = torch.zeros_like(parameter, dtype=wide, requires_grad=False)
                if wide == parameter.dtype:
                    parameter.grad = zeros
                else:
                    self._buffers[index] = zeros
            elif parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()

    def coalesce(self) -> None:
        """Add up the parts of sparse gradients, so that norms and factors see each value once."""
        for each in self._named:
            grad = each.parameter.grad
            if grad is not None and grad.is_sparse and not grad.is_coalesced():
                each.parameter.grad = grad.coalesce()
        for index, total in self._buffers.items():
            if total.is_sparse and not total.is_coalesced():
                self._buffers[index] = total.coalesce()

    def hand_over(self) -> None:
        """Give every sum to its parameter as `.grad`, in the parameter's dtype, and let go of the wide buffers."""
        self._remove_hooks()
        for index in list(self._buffers):
            parameter = self._named[index].parameter
            parameter.grad = self._buffers.pop(index).to(parameter.dtype)

    def clear(self) -> None:
        """End the window with no gradient anywhere."""
        self._end()
        for each in self._named:
            each.parameter.grad = None
        self._before = []

    def put_back(self) -> None:
        """End the window with the gradients that were there before it."""
        self._end()
        for each, grad in zip(self._named, self._before, strict=True):
            each.parameter.grad = grad
        self._before = []

    def _all(self) -> list[Tensor | None]:
        return self._sums(range(len(self._named)))

    def _sums(self, indices: Iterable[int]) -> list[Tensor | None]:
        named, buffers = self._named, self._buffers
        return [buffers[index] if index in buffers else named[index].parameter.grad for index in indices]

    def _widen(self, index: int, parameter: Tensor) -> None:
        def move(parameter: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            if grad is None:
                return
            if index in self._buffers:
                self._buffers[index].add_(grad)
            else:
                self._buffers[index] = grad.to(self._dtype)

        self._widened[id(parameter)] = index
        self._hooks.append(parameter.register_post_accumulate_grad_hook(move))

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _end(self) -> None:
        self._remove_hooks()
        self._buffers = {}
        self._watched, self._mark, self._versions = (), [], []


def _versions(gradients: Sequence[Tensor | None]) -> list[int | None]:
    return [None if gradient is None else gradient._version for gradient in gradients]
