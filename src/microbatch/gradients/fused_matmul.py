"""Gradients inside the matrix product: backward adds to the gradient without a weight-sized temporary."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from microbatch.gradients.autograd_engine import is_plain_autograd, run_engine
from microbatch.gradients.fused_functions import fused_embedding, fused_linear
from microbatch.gradients.gradient_sum import GradientSum
from microbatch.gradients.parameters import Named

# Below this many elements a temporary stays in cache, and Python between two operators costs more than it does.
SMALLEST = 1 << 18
# Fake tensors take part, so that a window can be rehearsed without memory.
_PLAIN = {Tensor, nn.Parameter, FakeTensor}
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class Fuse(TorchFunctionMode):
    """Send products with trainable weights through functions whose backward accumulates in place.

    Backward of a linear layer makes ``dW = dy^T x``, as large as the weight, and adds it to `.grad`: for small
    microbatches that traffic, with its page faults, costs as much as the arithmetic. Here it is ``grad += dy^T x`` in
    one call, and an embedding touches only the rows that were used. Autograd is given the sum that it would have made
    itself, so every hook on parameters and modules still fires, as often as before.

    Weights that are small, that have hooks on the incoming gradient, or that are anything but plain dense parameters
    are left to autograd, and so is every call under `torch.func`, forward-mode differentiation or the compiler. Only
    the window's own backward accumulates in place: a gradient asked for in between is made as ever.

    While the weights are frozen, their casts for autocast are kept from the second microbatch on.

    Args:
        named: The window's parameters.
        gradients: Where they add up.
        stand_ins: Functions that are called first in the place of others, and return `None` where they do not cover.
        empty: Makes uninitialised tensors: ``empty(shape, like=tensor)``.
        keep: Called with each cast that is kept until `forget`, if anybody wants to know.

    Source:
        Laws R4, M5, P1; measured in ``benchmarks/``.
    """

    def __init__(
        self,
        named: Sequence[Named],
        gradients: GradientSum,
        *,
        stand_ins: Mapping[Any, Callable[..., Any]],
        empty: Callable[..., Tensor],
        keep: Callable[[Tensor], object] | None = None,
    ) -> None:
        super().__init__()
        self._empty = empty
        self._keep = keep
        self._rules = {func: partial(rule, self) for func, rule in _RULES.items()} | dict(stand_ins)
        self._gradients = gradients
        self._reasons = {each.name: _unfit(each.parameter) for each in named}
        self._names = {id(each.parameter): each.name for each in named if not self._reasons[each.name]}
        self._fused: set[int] = set()
        self._running = False
        self._passes = 0
        self._held: dict[int, weakref.ref[Tensor]] = {}
        self._casts: dict[tuple[int, torch.dtype], tuple[int, Tensor]] = {}

    @property
    def useful(self) -> bool:
        """Whether any weight can be fused at all."""
        return bool(self._names)

    @property
    def fused(self) -> int:
        """Weights whose gradients were added inside a product so far."""
        return len(self._fused)

    @property
    def final(self) -> bool:
        """Whether the window's own backward is at work, which nothing comes after."""
        return self._running

    def report(self) -> Mapping[str, str]:
        """Say for each parameter what became of it.

        Returns:
            ``"fused"``, or why not, by name.
        """
        fused = {name for key, name in self._names.items() if key in self._fused}
        return {
            name: "fused" if name in fused else reason or "not used in a call that is covered"
            for name, reason in self._reasons.items()
        }

    def keep_casts(self) -> None:
        """Keep casts from the first microbatch on: the graphs of several of them are to share one."""
        self._passes = max(1, self._passes)

    def forget(self) -> None:
        """Let go of the casts: the weights are about to change."""
        self._casts.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take over the covered calls; everything else runs as it is."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # first, because the compiler reads what comes before it
            return func(*args, **kwargs)
        if func in _DIFFERENTIATE:
            return self._differentiate(func, *args, **kwargs)
        rule = self._rules.get(func)
        if rule is None or not is_plain_autograd():
            return func(*args, **kwargs)
        out = rule(*args, **kwargs)
        return func(*args, **kwargs) if out is None else out

    # -- forward ------------------------------------------------------------------------------------------------------

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor | None:
        """Run ``x W^T + b`` (or ``x W + b``, transposed) so that the weight's gradient will be fused.

        Args:
            x: Shape ``(..., in)``.
            weight: Shape ``(out, in)``, or ``(in, out)`` if transposed.
            bias: Shape ``(out,)``, or `None`.
            transposed: Whether the weight is stored the other way round.

        Returns:
            Shape ``(..., out)``, or `None` if this call is not covered.
        """
        if not self._covers(weight, x) or (bias is not None and bias.ndim != 1):
            return None
        ready, kind = weight.detach(), x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            if torch.float64 in {x.dtype, weight.dtype}:
                return None
            x, ready = x.to(dtype), self._cast(weight, dtype)
            bias = None if bias is None else bias.to(dtype)
        if x.dtype != ready.dtype or (bias is not None and bias.dtype != ready.dtype):
            return None
        return fused_linear(x, weight, bias, ready=ready, add=self.add, empty=self._empty, transposed=transposed)

    def rows(self, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor | None:
        """Look up rows of an embedding so that its gradient will touch these rows only.

        Args:
            ids: Row numbers, of any shape.
            weight: Shape ``(rows, width)``.
            padding: A row that gets no gradient, or `None`.

        Returns:
            Shape ``(*ids.shape, width)``, or `None` if this call is not covered.
        """
        if not self._covers(weight, ids):
            return None
        return fused_embedding(ids, weight, padding, add=self.add)

    def _covers(self, weight: object, x: object) -> bool:
        return id(weight) in self._names and torch.is_grad_enabled() and type(x) in _PLAIN

    def _cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.dtype == dtype:
            return weight.detach()
        # An embedding with max_norm writes to its weight as it is used.
        version, made = self._casts.get((id(weight), dtype), (-1, weight))
        if version != weight._version:
            made = weight.detach().to(dtype)
            # In the first microbatch gradients take the place of casts, so that keeping these would raise the peak.
            if self._passes:
                self._casts[id(weight), dtype] = weight._version, made
                if self._keep is not None:
                    self._keep(made)
        return made

    # -- backward -----------------------------------------------------------------------------------------------------

    def run_backward(self, losses: Sequence[Tensor], seeds: Sequence[Tensor]) -> None:
        """Run the window's own backward, the only one that adds to the gradients in place.

        Args:
            losses: Where it starts.
            seeds: Their first gradients.
        """
        self._running = True
        try:
            torch.autograd.backward(losses, seeds)
        finally:
            self._running = False
            self._passes += 1
            self._held.clear()

    def _differentiate(
        self,
        func: Callable[..., Any],
        tensors: Sequence[Any],
        inputs: Sequence[Any] | None = None,
        grad_outputs: Any = None,
        **options: Any,
    ) -> Any:
        """Run `torch.autograd.grad` or `torch.autograd.backward` with this mode on."""
        accumulate = func is torch.autograd.backward
        if options.pop("is_grads_batched", False) or not is_plain_autograd():
            again = {"grad_tensors": options.pop("grad_tensors")} if accumulate else {"grad_outputs": grad_outputs}
            return func(tensors, inputs=inputs, **again, **options)
        given = options.get("grad_tensors") if accumulate else grad_outputs
        given = (given,) if isinstance(given, Tensor) else given or (None,) * len(tensors)
        create = options["create_graph"]
        keep = create if options["retain_graph"] is None else options["retain_graph"]
        wanted, unused = tuple(inputs or ()), accumulate or options["allow_unused"] or options["materialize_grads"]
        # Only what the window asks for itself adds in place, and what runs inside of that for its sake, once.
        running, self._running = self._running, self._running and accumulate and not keep
        try:
            with self:
                found = run_engine(
                    tuple(tensors),
                    tuple(given),
                    keep=keep,
                    create=create,
                    inputs=wanted,
                    unused=unused,
                    accumulate=accumulate,
                )
        finally:
            self._running = running
        if accumulate or not options["materialize_grads"]:
            return found
        return tuple(
            torch.zeros_like(each, requires_grad=create) if grad is None else grad
            for each, grad in zip(wanted, found, strict=True)
        )

    def add(
        self,
        weight: Tensor,
        make: Callable[[], Tensor],
        add_: Callable[[Tensor], object],
        *,
        pieces: Callable[[], Iterator[tuple[slice, Tensor]]] | None = None,
    ) -> Tensor | None:
        """Add one use of a weight to its gradient.

        Args:
            weight: The parameter.
            make: Makes the gradient of this use.
            add_: Adds it to a sum, in place.
            pieces: Makes it some rows at a time; `None` where that would be more work.

        Returns:
            What autograd is to be told: the gradient of this use, or the whole sum, taken out of the parameter so
            that autograd puts it back; `None` where the sum is in autograd's hands already, or in a wider buffer.
        """
        # A hook on the weight is to be given the gradient of this microbatch, not the sum.
        if not self._running or weight._backward_hooks:
            return make()
        if self._gradients.widens(weight):
            if self._gradients.is_watched(weight):
                return make()
            if (narrow := self._gradients.narrow_sum(weight)) is not None:
                if pieces is None:
                    return make()
                for rows, piece in pieces():
                    narrow.add_(piece, rows=rows)
                self._fused.add(id(weight))
                return None
            self._fused.add(id(weight))
            add_(self._gradients.wide_sum(weight))
            return None
        self._fused.add(id(weight))
        total, weight.grad = weight.grad, None
        if total is None:
            held = self._held.get(id(weight))
            if held is not None and (total := held()) is not None:
                add_(total)
                return None
            total = make()
        else:
            add_(total)
        # The weight's next use is to find the sum on its way back. Not if somebody else holds it, who may keep it alive
        # after autograd has put another in its place, nor if a hook takes gradients away. The references are the one
        # here and the count's own.
        hooks = weight._post_accumulate_grad_hooks  # pyright: ignore[reportPrivateUsage]
        if sys.getrefcount(total) <= 2 and not hooks:
            self._held[id(weight)] = weakref.ref(total)
        return total


def _linear(fuse: Fuse, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:  # noqa: A002
    return fuse.product(input, weight, bias, transposed=False)


def _addmm(fuse: Fuse, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor | None:  # noqa: A002
    # GPT-2's layers keep their weights as (in, out) and call torch.addmm(bias, x, weight).
    return None if scales or input.ndim != 1 else fuse.product(mat1, mat2, input, transposed=True)


def _embedding(
    fuse: Fuse,
    input: Tensor,  # noqa: A002 - torch's own name for it
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    del norm_type
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    return fuse.rows(input, weight, padding)


_RULES: dict[Any, Callable[..., Tensor | None]] = {F.linear: _linear, torch.addmm: _addmm, F.embedding: _embedding}
_DIFFERENTIATE = {torch.autograd.grad, torch.autograd.backward}


def _unfit(parameter: Tensor) -> str:
    """Say why a parameter cannot be fused; empty if it can."""
    if type(parameter) not in {nn.Parameter, FakeTensor}:
        return f"a {type(parameter).__name__}, not a plain parameter"
    if parameter.ndim != 2:
        return f"of {parameter.ndim} dimensions: not the weight of a linear layer or an embedding"
    if parameter.dtype not in _DTYPES or parameter.layout is not torch.strided or not parameter.is_contiguous():
        return f"{parameter.dtype}, {parameter.layout}: not a dense, contiguous floating-point matrix"
    if parameter.numel() < SMALLEST:
        return f"small: {parameter.numel():,} elements, where a temporary costs nothing"
    return ""
