"""Buffers in which gradients add up outside of `.grad`: in a wider dtype, or in a bfloat16 sum with extra precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from microbatch.devices.captured_graphs import kept
from microbatch.gradients.bfloat16_sums import Compensated
from microbatch.gradients.parameters import Named


class WideBuffers:
    """Move each microbatch's gradient from `.grad` into a buffer, for parameters that are narrower than ``dtype``.

    A post-accumulate hook on each such parameter moves the gradient as soon as autograd has written it.

    Args:
        dtype: Precision in which the gradients of narrower parameters add up.
        narrow: Makes the sum of a bfloat16 parameter from its first gradient, if ``dtype`` is bfloat16 too. `None` to
            add such gradients up in `.grad`.

    Attributes:
        totals: The sum of each parameter that has one, by the parameter's index.
        narrow_sums: Of those, the bfloat16 sums with extra precision.
    """

    def __init__(self, dtype: torch.dtype, *, narrow: Callable[[Tensor], Compensated] | None) -> None:
        self._dtype = dtype
        self._narrow = narrow
        self.totals: dict[int, Tensor] = {}
        self.narrow_sums: dict[int, Compensated] = {}
        self._indices: dict[int, int] = {}
        self._hooks: list[RemovableHandle] = []

    def open(self, named: Sequence[Named]) -> None:
        """Start a window without sums, and install the hooks."""
        self.totals, self.narrow_sums, self._indices = {}, {}, {}
        for index, each in enumerate(named):
            dtype = each.parameter.dtype
            if (dtype != self._dtype and self.dtype_of(each.parameter) != dtype) or self._is_narrow(each.parameter):
                self._install(index, each.parameter)

    def dtype_of(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype in which a parameter's gradients add up: the wider of its own and the window's."""
        return torch.promote_types(parameter.dtype, self._dtype)

    def holds(self, parameter: Tensor) -> bool:
        """Return whether a parameter's gradients add up in a buffer, and not in its own `.grad`."""
        return id(parameter) in self._indices

    def is_watched(self, parameter: Tensor) -> bool:
        """Return whether a parameter has post-accumulate hooks besides the one installed here."""
        own = int(self.holds(parameter))
        return len(parameter._post_accumulate_grad_hooks or ()) > own  # pyright: ignore[reportPrivateUsage]

    def narrow_sum(self, parameter: Tensor) -> Compensated | None:
        """Return a parameter's bfloat16 sum with extra precision, made if there is none; `None` if it has another."""
        index = self._indices.get(id(parameter))
        if index is None or self._narrow is None or not self._is_narrow(parameter):
            return None
        if index not in self.narrow_sums:
            self._add_narrow(index, torch.zeros_like(parameter, requires_grad=False))
        return self.narrow_sums[index]

    def wide_sum(self, parameter: Tensor) -> Tensor | None:
        """Return a parameter's buffer, made of zeros if there is none yet; `None` if it adds up in `.grad`."""
        index = self._indices.get(id(parameter))
        if index is None:
            return None
        if index not in self.totals:
            self.totals[index] = torch.zeros_like(parameter, dtype=self.dtype_of(parameter), requires_grad=False)
        elif self.totals[index].is_sparse:  # nothing else can be added to it in place
            self.totals[index] = self.totals[index].to_dense()
        return self.totals[index]

    def stand_in(self, parameter: Tensor) -> Tensor | None:
        """Return a view of a parameter whose gradient goes to the buffer; `None` if a hook or `.grad` must get it."""
        index = self._indices.get(id(parameter))
        if index is None or self.is_watched(parameter):
            return None
        view = cast("Tensor", _Tap.apply(parameter, partial(self._add, index, parameter)))
        node: Any = view.grad_fn
        # Runs the node as early as autograd would accumulate, to free the gradient. Private to torch; without it the
        # result is the same, and the peak higher.
        if hasattr(node, "_set_sequence_nr"):
            node._set_sequence_nr((1 << 64) - 1)
        return view

    def coalesce(self) -> None:
        """Coalesce the sparse sums."""
        for index, total in self.totals.items():
            if total.is_sparse and not total.is_coalesced():
                self.totals[index] = total.coalesce()

    def remove_hooks(self) -> None:
        """Remove the hooks, so that autograd's gradients stay in `.grad`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def close(self) -> None:
        """Remove the hooks and free the sums."""
        self.remove_hooks()
        self.totals, self.narrow_sums = {}, {}

    def _install(self, index: int, parameter: Tensor) -> None:
        def move(parameter: Tensor) -> None:
            grad, parameter.grad = parameter.grad, None
            if grad is not None:
                self._add(index, parameter, grad)

        self._indices[id(parameter)] = index
        self._hooks.append(parameter.register_post_accumulate_grad_hook(move))

    def _is_narrow(self, parameter: Tensor) -> bool:
        return self._narrow is not None and parameter.dtype == self._dtype == torch.bfloat16

    def _add(self, index: int, parameter: Tensor, grad: Tensor) -> None:
        if self._is_narrow(parameter):
            self._add_narrow(index, grad)
        elif index not in self.totals:
            wide = grad.to(self.dtype_of(parameter))
            self.totals[index] = kept(wide) if wide is grad else wide
        elif grad.is_sparse:
            self.totals[index].add_(grad.to(self.totals[index].dtype))
        elif self.totals[index].is_sparse:
            self.totals[index] = self.totals[index].to_dense().add_(grad)
        else:
            self.totals[index].add_(grad)

    def _add_narrow(self, index: int, grad: Tensor) -> None:
        grad = grad.to_dense() if grad.is_sparse else grad
        if index in self.narrow_sums:
            self.narrow_sums[index].add_(grad)
        elif self._narrow is not None:
            self.narrow_sums[index] = self._narrow(kept(grad))
            self.totals[index] = self.narrow_sums[index].total


class _Tap(torch.autograd.Function):
    """A view of a parameter whose gradient goes to a function instead of autograd."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        ctx.take = take
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.take(grads[0])
        return None, None
