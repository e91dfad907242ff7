"""Count the bytes of live tensors, and hold them under a budget."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from microbatch.errors import OutOfMemoryError
from microbatch.memory.budget import format_bytes


class MemoryMeter(TorchDispatchMode):
    """Count the bytes of every tensor that is alive while the meter is on.

    Every operator's outputs pass through the dispatcher; the meter keeps a weak reference to each storage it has not
    seen and subtracts it when it dies. What was alive before is counted once it is named to `track`. Workspaces that
    operators allocate and free inside are not seen.

    Args:
        budget: Bytes that may be alive at once; an operator that passes it raises after it ran. `None` for no limit.

    Attributes:
        live_bytes: Bytes alive now.
        peak_bytes: Most bytes alive at once since the meter was made.

    Cost:
        About 10 microseconds an operator while it is on; nothing when it is not.

    Example:
        >>> with MemoryMeter() as meter:
        ...     a = torch.zeros(1024)
        ...     del a
        ...     b = torch.zeros(256)
        >>> meter.live_bytes, meter.peak_bytes
        (1024, 4096)
    """

    def __init__(self, *, budget: int | None = None) -> None:
        super().__init__()
        self.budget = budget
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}

    def track(self, *things: object) -> None:
        """Count tensors that were alive before the meter was on.

        Args:
            things: Modules (parameters, buffers, gradients), optimizers (their state), tensors, nested structures.
        """
        for thing in things:
            for tensor in _tensors(thing):
                self._add(tensor)

    def __torch_dispatch__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, then count what it made."""
        out = func(*args, **(kwargs or {}))
        before = self.live_bytes
        if isinstance(out, Tensor):
            self._add(out)
        elif isinstance(out, list | tuple):
            for each in tree_leaves(out):
                if isinstance(each, Tensor):
                    self._add(each)
        if self.budget is not None and before < self.live_bytes and self.live_bytes > self.budget:
            self._refuse(func, self.live_bytes - before)
        return out

    def _refuse(self, func: Any, asked: int) -> None:
        # Autograd adding up a gradient must not be interrupted: an accumulated sum would be left half written.
        node: Any = torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage] -- nothing public tells
        if node is not None and "AccumulateGrad" in node.name():
            return
        budget = self.budget or 0
        raise OutOfMemoryError(
            f"the memory budget of {format_bytes(budget)} was passed: {func} asked for {format_bytes(asked)} with "
            f"{format_bytes(self.live_bytes - asked)} in use; pass a smaller microbatch_size, or a larger memory_budget"
        )

    def _add(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            # Sparse and opaque tensors have no storage of their own; sparse ones hold two tensors that do.
            for part in _parts(tensor):
                self._add(part)
            return
        # The storage's own identity: its data pointer is shared by empty ones.
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = (weakref.ref(storage, lambda _: self._drop(key)), size)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _drop(self, key: int) -> None:
        entry = self._storages.pop(key, None)
        if entry is not None:
            self.live_bytes -= entry[1]


def _parts(tensor: Tensor) -> list[Tensor]:
    return [tensor._indices(), tensor._values()] if tensor.is_sparse else []


def _tensors(thing: object) -> list[Tensor]:
    if isinstance(thing, nn.Module):
        held = [*thing.parameters(), *thing.buffers()]
        return held + [tensor.grad for tensor in held if tensor.grad is not None]
    if isinstance(thing, Optimizer):
        return [value for state in thing.state.values() for value in _tensors(state)]
    if isinstance(thing, Mapping):
        return [tensor for value in thing.values() for tensor in _tensors(value)]
    return [leaf for leaf in tree_leaves(thing) if isinstance(leaf, Tensor)]
