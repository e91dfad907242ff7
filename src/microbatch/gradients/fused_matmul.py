"""Gradients inside the matrix product: backward adds to the gradient without a weight-sized temporary."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import _make_grads  # pyright: ignore[reportPrivateUsage]
from torch.autograd.graph import _engine_run_backward  # pyright: ignore[reportPrivateUsage]
from torch.overrides import TorchFunctionMode

from microbatch.gradients.gradient_sum import GradientSum
from microbatch.gradients.parameters import Named
from microbatch.products import add_product_, product_pieces

# Below this many elements a temporary stays in cache, and Python between two operators costs more than it does.
SMALLEST = 1 << 18
# Outputs of a head from which on it is run in parts, and of a part: its weight stays in cache.
_MANY_OUTPUTS, _OUTPUTS_AT_ONCE = 8192, 1024
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
        self.empty = empty
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
        if rule is None or not _is_plain_autograd():
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
        return cast("Tensor", _Product.apply(x, weight, bias, ready, self, transposed))

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
        return cast("Tensor", _Rows.apply(ids, weight, padding, self))

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
        if options.pop("is_grads_batched", False) or not _is_plain_autograd():
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
                found = _run_engine(tuple(tensors), tuple(given), keep, create, wanted, unused=unused, add=accumulate)
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


def _run_engine(
    tensors: tuple[Any, ...],
    grads: tuple[Any, ...],
    keep: bool,
    create: bool,
    inputs: tuple[Any, ...],
    *,
    unused: bool,
    add: bool,
) -> Any:
    # torch.autograd.backward and grad are functions that modes see, and so they, and with them whatever checkpoints
    # compute again, would run outside of the mode that sees them. The engine is not one.
    return _engine_run_backward(
        tensors,
        _make_grads(tensors, grads, is_grads_batched=False),
        keep,
        create,
        inputs,
        allow_unreachable=unused,
        accumulate_grad=add,
    )


def _is_plain_autograd() -> bool:
    """Tell whether neither `torch.func` nor forward-mode differentiation is at work."""
    functional = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
    return not functional and torch.autograd.forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]


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


class _Product(torch.autograd.Function):
    """``x W^T + b``, or ``x W + b`` when the weight is stored transposed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ready: Tensor, fuse: Fuse, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, ready if ready.dtype != weight.dtype else weight)
        ctx.weight, ctx.fuse, ctx.transposed = weight, fuse, transposed
        return _affine(x, ready.T if transposed else ready, bias, empty=fuse.empty)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, ready = ctx.saved_tensors
        weight: Tensor = ctx.weight
        if torch.is_grad_enabled() and ready.dtype != weight.dtype:
            ready = weight.to(ready.dtype)  # a second derivative has to find its way to the weight
        (dy,) = grads
        flat_dy, flat_x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        left, right = (flat_x, flat_dy) if ctx.transposed else (flat_dy, flat_x)
        matrix = ready.T if ctx.transposed else ready
        dx = (flat_dy @ matrix).view(x.shape) if ctx.needs_input_grad[0] else None
        db = flat_dy.sum(0) if ctx.needs_input_grad[2] else None

        make, add_ = partial(_product, weight.dtype, left, right), partial(add_product_, left=left, right=right)
        pieces = partial(product_pieces, left, right)
        return dx, ctx.fuse.add(weight, make, add_, pieces=pieces), db, None, None, None


class _Rows(torch.autograd.Function):
    """Rows of an embedding."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, fuse: Fuse) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding, ctx.fuse = weight, padding, fuse
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), (dy,) = ctx.saved_tensors, grads
        weight: Tensor = ctx.weight
        flat_ids, flat_dy = ids.reshape(-1), dy.reshape(-1, weight.shape[1])
        if ctx.padding is not None:
            flat_dy = torch.where((flat_ids == ctx.padding).unsqueeze(1), 0, flat_dy)

        make, add_ = partial(_rows, weight, flat_ids, flat_dy), partial(_add_rows_, ids=flat_ids, dy=flat_dy)
        return None, ctx.fuse.add(weight, make, add_), None, None


def _affine(x: Tensor, matrix: Tensor, bias: Tensor | None, *, empty: Callable[..., Tensor]) -> Tensor:
    """Run ``x W^T + b``; for a head of many outputs on the CPU, into memory that may have been used before."""
    outputs = matrix.shape[0]
    if x.device.type != "cpu" or outputs < _MANY_OUTPUTS or bias is not None:
        return F.linear(x, matrix, bias)
    out = empty((*x.shape[:-1], outputs), like=x)
    flat_x, flat_out = x.reshape(-1, x.shape[-1]), out.view(-1, outputs)
    # Measured: a few outputs at a time take 0.7 of the time for 128 rows and a vocabulary of 50,257, 0.9 for 512 rows.
    at_once = _OUTPUTS_AT_ONCE if x.dtype == torch.float32 else outputs
    for part, rows in zip(flat_out.split(at_once, dim=1), matrix.split(at_once), strict=True):
        torch.mm(flat_x, rows.T, out=part)
    return out


def _product(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    return (left.T @ right).to(dtype)


def _rows(weight: Tensor, ids: Tensor, dy: Tensor) -> Tensor:
    return _add_rows_(torch.zeros_like(weight, requires_grad=False), ids, dy)


def _add_rows_(total: Tensor, ids: Tensor, dy: Tensor) -> Tensor:
    return total.index_add_(0, ids, dy.to(total.dtype))


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
