"""Reuse of a window's largest CPU buffers, such as logits, instead of freshly allocated pages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

# The C library returns freed blocks of about this size to the system, so every page of the next allocation faults. This
# takes a third of the time of a matrix product with few rows. Measured with 8 and 32 MiB: 8 is better.
SMALLEST = 8 << 20

# Returns a storage's reference count. Private to torch; without this function, no memory is reused.
_torch: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_holders: Callable[[int], int] | None = getattr(_torch, "_storage_Use_Count", None)


class Scratch:
    """Allocate a window's large tensors in memory that is no longer in use.

    Each microbatch makes logits and their gradient. On the CPU, this memory is returned to the system and allocated
    again each time. With this class, the gradient overwrites the logits if only the window's own backward still needs
    them. One storage is kept. It serves the next logits once no tensor, view, graph or array refers to it. The peak is
    lower by one such buffer, although one is kept.

    Cost:
        The memory of the kept buffer, until `forget`.
    """

    def __init__(self) -> None:
        self._keeping = False
        self._kept: _Kept | None = None

    def keep(self) -> None:
        """Keep the next buffer. Call this after the gradients are allocated, or the peak rises."""
        self._keeping = _holders is not None

    def forget(self) -> None:
        """Free the kept buffer, and stop keeping buffers."""
        self._keeping, self._kept = False, None

    def empty(self, shape: Sequence[int], *, like: Tensor) -> Tensor:
        """Make an uninitialised, contiguous tensor."""
        size = torch.Size(shape).numel() * like.itemsize
        if not self._keeping or size < SMALLEST or like.device.type != "cpu":
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        # A much larger buffer is not reused, because microbatches that are cut by length become shorter.
        kept = self._kept
        if kept is not None and size <= kept.size <= 2 * size and kept.is_free:
            laid_out = torch.empty(shape, device="meta")
            storage = kept.tensor.untyped_storage()
            return torch.empty(0, dtype=like.dtype).set_(storage, 0, laid_out.shape, laid_out.stride())
        self._kept = kept = None
        made = torch.empty(shape, dtype=like.dtype)
        self._kept = _Kept(made)
        return made

    def places(self, *, final: Callable[[], bool]) -> Callable[[Tensor], Tensor]:
        """Return a function that provides memory for the result of a backward, in place of a saved tensor if possible.

        Args:
            final: Returns whether the running backward frees the graph.

        Returns:
            A function for use in ``backward``. Its argument is a tensor from ``ctx.saved_tensors``, which exactly one
            local variable of the caller refers to. It returns a tensor of the same shape and dtype. This tensor is in
            the argument's memory if only the graph and that variable refer to it, and otherwise in new memory.
        """
        return partial(self._place, final=final)

    def _place(self, saved: Tensor, *, final: Callable[[], bool]) -> Tensor:
        ours = self._kept is not None and self._kept.holds(saved)
        if final() and saved.is_contiguous() and _held_by(saved, ours=ours) in learn_to_count(type(saved)):
            return saved.detach()
        return torch.empty_like(saved, memory_format=torch.contiguous_format)


class _Observer(Scratch):
    """Records reference counts in the same call pattern as `Scratch`, which compares them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[type[Tensor], tuple[int, ...]]] = []

    def _place(self, saved: Tensor, *, final: Callable[[], bool]) -> Tensor:
        if final():
            self.seen.append((type(saved), _held_by(saved, ours=False)))
        return torch.empty_like(saved)


class _Kept:
    """A storage, kept alive by an empty tensor."""

    def __init__(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        self.tensor = torch.empty(0, dtype=made.dtype).set_(storage, 0, (0,), (1,))
        self.size, self._at = storage.nbytes(), storage._cdata  # pyright: ignore[reportPrivateUsage]

    @property
    def is_free(self) -> bool:
        """Whether nothing else refers to the storage."""
        return _memory_held_by(self.tensor) == _memory_held_by(_Kept(torch.empty(1)).tensor) != ()

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is in this storage."""
        return tensor.untyped_storage()._cdata == self._at  # pyright: ignore[reportPrivateUsage]


def _memory_held_by(tensor: Tensor) -> tuple[int, ...]:
    """Return the reference counts of a tensor's storage, in C++ and in Python."""
    if _holders is None:
        return ()
    storage = tensor.untyped_storage()
    return _holders(storage._cdata), sys.getrefcount(storage)  # pyright: ignore[reportPrivateUsage]


def _held_by(tensor: Tensor, *, ours: bool) -> tuple[int, ...]:
    """Return the reference counts of a tensor, of its storage (without our own), and of its base if it is a view."""
    memory, base = _memory_held_by(tensor), cast("Any", tensor._base)
    count: Any = getattr(tensor, "_use_count", None)
    if not memory or count is None:
        return ()
    found = memory[0] - ours, memory[1], count(), sys.getrefcount(tensor)
    return found if base is None else (*found, base._use_count(), sys.getrefcount(base))


@cache
def learn_to_count(kind: type[Tensor]) -> frozenset[tuple[int, ...]]:
    """Return the reference counts, measured once, of a plain tensor and of a view that only a graph refers to."""
    observer = _Observer()
    place = observer.places(final=lambda: True)
    with torch.enable_grad():
        leaf = torch.zeros(2, 2, device="cpu", requires_grad=True)
        for whole in (True, False):
            made: Any = _Saving.apply(leaf * 1 if whole else (leaf * 1).flatten(), place)
            made.backward(inputs=[leaf])
    return frozenset(counts for made_kind, counts in observer.seen if made_kind is kind and counts)


class _Saving(torch.autograd.Function):
    """Saves a tensor and reads it in backward, in the way a loss does."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, place: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(tensor)
        ctx.place = place
        return tensor.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        del grads
        (saved,) = ctx.saved_tensors
        return torch.zeros_like(ctx.place(saved)), None
