"""Copies of everything that takes part in a check, so that nothing of the user's is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from microbatch.arguments import attribute
from microbatch.batch.batch_tree import Rows, Whole, map_leaves
from microbatch.checking.check_progress import CheckProgress
from microbatch.checking.gradient_hooks import carry_hooks
from microbatch.errors import ConfigError
from microbatch.gradients.parameters import device_of
from microbatch.memory.out_of_memory import is_out_of_memory
from microbatch.memory.signal_errors import is_from_signal

_TORCHS = (nn.Module, Tensor, Optimizer, LRScheduler, torch.amp.GradScaler)
_CONTAINERS = (list, dict, set)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Hold what the user gave.

    Attributes:
        model: The module, with what wraps it.
        loss_fn: As for `Accumulator.step`.
        batch: The rows that are compared; marks are kept.
        encode: As for `Accumulator.step`, or `None`.
        loop: The user's own loop, ``loop(model, optimizer, batch)``; `None` for the accumulator.
        optimizer: What the loop is given.
        progress: Called at every pass over the batch.
    """

    model: nn.Module
    loss_fn: Callable[..., Any]
    batch: Any
    encode: Callable[..., Any] | None = None
    loop: Callable[..., Any] | None = None
    optimizer: Any = None
    progress: CheckProgress = field(default_factory=lambda: CheckProgress(None))

    @property
    def bare_model(self) -> nn.Module:
        """The module that knows nothing of ranks or of the compiler."""
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        return attribute(model, "_orig_mod", model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """Hold copies of what the user gave, as `Given` names it.

    Attributes:
        model: The bare module.
        loss_fn: ``loss_fn(model, batch)``; with an encoder, the two of them as one.
        given: What the accumulator and a loop are called with: the functions as they came, the batch with its marks.
        schedulers: Learning-rate schedulers that a loop reaches.
        wrapper: The user's own model, where a wrapper was taken off its copy; for its kind alone.
    """

    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Any]
    given: Given
    schedulers: Sequence[LRScheduler]
    wrapper: nn.Module


@dataclass(frozen=True, slots=True)
class Jitter:
    """Say how numbers are moved, to see how much depends on their rounding.

    Attributes:
        seed: Draws for each weight and input whether it is made smaller or larger, or let alone.
        unit: By how much, as a part of it.
    """

    seed: int
    unit: float


def replicate(given: Given, *, dtype: torch.dtype | None = None, jitter: Jitter | None = None) -> Replica:
    """Copy everything, in another precision if asked for.

    Functions are copied with the modules, tensors, optimizers and schedulers that they reach by name, so that a loss
    function's teacher, or a loop's scheduler, is a copy too.

    Args:
        given: The user's own.
        dtype: Precision of every floating-point or complex tensor of the copies; `None` keeps each one's own.
        jitter: How weights and inputs are moved; `None` leaves them.

    Returns:
        The copies, without gradients; with ``dtype``, also without the optimizer's state.

    Raises:
        ConfigError: Something cannot be copied.

    Cost:
        The memory of model, optimizer state and batch once more.
    """
    memo: dict[int, Any] = {}
    try:
        model = copy.deepcopy(given.bare_model, memo)
        memo[id(given.model)] = model
        optimizer = copy.deepcopy(given.optimizer, memo)
        functions = [_rebound(each, memo) for each in (given.loss_fn, given.encode, given.loop)]
    except Exception as error:
        if is_out_of_memory(error) or is_from_signal(error):
            raise
        raise ConfigError(
            "the check works on copies, and the model, or an object that the loss function or the loop uses, cannot be "
            f"copied ({type(error).__name__}: {error}). Make it work with copy.deepcopy"
        ) from error
    copies = list({id(value): value for value in memo.values()}.values())
    tensors = [value for value in copies if isinstance(value, Tensor) and _has_precision(value)]
    for tensor in tensors:
        tensor.grad = None
    loss_fn, encode, loop = functions
    place = partial(_placed, device=given.device, dtype=dtype)
    batch = map_leaves(partial(_map_leaf, place), given.batch)
    if dtype is not None:
        for tensor in tensors:
            tensor.data = tensor.data.to(_as_precise(tensor, dtype))
        for each in _optimizers(optimizer):
            each.state.clear()
    if jitter is not None:
        batch = map_leaves(partial(_map_leaf, partial(_jittered, jitter=jitter)), batch)
        for tensor in tensors:
            tensor.data = _jittered(tensor.data, jitter=jitter)
    carry_hooks(given.bare_model, memo)
    return Replica(
        model=model,
        loss_fn=loss_fn if encode is None else _composed(encode, loss_fn),
        given=Given(model=model, loss_fn=loss_fn, batch=batch, encode=encode, loop=loop, optimizer=optimizer),
        schedulers=[value for value in copies if isinstance(value, LRScheduler)],
        wrapper=given.model,
    )


