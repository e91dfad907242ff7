"""Where gradients add up: in `.grad`, in a wider buffer beside it, or in the optimizer's own state."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from microbatch.errors import GradientsTouchedError
from microbatch.gradients.bfloat16_sums import NarrowSum
from microbatch.gradients.clipping import scale_
from microbatch.gradients.momentum_buffer import Fold
from microbatch.gradients.parameters import Named

_SOME = 8  # gradients that are watched between two backwards in the middle of a window


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
    wider dtype as soon as autograd has written it, and cast back once, for the optimizer. Where there is no room for
    that, a bfloat16 one's may go on growing in bfloat16; and where an optimizer's state is linear in the gradient, they
    add up in there.

    Args:
        dtype: Precision in which gradients of narrower parameters add up.
        narrow: Makes, of its first gradient, the sum of a bfloat16 parameter that does not widen; `None` where `.grad`
            is that.
        fold: Adds gradients up inside optimizers' states; `None` for none of them.

    Source:
        Laws B4, P1, P2.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        narrow: Callable[[Tensor], NarrowSum] | None = None,
        fold: Fold | None = None,
    ) -> None:
        self._dtype = dtype
        self._narrow = narrow
        self._fold = fold
        self._narrow_sums: dict[int, NarrowSum] = {}
        self._named: list[Named] = []
        self._before: list[Tensor | None] = []
        self._buffers: dict[int, Tensor] = {}
        self._widened: dict[int, int] = {}
        self._hooks: list[RemovableHandle] = []
        self._begun = False
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
        self._narrow_sums = {}
        self._begun = False
        self._watched = range(len(named))
        self._widened = {}
        self._mark = [None] * len(named)
        self._versions = [None] * len(named)
        for index, each in enumerate(named):
            each.parameter.grad = None
            widens = torch.promote_types(each.parameter.dtype, self._dtype) != each.parameter.dtype
            if widens or self._is_narrow(each.parameter):
                self._widen(index, each.parameter)

    def begin(self, factor: float) -> None:
        """Let sums begin that begin with an optimizer's state, before the first backward.

        Args:
            factor: What the finished gradient will be multiplied with, as far as that is known.

        Cost:
            Nothing, unless gradients add up in states: see `Fold.begin`.
        """
        if self._fold is not None and not self._begun:
            self._begun = True
            self._fold.begin((each.parameter for each in self._named), factor)
            self.mark()

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
        """Tell whether a parameter's gradients add up where autograd does not put them.

        Args:
            parameter: One of the window's.

        Returns:
            False where they add up in its own `.grad`, and in nothing else.
        """
        return id(parameter) in self._widened or (self._fold is not None and self._fold.holds(parameter))

    def is_watched(self, parameter: Tensor) -> bool:
        """Tell whether somebody else waits for a parameter's gradient to have been accumulated.

        Args:
            parameter: One that `widens`.

        Returns:
            Whether it has hooks beside the window's own.
        """
        own = int(id(parameter) in self._widened)
        return len(parameter._post_accumulate_grad_hooks or ()) > own  # pyright: ignore[reportPrivateUsage]

    def narrow_sum(self, parameter: Tensor) -> NarrowSum | None:
        """Return the sum of a parameter whose gradients add up in bfloat16, made of zeros where there is none yet.

        Args:
            parameter: One that `widens`.

        Returns:
            What to add to, instead of `wide_sum`; `None` where that is it.
        """
        index = self._widened.get(id(parameter))
        if index is None or self._narrow is None or not self._is_narrow(parameter):
            return None
        if index not in self._narrow_sums:
            self._add_narrow(index, torch.zeros_like(parameter, requires_grad=False))
        return self._narrow_sums[index]

    def wide_sum(self, parameter: Tensor) -> Tensor:
        """Return the buffer of a parameter, made of zeros where there is none yet.

        Args:
            parameter: One that `widens`.

        Returns:
            The buffer, to be added to in place; shape of the parameter.
        """
        index = self._widened.get(id(parameter))
        if index is None:
            assert parameter.grad is not None  # noqa: S101 - the state that it `holds`
            return parameter.grad
        if index not in self._buffers:
            self._buffers[index] = torch.zeros_like(parameter, dtype=self._dtype, requires_grad=False)
        return self._buffers[index]

    def stand_in(self, parameter: Tensor) -> Tensor | None:
        """Return what one microbatch uses in the place of a parameter, where one backward is for several of them.

        Autograd adds up the gradients of one backward in the parameter's own dtype. What stands in for a narrow
        parameter gives its microbatch's gradient to the wider buffer instead.

        Args:
            parameter: One of the window's.

        Returns:
            A view of it, or `None` where nothing is lost, or somebody else waits for its gradient.
        """
        index = self._widened.get(id(parameter))
        if index is None or self.is_watched(parameter):
            return None
        view = cast("Tensor", _Tap.apply(parameter, partial(self._add_wide, index, parameter)))
        node: Any = view.grad_fn
        # As soon as it can, as autograd accumulates. Private to torch, and of memory alone.
        if hasattr(node, "_set_sequence_nr"):
            node._set_sequence_nr((1 << 64) - 1)
        return view

    def gradients(self) -> list[tuple[Named, Tensor]]:
        """List what has added up.

        Returns:
            Each parameter that got a gradient with its sum, in the wider dtype where there is one.
        """
        return [(each, total) for each, total in zip(self._named, self._all(), strict=True) if total is not None]

    @property
    def present(self) -> list[bool]:
        """Which parameters, in the order of `open`, have a gradient."""
        return [
            total is not None and not (self._fold is not None and self._fold.is_untouched(each.parameter))
            for each, total in zip(self._named, self._all(), strict=True)
        ]

    def fill(self, wanted: Sequence[bool]) -> None:
        """Give a sum of zero, dense, to parameters that got no gradient here but did on another rank.

        Args:
            wanted: For each parameter in the order of `open`, whether any rank has a gradient for it.
        """
        self.drop(wanted)
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

    def drop(self, wanted: Sequence[bool]) -> None:
        """Leave out what began as an optimizer's state and got no gradient, here or on another rank.

        Args:
            wanted: For each parameter in the order of `open`, whether there is a gradient for it.
        """
        for each, want in zip(self._named, wanted, strict=True):
            if not want and self._fold is not None and self._fold.is_untouched(each.parameter):
                self._fold.drop(each.parameter)

    @property
    def named(self) -> Sequence[Named]:
        """The window's parameters, in the order of `open`."""
        return self._named

    def leave_out(self, wanted: Sequence[bool]) -> None:
        """Leave out sums of zeros, of parameters that no rank has a gradient for.

        Args:
            wanted: For each parameter in the order of `open`, whether any rank has one.
        """
        for index, (each, want) in enumerate(zip(self._named, wanted, strict=True)):
            if not want:
                self._buffers.pop(index, None)
                each.parameter.grad = None

    def settle(self, factor: float) -> None:
        """Learn what the finished gradient will be multiplied with.

        Args:
            factor: Known for certain, as `begin` may not have known it.
        """
        if self._fold is not None:
            self._fold.settle(factor)

    def scale_(self, factor: float) -> None:
        """Multiply every sum with one number, in place.

        Args:
            factor: Normalisation, rank average and clipping folded into one.

        Cost:
            One pass over the gradients; none for a factor of 1.
        """
        if factor == 1.0:
            return
        for each in self._narrow_sums.values():
            each.scale_(factor)
        others = (total for index, total in enumerate(self._all()) if index not in self._narrow_sums)
        scale_([total for total in others if total is not None], factor)

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
        self._narrow_sums = {}
        if self._fold is not None:
            self._fold.finish()

    def step(self, optimizer: Optimizer, step: Callable[[], object]) -> None:
        """Let an optimizer step with what was handed over.

        Args:
            optimizer: The optimizer.
            step: Takes its step.
        """
        if self._fold is None:
            step()
            return
        with self._fold.stepping(optimizer):
            step()

    def put_states_back(self) -> None:
        """Give the optimizers the states that they had, where gradients were added to them."""
        if self._fold is not None:
            self._fold.put_back()

    def zeros(self, index: int) -> Tensor:
        """Make a sum of nothing.

        Args:
            index: Of the parameter, in the order of `open`.

        Returns:
            Zeros of its shape, dense, in the dtype in which its gradients add up; expanded from one number.
        """
        parameter = self._named[index].parameter
        dtype = torch.promote_types(parameter.dtype, self._dtype)
        return torch.zeros((), dtype=dtype, device=parameter.device).expand(parameter.shape)

    def take(self) -> list[Tensor | None]:
        """Take away what has added up, so that what comes next begins a sum of its own.

        Returns:
            For each parameter in the order of `open`, the sum, dense; `None` where there is none.
        """
        found = [None if total is None else total.to_dense() if total.is_sparse else total for total in self._all()]
        self._buffers = {}
        for each in self._named:
            each.parameter.grad = None
        self.mark()
        return found

    def give(self, totals: Sequence[Tensor | None]) -> None:
        """Put sums in the place of what has added up.

        Args:
            totals: As `take` returns them.
        """
        for index, (each, total) in enumerate(zip(self._named, totals, strict=True)):
            if total is not None and total.dtype != each.parameter.dtype:
                self._buffers[index] = total
            else:
                each.parameter.grad = total

    def clear(self) -> None:
        """End the window with no gradient anywhere."""
        self._end()
        if self._fold is not None:
            self._fold.end()
        for each in self._named:
            each.parameter.grad = None
        self._before = []

    def put_back(self) -> None:
        """End the window with the gradients, and the optimizer's states, that were there before it."""
        self._end()
        self.put_states_back()
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
            if grad is not None:
                self._add_wide(index, parameter, grad)

        self._widened[id(parameter)] = index
        self._hooks.append(parameter.register_post_accumulate_grad_hook(move))

    def _is_narrow(self, parameter: Tensor) -> bool:
        return self._narrow is not None and parameter.dtype == self._dtype == torch.bfloat16

    def _add_narrow(self, index: int, grad: Tensor) -> None:
        grad = grad.to_dense() if grad.is_sparse else grad
        if index in self._narrow_sums:
            self._narrow_sums[index].add_(grad)
        elif self._narrow is not None:
            self._narrow_sums[index] = self._narrow(grad)
            self._buffers[index] = self._narrow_sums[index].total

    def _add_wide(self, index: int, parameter: Tensor, grad: Tensor) -> None:
        if self._is_narrow(parameter):
            self._add_narrow(index, grad)
        elif index in self._buffers:
            self._buffers[index].add_(grad)
        else:
            self._buffers[index] = grad.to(self._dtype)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _end(self) -> None:
        self._remove_hooks()
        self._buffers, self._narrow_sums = {}, {}
        self._watched, self._mark, self._versions = (), [], []


class _Tap(torch.autograd.Function):
    """Passes a parameter on, and gives its gradient to somebody else than autograd."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        ctx.take = take
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.take(grads[0])
        return None, None


def _versions(gradients: Sequence[Tensor | None]) -> list[int | None]:
    return [None if gradient is None else gradient._version for gradient in gradients]
