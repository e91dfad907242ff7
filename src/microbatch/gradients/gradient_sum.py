"""The gradients of one window: added up in `.grad`, in a wider buffer, or in the optimizer's momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.optim import Optimizer

from microbatch.gradients.bfloat16_sums import Compensated
from microbatch.gradients.clipping import scale_
from microbatch.gradients.gradient_changes import WatchedSums
from microbatch.gradients.momentum_buffer import Fold
from microbatch.gradients.parameters import Named
from microbatch.gradients.wide_buffers import WideBuffers

_GRAD, _VERSION = attrgetter("grad"), attrgetter("_version")


class GradientSum(WatchedSums):
    """Add up a window's gradients, and either hand the sums to the optimizer or restore what `.grad` held before.

    A parameter at least as wide as ``dtype`` accumulates in its own `.grad`, as autograd does anyway. A narrower sum
    would stop growing: a bf16 sum of ones stops at 256. So a hook moves a narrower parameter's gradients into a wider
    buffer as soon as autograd has written them. The sum is cast back once, for the optimizer. If memory does not allow
    a wider buffer, a bfloat16 sum with extra precision can take its place. If the optimizer's state is linear in the
    gradient, gradients can add up in that state.

    Args:
        dtype: Precision in which gradients of narrower parameters add up.
        narrow: Makes the sum of a bfloat16 parameter from its first gradient, if ``dtype`` is bfloat16 too. `None` to
            add such gradients up in `.grad`.
        fold: Adds gradients up in the optimizers' states; `None` to leave the states alone.

    Attributes:
        is_folded: Whether gradients add up in an optimizer's state.

    Source:
        Laws B4, P1, P2.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        narrow: Callable[[Tensor], Compensated] | None = None,
        fold: Fold | None = None,
    ) -> None:
        super().__init__()
        self._wide = WideBuffers(dtype, narrow=narrow)
        self._fold, self.is_folded = fold, fold is not None
        self._parameters: list[Tensor] = []
        self._before: list[Tensor | None] = []
        self._begun = False

    def open(self, named: Sequence[Named]) -> None:
        """Start a window without gradients; references to the present ones are kept for `put_back`.

        Args:
            named: The window's parameters.
        """
        self._named, self._parameters = named, [each.parameter for each in named]
        self._before, self._begun = list(map(_GRAD, self._parameters)), False
        for parameter in self._parameters:
            parameter.grad = None
        self._watched, self._mark, self._versions = slice(None), [None] * len(named), []
        self._wide.open(self._named)

    def begin(self, factor: Callable[[], float]) -> None:
        """Start the sums that begin with an optimizer's state, before the first backward.

        Args:
            factor: Returns what the finished gradient will be multiplied with, or an estimate of it.

        Cost:
            Nothing, unless gradients add up in optimizers' states: see `Fold.begin`.
        """
        if self._fold is not None and not self._begun:
            self._begun = True
            self._fold.begin((each.parameter for each in self._named), factor())
            self.mark()

    def widens(self, parameter: Tensor) -> bool:
        """Return whether a parameter's gradients add up in a wider buffer or in an optimizer's state.

        Args:
            parameter: One of the window's.

        Returns:
            False if they add up in `.grad` alone.
        """
        return self._wide.holds(parameter) or (self._fold is not None and self._fold.holds(parameter))

    def is_watched(self, parameter: Tensor) -> bool:
        """Return whether a parameter has post-accumulate hooks besides the window's own.

        Args:
            parameter: A parameter that `widens`.

        Returns:
            Whether someone else must see each gradient that autograd accumulates.
        """
        return self._wide.is_watched(parameter)

    def narrow_sum(self, parameter: Tensor) -> Compensated | None:
        """Return a parameter's bfloat16 sum with extra precision, made of zeros if there is none yet.

        Args:
            parameter: A parameter that `widens`.

        Returns:
            The sum to add to; `None` if `wide_sum` is the one to add to.
        """
        return self._wide.narrow_sum(parameter)

    def wide_sum(self, parameter: Tensor) -> Tensor:
        """Return the tensor in which a parameter's gradients add up, made of zeros if there is none yet.

        Args:
            parameter: A parameter that `widens`.

        Returns:
            The wider buffer or the optimizer's state, to be added to in place; shape of the parameter.
        """
        total = self._wide.wide_sum(parameter)
        if total is None:
            total = parameter.grad
        assert total is not None  # noqa: S101 - the optimizer's state, which `Fold.begin` has put into `.grad`
        return total

    def stand_in(self, parameter: Tensor) -> Tensor | None:
        """Make a view of a parameter for one of several microbatches that share one backward.

        Within one backward, autograd adds up a parameter's gradients in the parameter's own dtype. The view passes its
        microbatch's gradient to the wider buffer instead.

        Args:
            parameter: One of the window's.

        Returns:
            The view; `None` if `.grad` is wide enough, or someone else's hook must see the gradient.
        """
        return self._wide.stand_in(parameter)

    def gradients(self) -> list[tuple[Named, Tensor]]:
        """List the sums.

        Returns:
            Each parameter that has a gradient, with its sum: the wider buffer if there is one, otherwise `.grad`.
        """
        return [(each, total) for each, total in zip(self._named, self._all(), strict=True) if total is not None]

    def held(self) -> list[tuple[Named, Tensor]]:
        """List the sums of the parameters that an optimizer steps, as `gradients` does."""
        return [(each, total) for each, total in self.gradients() if each.held]

    def held_sums(self) -> list[Tensor]:
        """List the sums of `held` alone."""
        pairs = zip(self._named, self._all(), strict=True)
        return [total for each, total in pairs if total is not None and each.held]

    def without_states(self, factor: float) -> Iterator[tuple[Named, Tensor]]:
        """Yield what `held` lists, without the optimizers' states; ``factor`` is what finishes the gradient."""
        for each, total in self.held():
            yield each, total if self._fold is None else self._fold.without_state(each.parameter, total, factor)

    @property
    def present(self) -> list[bool]:
        """Whether each parameter, in the order of `open`, got a gradient."""
        found, fold = [total is not None for total in self._all()], self._fold
        if fold is not None:
            pairs = zip(found, self._named, strict=True)
            found = [present and not fold.is_untouched(each.parameter) for present, each in pairs]
        return found

    @property
    def sparse(self) -> list[bool]:
        """Whether each parameter's sum, in the order of `open`, is sparse; empty if none is."""
        found = [total is not None and total.is_sparse for total in self._all()]
        return found if any(found) else []

    def fill(self, wanted: Sequence[bool], sparse: Sequence[bool] = ()) -> None:
        """Make zero sums for parameters that got a gradient only on other ranks, and make sums dense.

        Args:
            wanted: For each parameter in the order of `open`, whether any rank has a gradient for it.
            sparse: For each, whether its sum stays sparse, and is missing where this rank has none; empty for none.
        """
        self.drop(wanted)
        totals = self._all()
        for index, (each, want) in enumerate(zip(self._named, wanted, strict=True)):
            total = totals[index]
            if not want or (sparse and sparse[index]):
                continue
            if total is None:
                dtype = self._wide.dtype_of(each.parameter)
                self.put(index, torch.zeros_like(each.parameter, dtype=dtype, requires_grad=False))
            elif total.is_sparse:
                self.put(index, total.to_dense())

    def put(self, index: int, total: Tensor) -> None:
        """Replace the sum of one parameter.

        Args:
            index: The parameter's, in the order of `open`.
            total: The new sum, in the dtype in which the parameter's gradients add up.
        """
        self._wide.narrow_sums.pop(index, None)
        if index in self._wide.totals or total.dtype != self._named[index].parameter.dtype:
            self._wide.totals[index] = total
        else:
            self._named[index].parameter.grad = total

    def drop(self, wanted: Sequence[bool]) -> None:
        """Restore the optimizer's state of parameters that got no gradient on any rank.

        Args:
            wanted: For each parameter in the order of `open`, whether there is a gradient for it.
        """
        for each, want in zip(self._named, wanted, strict=True):
            if not want and self._fold is not None and self._fold.is_untouched(each.parameter):
                self._fold.drop(each.parameter)

    def drop_untouched(self) -> None:
        """Restore the optimizer's state of parameters that got no gradient."""
        if self._fold is not None:
            self.drop(self.present)

    @property
    def versions(self) -> list[int]:
        """The version counter of each parameter, in the order of `open`."""
        return list(map(_VERSION, self._parameters))

    @property
    def named(self) -> Sequence[Named]:
        """The window's parameters, in the order of `open`."""
        return self._named

    def leave_out(self, wanted: Sequence[bool]) -> None:
        """Remove the zero sums of parameters that no rank has a gradient for.

        Args:
            wanted: For each parameter in the order of `open`, whether any rank has one.
        """
        for index, (each, want) in enumerate(zip(self._named, wanted, strict=True)):
            if not want:
                self._wide.totals.pop(index, None)
                each.parameter.grad = None

    def settle(self, factor: float) -> None:
        """Correct the sums in optimizers' states for the final factor.

        Args:
            factor: What the finished gradient is multiplied with; `begin` may have had an estimate only.
        """
        if self._fold is not None:
            self._fold.settle(factor)

    def scale_(self, factor: float) -> None:
        """Multiply every sum by one number, in place.

        Args:
            factor: The product of normalisation, rank average and clipping.

        Cost:
            One pass over the gradients; none for a factor of 1.
        """
        if factor == 1.0:
            return
        narrow_sums = self._wide.narrow_sums
        for each in narrow_sums.values():
            each.scale_(factor)
        others = (total for index, total in enumerate(self._all()) if index not in narrow_sums)
        scale_([total for total in others if total is not None], factor)

    def coalesce(self) -> None:
        """Coalesce sparse gradients, so that norms and factors see each value once."""
        for each in self._named:
            grad = each.parameter.grad
            if grad is not None and grad.is_sparse and not grad.is_coalesced():
                each.parameter.grad = grad.coalesce()
        self._wide.coalesce()

    def hand_over(self) -> None:
        """Cast every sum to its parameter's dtype, store it in `.grad`, and free the wider buffers."""
        self._wide.remove_hooks()
        totals = self._wide.totals
        for index in list(totals):
            parameter = self._named[index].parameter
            parameter.grad = totals.pop(index).to(parameter.dtype)
        self._wide.narrow_sums = {}
        if self._fold is not None:
            self._fold.finish()

    def step(self, optimizer: Optimizer, step: Callable[[], object]) -> None:
        """Run an optimizer's step with the gradients that `hand_over` has stored.

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
        """Restore the optimizers' states in which gradients were added up."""
        if self._fold is not None:
            self._fold.put_back()

    def zeros(self, index: int) -> Tensor:
        """Make a zero gradient.

        Args:
            index: The parameter's, in the order of `open`.

        Returns:
            Dense zeros of the parameter's shape, in the dtype in which its gradients add up; expanded from one number.
        """
        parameter = self._named[index].parameter
        return torch.zeros((), dtype=self._wide.dtype_of(parameter), device=parameter.device).expand(parameter.shape)

    def take(self) -> list[Tensor | None]:
        """Remove the sums and return them, so that the next gradients start new ones.

        Returns:
            For each parameter in the order of `open`, the sum, dense; `None` if there is none.
        """
        found = [None if total is None else total.to_dense() if total.is_sparse else total for total in self._all()]
        self._wide.totals = {}
        for each in self._named:
            each.parameter.grad = None
        self.mark()
        return found

    def give(self, totals: Sequence[Tensor | None]) -> None:
        """Replace the sums.

        Args:
            totals: As `take` returns them.
        """
        for index, (each, total) in enumerate(zip(self._named, totals, strict=True)):
            if total is not None and total.dtype != each.parameter.dtype:
                self._wide.totals[index] = total
            else:
                each.parameter.grad = total

    def clear(self) -> None:
        """End the window with every `.grad` set to `None`; `put_back` can still undo it."""
        self._end()
        if self._fold is not None:
            self._fold.end()
        for parameter in self._parameters:
            parameter.grad = None

    def leave(self) -> None:
        """End the window with the gradients that were handed over; `put_back` can still undo it."""
        self._end()

    def put_back(self) -> None:
        """End the window with the gradients, and the optimizer's states, from before it."""
        self._end()
        self.put_states_back()
        for each, grad in zip(self._named, self._before, strict=False):  # none, if it was undone already
            each.parameter.grad = grad
        self._before = []

    def _all(self) -> list[Tensor | None]:
        return self._sums(slice(None))

    def _sums(self, some: slice) -> list[Tensor | None]:
        found, totals = list(map(_GRAD, self._parameters[some])), self._wide.totals
        if totals:
            indices = range(len(self._parameters))[some]
            found = [totals.get(index, grad) for index, grad in zip(indices, found, strict=True)]
        return found

    def _end(self) -> None:
        self._wide.close()
        self._mark = None
