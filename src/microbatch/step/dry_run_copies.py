"""Copies of what is trained, real or fake, on which a window can be rehearsed without touching the user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from microbatch.batch.batch_tree import leaves, map_tensors, rows_of, take_rows
from microbatch.errors import ConfigError
from microbatch.loss.loss import LossLike
from microbatch.step.settings import Settings

LossFunction = Callable[[nn.Module, Any], LossLike]
_GIVEN_STORAGE = tuple(
    getattr(torch.ops.aten.set_, name) for name in torch.ops.aten.set_.overloads() if "Storage" in name
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What is rehearsed: the user's own, and the gradients that were set aside."""

    settings: Settings
    loss_fn: LossFunction
    batch: Any
    gradients: Sequence[tuple[Tensor, Tensor]]

    def beside(self, size: int) -> int:
        """Count the rows of a batch that are not in the microbatch, where it lives on the device.

        Args:
            size: Rows of the microbatch.

        Returns:
            Bytes.
        """
        if self.settings.device.type != "cpu":
            return 0
        rows = rows_of(self.batch)
        tensors = [value for _, value in leaves(self.batch) if isinstance(value, Tensor)]
        return max(0, rows - size) * sum(each.numel() * each.element_size() for each in tensors) // max(1, rows)


@dataclass(frozen=True, slots=True)
class Cast:
    """Who takes part in a rehearsal: copies of what the user has."""

    settings: Settings
    loss_fn: LossFunction
    batch: Any
    device: torch.device


class Fakes(FakeTensorMode):
    """Fake tensors that let go of their storages.

    torch remembers what an operator returned, by what it was given; so a storage that `Tensor.set_` was given would be
    held for good, and counted. That one operator is run anew each time.
    """

    def __torch_dispatch__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operator."""
        remembers, self.cache_enabled = self.cache_enabled, self.cache_enabled and func not in _GIVEN_STORAGE
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.cache_enabled = remembers


class Faked(TorchFunctionMode):
    """Make what `copy.deepcopy` copies fake, and on the CPU: without a GPU, fake CUDA tensors cannot train.

    Args:
        mode: The fake tensors' mode.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Replace the copy of a tensor."""
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.of(tensor)
            return memo[id(tensor)]
        if func is Tensor.clone:  # which is how parameters are copied
            return self.of(args[0])
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage] -- as torch's own modes do
            return func(*args, **(kwargs or {}))

    def of(self, tensor: Tensor) -> Tensor:
        """Return a fake copy.

        Args:
            tensor: Any; fake ones too.

        Returns:
            Of the same shape, strides and dtype.
        """
        if tensor.device.type == "cpu":
            return self.mode.from_tensor(tensor, static_shapes=True)
        with self.mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            return made.requires_grad_(tensor.requires_grad)


def copies_of(scene: Scene, *, how: Faked | None) -> Cast:
    """Copy everything that takes part.

    Args:
        scene: The user's own.
        how: What makes fake copies; `None` for real ones.

    Returns:
        The copies, without listeners, a budget, a scaler or the compiler.

    Raises:
        ConfigError: Something cannot be copied.
    """
    settings, memo = scene.settings, dict[int, Any]()
    bare = settings.bare_model
    model: nn.Module = getattr(bare, "_orig_mod", bare)  # what torch.compile wrapped
    with how or nullcontext():
        try:
            copied, optimizers = copy.deepcopy((model, list(settings.optimizers)), memo)
            loss = _copy_loss(scene.loss_fn, memo)
        except Exception as error:
            raise ConfigError(
                f"the model, its optimizer or the loss function cannot be copied, so that no window can be rehearsed "
                f"({type(error).__name__}: {error}); make them work with copy.deepcopy"
            ) from error
        for parameter, gradient in scene.gradients:
            if (twin := memo.get(id(parameter))) is not None:
                twin.grad = copy.deepcopy(gradient)
    if how is not None and settings.device.type == "cuda":
        _as_on_cuda(optimizers)
    rest = replace(
        settings,
        model=copied,
        optimizers=optimizers,
        memory_budget=None,
        grad_scaler=None,
        compile=False,
        lengths=None,
        listeners=[],
    )

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(settings.device) if how is None else how.of(tensor)

    return Cast(rest, loss, map_tensors(place, scene.batch), settings.device)


def _copy_loss(loss_fn: LossFunction, memo: dict[int, Any]) -> LossFunction:
    """Copy a loss function with the modules and tensors that it closes over."""
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


def _as_on_cuda(optimizers: Sequence[Optimizer]) -> None:
    """Let optimizers step all parameters at once, with the temporaries of that, as they do on CUDA unless told."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True


def some_rows(batch: object, size: int) -> Any:
    """Copy rows of a batch, from its first on, and again from there.

    Args:
        batch: What `rows_of` accepts.
        size: How many rows.

    Returns:
        The same structure without marks.
    """
    rows = rows_of(batch)
    return take_rows(batch, [row % rows for row in range(size)], rows=rows)