def _composed(encode: Callable[..., Any], loss_fn: Callable[..., Any]) -> Callable[[nn.Module, Any], Any]:
    return lambda model, batch: loss_fn(model, encode(model, batch))


def _optimizers(optimizer: Any) -> list[Optimizer]:
    found = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or [])
    return [each for each in found if isinstance(each, Optimizer)]


def _placed(tensor: Tensor, *, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    wide = None if dtype is None or not _has_precision(tensor) else _as_precise(tensor, dtype)
    return tensor.detach().to(device, wide, copy=True).requires_grad_(tensor.requires_grad)


def _has_precision(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _as_precise(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, or its complex form for complex numbers."""
    return dtype.to_complex() if tensor.is_complex() else dtype


def _jittered(tensor: Tensor, *, jitter: Jitter) -> Tensor:
    if not _has_precision(tensor):
        return tensor
    generator = torch.Generator().manual_seed(jitter.seed + tensor.numel())
    steps = torch.randint(-1, 2, tensor.shape, generator=generator).to(tensor.device)
    return (tensor * (1 + steps * jitter.unit)).to(tensor.dtype)


def _map_leaf(function: Callable[[Tensor], Tensor], value: Any, _path: str) -> Any:
    """Apply a function to the tensors of a leaf, inside its mark."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Whole):
        return Whole(map_leaves(partial(_map_leaf, function), value.value))
    if isinstance(value, Rows):
        return replace(value, value=map_leaves(partial(_map_leaf, function), value.value))
    return value


# -- functions --------------------------------------------------------------------------------------------------------


def _rebound(function: Any, memo: dict[int, Any]) -> Any:
    """Copy a function with what it reaches by name."""
    if isinstance(function, partial):
        kept = cast("partial[Any]", function)
        return partial(_rebound(kept.func, memo), *_copied(kept.args, memo), **_copied(kept.keywords, memo))
    if not isinstance(function, FunctionType):
        return copy.deepcopy(function, memo)
    if id(function) in memo:
        return memo[id(function)]
    # Of the module's own names only those are other ones that the function reads; its writes stay in the copy.
    names = dict(function.__globals__)
    cells = tuple(memo.setdefault(id(cell), CellType()) for cell in function.__closure__ or ())
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    memo[id(function)] = made
    for name in set(_names(function.__code__)):
        if name in names:
            names[name] = _value(names[name], memo, home=function)
    for old, new in zip(function.__closure__ or (), cells, strict=True):
        if old is not new and not _is_full(new) and _is_full(old):
            new.cell_contents = _value(old.cell_contents, memo, home=function)
    return made


def _value(value: Any, memo: dict[int, Any], *, home: FunctionType) -> Any:
    if isinstance(value, FunctionType) and value.__module__ == home.__module__:
        return _rebound(value, memo)
    if isinstance(value, Tensor) and not value.is_leaf:  # left over from something else, with its graph
        return value.detach().clone()
    if isinstance(value, _TORCHS):
        return copy.deepcopy(value, memo)
    return _copied(value, memo) if type(value) in _CONTAINERS else value


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy a container; one that holds what cannot be copied is shared."""
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        if is_from_signal(error):
            raise
        return value  # a generator, a file, a tensor with a graph: whatever the user keeps there


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_full(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
