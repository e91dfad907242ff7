"""Real or fake copies of the model, the optimizers and the loss function, for dry runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from microbatch.arguments import attribute
from microbatch.batch.batch_tree import contents, map_tensors, rows_of, take_rows
from microbatch.batch.batches import parts_of
from microbatch.devices.backend import foreach_is_default
from microbatch.devices.device_memory import block_bytes
from microbatch.errors import ConfigError
from microbatch.loss.loss import LossLike
from microbatch.memory.ledger import INPUTS, TEMPORARIES
from microbatch.memory.signal_errors import is_from_signal
from microbatch.step.options import Options

LossFunction = Callable[[nn.Module, Any], LossLike]
_GIVEN_STORAGE = tuple(
    getattr(torch.ops.aten.set_, name) for name in torch.ops.aten.set_.overloads() if "Storage" in name
)
_JOINED = 8  # bytes of each kept number in the tensors that join the numbers of all microbatches, at the end


@dataclass(frozen=True, slots=True)
class Scene:
    """The user's options, loss function and batch, and the gradients that were set aside.

    Attributes:
        kept: Bytes of each tensor that a window keeps of one microbatch until its end, as dry runs have found.
        storages: Most storages that were alive at once in each dry run.
    """

    options: Options
    loss_fn: LossFunction
    batch: Any
    gradients: Sequence[tuple[Tensor, Tensor]]
    kept: list[int] = field(default_factory=list[int])
    storages: list[int] = field(default_factory=list[int])

    def beside(self, size: int) -> dict[str, int]:
        """Return the bytes of a whole window that a dry run of two microbatches does not have.

        These are the batch's other rows if the batch is on the device, the numbers that the window keeps of each
        microbatch, and the rounding of every allocation to the allocator's block.

        Args:
            size: Rows of the microbatch.

        Returns:
            Bytes by category; the rounding is an upper bound.
        """
        block, microbatches = block_bytes(self.options.device), -(-rows_of(self.batch) // size)
        numbers = sum(-(-each // block) * block + _JOINED for each in self.kept)
        rounding = (block - 1) * max(self.storages, default=0)
        return {INPUTS: self._other_rows(size), TEMPORARIES: microbatches * numbers + rounding}

    def _other_rows(self, size: int) -> int:
        if self.options.device.type != "cpu":
            return 0
        rows = rows_of(self.batch)
        tensors = [value for value in contents(self.batch) if isinstance(value, Tensor)]
        return max(0, rows - size) * sum(each.numel() * each.element_size() for each in tensors) // max(1, rows)


@dataclass(frozen=True, slots=True)
class Cast:
    """Copies of the options, the loss function and the batch, for a dry run."""

    options: Options
    loss_fn: LossFunction
    batch: Any
    device: torch.device


class Fakes(FakeTensorMode):
    """A fake tensor mode that does not keep storages alive.

    The mode caches an operator's results by its arguments. So it would keep a storage that was passed to `Tensor.set_`,
    and the meter would count it. For this operator, the cache is off.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        remembers, self.cache_enabled = self.cache_enabled, self.cache_enabled and func not in _GIVEN_STORAGE
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.cache_enabled = remembers


class Faked(TorchFunctionMode):
    """Make `copy.deepcopy` return fake CPU tensors; without an accelerator, its fake tensors cannot train."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace a copied tensor by a fake one."""
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.of(tensor)
            return memo[id(tensor)]
        if func is Tensor.clone:  # used to copy parameters
            return self.of(args[0])
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage] -- as torch's own modes do
            return func(*args, **(kwargs or {}))

    def of(self, tensor: Tensor) -> Tensor:
        """Return a fake copy of a tensor: of the same shape, strides and dtype."""
        if tensor.device.type == "cpu":
            return self.mode.from_tensor(tensor, static_shapes=True)
        with self.mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            return made.requires_grad_(tensor.requires_grad)


def copies_of(scene: Scene, *, how: Faked | None) -> Cast:
    """Copy model, optimizers, loss function and batch, as fake tensors under ``how``; without listeners and limits."""
    options, memo = scene.options, dict[int, Any]()
    bare = options.bare_model
    model: nn.Module = attribute(bare, "_orig_mod", bare)  # the module inside torch.compile
    with how or nullcontext():
        try:
            copied, optimizers = copy.deepcopy((model, list(options.optimizers)), memo)
            loss = _copy_loss(scene.loss_fn, memo)
        except Exception as error:
            if is_from_signal(error):
                raise
            raise ConfigError(
                f"the model, its optimizer or the loss function cannot be copied for a dry run "
                f"({type(error).__name__}: {error}); make them work with copy.deepcopy"
            ) from error
        for parameter, gradient in scene.gradients:
            if (twin := memo.get(id(parameter))) is not None:
                twin.grad = copy.deepcopy(gradient)
    if how is not None and foreach_is_default(options.device):
        _set_foreach(optimizers)
    rest = replace(
        options,
        model=copied,
        optimizers=optimizers,
        memory_budget=None,
        grad_scaler=None,
        compile=False,
        lengths=None,
        listeners=[],
    )

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(options.device) if how is None else how.of(tensor)

    return Cast(rest, loss, map_tensors(place, scene.batch), options.device)


def _copy_loss(loss_fn: LossFunction, memo: dict[int, Any]) -> LossFunction:
    """Copy a loss function with the modules and tensors in its closure."""
    if not isinstance(loss_fn, FunctionType) or not loss_fn.__closure__:
        return copy.deepcopy(loss_fn, memo)
    cells = tuple(
        CellType(copy.deepcopy(cell.cell_contents, memo))
        if isinstance(cell.cell_contents, nn.Module | Tensor)
        else cell
        for cell in loss_fn.__closure__
    )
    made = FunctionType(loss_fn.__code__, loss_fn.__globals__, loss_fn.__name__, loss_fn.__defaults__, cells)
    made.__kwdefaults__ = loss_fn.__kwdefaults__
    return made


def _set_foreach(optimizers: Sequence[Optimizer]) -> None:
    """Set ``foreach=True`` where the optimizer would choose it on its device, because it takes temporary memory."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True


def some_rows(batch: object, size: int) -> Any:
    """Copy the first rows of a batch, and repeat them if there are too few."""
    batch = max(parts_of(batch), key=_row_bytes)  # of several batches, the one with the largest rows
    rows = rows_of(batch)
    return take_rows(batch, [row % rows for row in range(size)], rows=rows)


def _row_bytes(batch: object) -> float:
    tensors = [leaf for leaf in contents(batch) if isinstance(leaf, Tensor)]
    return sum(each.numel() * each.element_size() for each in tensors) / max(1, rows_of(batch))
