"""A function mode whose backward adds weight gradients in place, without a weight-sized temporary."""

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

from microbatch.gradients.autograd_engine import is_plain_autograd
from microbatch.gradients.fused_functions import FusedEmbedding, FusedLinear
from microbatch.gradients.gradient_sum import GradientSum
from microbatch.gradients.parameters import Named
from microbatch.kind_words import kind_of

# Below this many elements, a temporary stays in the CPU's cache and costs less than the extra Python calls.
SMALLEST = 1 << 18
# Every call of torch passes through the mode, and takes a microsecond or two more. A model of many small modules makes
# many calls: with fewer than SMALLEST / 16 fusable elements for each module, they cost more than the temporaries.
_MODULES = 16
# Fake tensors are covered too, for dry runs of a window.
_PLAIN, _FIT = {Tensor, nn.Parameter, FakeTensor}, {nn.Parameter, FakeTensor}
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class Fuse(TorchFunctionMode):
    """Replace linear and embedding calls by functions whose backward adds to the weight's gradient in place.

    A linear layer's backward makes ``dW = dy^T x``, as large as the weight, and adds it to `.grad`. For small
    microbatches, this memory traffic and its page faults cost as much as the arithmetic. This mode runs
    ``grad += dy^T x`` in one call, and an embedding's backward touches only the rows in use. Autograd receives the same
    sum as without the mode, so all hooks on parameters and modules fire as often as before.

    Autograd itself handles small weights, weights with a hook on the incoming gradient, and weights that are not plain
    dense parameters. It also handles every call under `torch.func`, forward-mode differentiation or the compiler. Only
    the window's own backward accumulates in place; a gradient that the user computes in between is made by autograd.

    Weights do not change within a window, so their autocast casts are cached, from the second microbatch on.

    Args:
        named: The window's parameters.
        modules: Number of the model's modules.
        gradients: The window's gradient sums.
        empty: Makes uninitialised tensors: ``empty(shape, like=tensor)``.
        keep: Called with each cast that is cached until `forget`; `None` for no call.

    Source:
        Laws R4, M5, P1; measured in ``benchmarks/``.
    """

    def __init__(
        self,
        named: Sequence[Named],
        gradients: GradientSum,
        *,
        modules: int,
        empty: Callable[..., Tensor],
        keep: Callable[[Tensor], object] | None = None,
    ) -> None:
        super().__init__()
        self._empty = empty
        self._keep = keep
        self._stand_ins: dict[Any, Callable[..., Any]] = {}
        self._gradients = gradients
        self._named = named
        large = [each for each in named if type(each.parameter) in _FIT and each.parameter.numel() >= SMALLEST]
        fit = [each for each in large if not _unfit(each.parameter)]
        self._is_worth = sum(each.parameter.numel() for each in fit) * _MODULES >= SMALLEST * modules
        self._names = {id(each.parameter): each.name for each in fit if self._is_worth}
        self._fused: set[int] = set()
        self._running = False
        self._passes = 0
        self._held: dict[int, weakref.ref[Tensor]] = {}
        self._casts: dict[tuple[int, torch.dtype], tuple[int, Tensor]] = {}

    @property
    def useful(self) -> bool:
        """Whether any weight can be fused."""
        return bool(self._names)

    @property
    def weights(self) -> frozenset[int]:
        """The ids of the weights that can be fused."""
        return frozenset(self._names)

    @property
    def fused(self) -> int:
        """Number of weights whose gradients were fused so far."""
        return len(self._fused)

    def replace(self, func: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        """Call a replacement for a further function first; if it returns `None`, the function itself is called."""
        self._stand_ins[func] = replacement

    def is_final(self) -> bool:
        """Return whether the window's own backward is running; it frees the graph."""
        return self._running

    def report(self) -> Mapping[str, str]:
        """Report for each parameter, by name, ``"fused"`` or the reason why its gradient was not."""
        fused = {name for key, name in self._names.items() if key in self._fused}
        unused = "not used by a plain linear or embedding call" if self._is_worth else _FEW
        return {each.name: "fused" if each.name in fused else _unfit(each.parameter) or unused for each in self._named}

    def keep_casts(self) -> None:
        """Cache casts from the first microbatch on, so that the graphs of several microbatches share them."""
        self._passes = max(1, self._passes)

    def forget(self) -> None:
        """Free the cached casts, because the weights are about to change, and release the replacements."""
        self._casts.clear()
        self._stand_ins.clear()  # they may refer back to this mode

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a replacement if one covers the call, and otherwise the function itself."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # first, because the compiler traces every line before it
            return func(*args, **kwargs)
        if func in _DIFFERENTIATE:
            return self._differentiate(func, *args, **kwargs)
        replacement = self._stand_ins.get(func)
        if replacement is None and func in _RULES:
            replacement = partial(_RULES[func], self)
        if replacement is None or not is_plain_autograd():
            return func(*args, **kwargs)
        out = replacement(*args, **kwargs)
        return func(*args, **kwargs) if out is None else out

    # -- forward ------------------------------------------------------------------------------------------------------

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor | None:
        """Run a `FusedLinear`; return `None` if the call cannot be fused."""
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
        return cast("Tensor", FusedLinear.apply(x, weight, bias, ready, self.add, self._empty, transposed))

    def rows(self, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor | None:
        """Run a `FusedEmbedding`; return `None` if the call cannot be fused."""
        if not self._covers(weight, ids):
            return None
        return cast("Tensor", FusedEmbedding.apply(ids, weight, padding, self.add))

    def _covers(self, weight: object, x: object) -> bool:
        return id(weight) in self._names and torch.is_grad_enabled() and type(x) in _PLAIN

    def _cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.dtype == dtype:
            return weight.detach()
        # An embedding with max_norm writes to its weight in forward, so the version is checked.
        version, made = self._casts.get((id(weight), dtype), (-1, weight))
        if version != weight._version:
            made = weight.detach().to(dtype)
            # The first microbatch's gradients reuse the memory of its casts; cached casts would raise the peak.
            if self._passes:
                self._casts[id(weight), dtype] = weight._version, made
                if self._keep is not None:
                    self._keep(made)
        return made

    # -- backward -----------------------------------------------------------------------------------------------------

    def run_backward(self, losses: Sequence[Tensor], seeds: Sequence[Tensor]) -> None:
        """Run the window's own backward, the only one that adds to gradients in place."""
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
        # Only the window's backward, and a plain backward that runs inside it, such as a checkpoint's, adds in place.
        running, self._running = self._running, self._running and accumulate and not keep
        try:
            # Both functions would be intercepted, and a mode is off while its handler runs. So the engine's entry point
            # is called, and forward passes that checkpoints recompute run under this mode, too.
            with self:
                roots, grads = tuple(tensors), _make_grads(tuple(tensors), tuple(given), is_grads_batched=False)
                found: Any = _engine_run_backward(
                    roots, grads, keep, create, wanted, allow_unreachable=unused, accumulate_grad=accumulate
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
        """Add the gradient of one use of a weight to the weight's sum.

        Args:
            weight: The parameter.
            make: Makes the gradient of this use.
            add_: Adds the gradient of this use to a sum, in place.
            pieces: Makes the gradient some rows at a time; `None` if that costs more.

        Returns:
            The gradient that the backward must return to autograd: that of this use alone, or the whole sum. In the
            second case, the sum is removed from the parameter, and autograd stores it there again. `None` if an earlier
            use of the weight has returned the sum already, or if the sum is in a wider buffer.
        """
        # A hook on the weight must receive the gradient of this microbatch, not the sum.
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
        # The next use of the weight adds to this sum while autograd still holds it. A further reference makes this
        # unsafe, because it may keep the sum alive after autograd has replaced it. So does a hook, which may take
        # gradients out. The two references are the local variable and getrefcount's argument.
        hooks = weight._post_accumulate_grad_hooks  # pyright: ignore[reportPrivateUsage]
        if sys.getrefcount(total) <= 2 and not hooks:
            self._held[id(weight)] = weakref.ref(total)
        return total


def _linear(fuse: Fuse, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:  # noqa: A002
    return fuse.product(input, weight, bias, transposed=False)


def _addmm(fuse: Fuse, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Tensor | None:  # noqa: A002
    # GPT-2's layers store their weights as (in, out) and call torch.addmm(bias, x, weight).
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
_FEW = (
    f"fewer than {SMALLEST // _MODULES:,} such elements for each module of the model: the further calls would cost more"
)
_DIFFERENTIATE = {torch.autograd.grad, torch.autograd.backward}


def _unfit(parameter: Tensor) -> str:
    """Return why a parameter's gradient cannot be fused; an empty string if it can."""
    if type(parameter) not in _FIT:
        return f"{kind_of(parameter)}, not a plain parameter"
    if parameter.ndim != 2:
        return f"{parameter.ndim} dimensions: not the weight of a linear layer or an embedding"
    if parameter.dtype not in _DTYPES or parameter.layout is not torch.strided or not parameter.is_contiguous():
        return f"{parameter.dtype}, {parameter.layout}: not a dense, contiguous floating-point matrix"
    if parameter.numel() < SMALLEST:
        return f"small: {parameter.numel():,} elements, for which a temporary costs little"
    return ""
