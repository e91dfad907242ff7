"""Large tensors in memory that has been used before, instead of in fresh pages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

# From here on memory that is let go of goes back to the system, and each page of it faults when it is written again:
# a third of the time of a matrix product with few rows (measured at 8 and 32 MiB: 8 is better).
SMALLEST = 8 << 20

# How many hold a storage; private to torch, so that memory is not used again where it cannot be told.
_torch: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_holders: Callable[[int], int] | None = getattr(_torch, "_storage_Use_Count", None)


class Scratch:
    """Make a window's large tensors in memory that nobody needs any more.

    Each microbatch makes logits and their gradient, and on the CPU their memory goes back to the system and is asked
    for again each time. Here the gradient takes the place of the logits, where the window's own backward is all that
    still needed them; and one storage is kept, and used for the next logits once no tensor, view, graph or array holds
    it. So the peak is lower by one of them, although one is kept.

    Cost:
        The memory that is kept, until `forget`.
    """

    def __init__(self) -> None:
        self._keeping = False
        self._kept: _Kept | None = None

    def keep(self) -> None:
        """Keep the memory of what is made from now on; not before the gradients, which need room, are there."""
        self._keeping = _holders is not None

    def forget(self) -> None:
        """Let go of everything, and keep nothing any more."""
        self._keeping, self._kept = False, None

    def empty(self, shape: Sequence[int], *, like: Tensor) -> Tensor:
        """Make an uninitialised, contiguous tensor.

        Args:
            shape: Its shape.
            like: Has its dtype and device.

        Returns:
            The tensor, which shares memory with nothing that is alive.
        """
        size = torch.Size(shape).numel() * like.itemsize
        if not self._keeping or size < SMALLEST or like.device.type != "cpu":
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        # Not much larger than needed: microbatches cut by length grow shorter.
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
        """Return what finds memory for that which backward turns a saved tensor into.

        Args:
            final: Whether the graph is let go of after the backward that is running.

        Returns:
            A function. It is given what backward has just taken from ``ctx.saved_tensors``, held by one name there,
            and returns a tensor of the same shape and dtype: in the same memory, if nothing but the graph and that
            name holds it, or else fresh.
        """
        return partial(self._place, final=final)

    def _place(self, saved: Tensor, *, final: Callable[[], bool]) -> Tensor:
        ours = self._kept is not None and self._kept.holds(saved)
        if final() and saved.is_contiguous() and _held_by(saved, ours=ours) in learn_to_count(type(saved)):
            return saved.detach()
        return torch.empty_like(saved, memory_format=torch.contiguous_format)


class _Observer(Scratch):
    """Count what holds a tensor, called just as the one that compares."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[type[Tensor], tuple[int, ...]]] = []

    def _place(self, saved: Tensor, *, final: Callable[[], bool]) -> Tensor:
        if final():
            self.seen.append((type(saved), _held_by(saved, ours=False)))
        return torch.empty_like(saved)


class _Kept:
    """A storage, held by a tensor of its own."""

    def __init__(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        self.tensor = torch.empty(0, dtype=made.dtype).set_(storage, 0, (0,), (1,))
        self.size, self._at = storage.nbytes(), storage._cdata  # pyright: ignore[reportPrivateUsage]

    @property
    def is_free(self) -> bool:
        """Whether nothing else holds it."""
        return _memory_held_by(self.tensor) == _memory_held_by(_Kept(torch.empty(1)).tensor) != ()

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is in this storage."""
        return tensor.untyped_storage()._cdata == self._at  # pyright: ignore[reportPrivateUsage]


def _memory_held_by(tensor: Tensor) -> tuple[int, ...]:
    """Count what holds a tensor's memory, in C++ and in Python."""
    if _holders is None:
        return ()
    storage = tensor.untyped_storage()
    return _holders(storage._cdata), sys.getrefcount(storage)  # pyright: ignore[reportPrivateUsage]


def _held_by(tensor: Tensor, *, ours: bool) -> tuple[int, ...]:
    """Count what holds a tensor, its memory beside us, and the tensor that it is a view of."""
    memory, base = _memory_held_by(tensor), cast("Any", tensor._base)
    count: Any = getattr(tensor, "_use_count", None)
    if not memory or count is None:
        return ()
    found = memory[0] - ours, memory[1], count(), sys.getrefcount(tensor)
    return found if base is None else (*found, base._use_count(), sys.getrefcount(base))


@cache
def learn_to_count(kind: type[Tensor]) -> frozenset[tuple[int, ...]]:
    """Count what holds a tensor that nothing but a graph holds: one of its own, and a view.

    Args:
        kind: The tensor's.

    Returns:
        Both counts; found out once, so that a meter that should not see that asks before it begins.
    """
    observer = _Observer()
    place = observer.places(final=lambda: True)
    with torch.enable_grad():
        leaf = torch.zeros(2, 2, device="cpu", requires_grad=True)
        for whole in (True, False):
            made: Any = _Saving.apply(leaf * 1 if whole else (leaf * 1).flatten(), place)
            made.backward(inputs=[leaf])
    return frozenset(counts for made_kind, counts in observer.seen if made_kind is kind and counts)


class _Saving(torch.autograd.Function):
    """Save a tensor, and look at it in backward just as a loss does."""

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
