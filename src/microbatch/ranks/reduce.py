"""The all-reduce of a window's finished gradients, in buckets, once per window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from microbatch.ranks.process_group import RankGroup

BUCKET_BYTES = 25 * 1024 * 1024


class Flat:
    """A buffer for one bucket of gradients, reused from step to step."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the buffer, enlarged if necessary."""
        held = self._held.pop((dtype, device), None)
        if held is None or held.numel() < numel:
            del held  # before the next allocation, so that only one buffer is alive
            held = torch.empty(numel, dtype=dtype, device=device)
        self._held[dtype, device] = held
        return held[:numel]


def reduce_(
    ranks: RankGroup, gradients: Sequence[Tensor], factor: float, *, dtypes: Sequence[torch.dtype], flat: Flat
) -> None:
    """Replace every gradient by the sum over all ranks of ``factor * gradient``.

    Each rank has its own factor, ``expected / count``, so the ranks may have expected different counts.

    Args:
        ranks: The data-parallel ranks.
        gradients: Dense tensors; the same shapes, dtypes and order on every rank.
        factor: What this rank's gradients are multiplied by before the all-reduce.
        dtypes: The dtype of each gradient's all-reduce. A gradient is rounded once if it is wider than that dtype, and
            the sum once if the gradient is narrower.
        flat: A buffer for buckets of several gradients. A gradient as large as a bucket is reduced in place.

    Cost:
        One all-reduce per bucket of 25 MiB, and one copy of each bucket in and out.

    Source:
        Law R4.
    """
    for bucket, dtype in buckets_of(gradients, dtypes):
        if (alone := _alone(bucket, dtype)) is not None:
            alone.mul_(factor)
            ranks.sum_(alone)
            continue
        narrows = torch.promote_types(bucket[0].dtype, dtype) != dtype
        whole = flat.take(sum(gradient.numel() for gradient in bucket), dtype, bucket[0].device)
        pieces = whole.split([gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            piece.copy_((gradient.mul_(factor) if narrows else gradient).reshape(-1))
        if not narrows:
            whole.mul_(factor)
        ranks.sum_(whole)
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))


def reserve(gradients: Sequence[Tensor], *, dtypes: Sequence[torch.dtype], flat: Flat) -> None:
    """Allocate the largest bucket now, so that running out of memory can still be reported to the other ranks."""
    for bucket, dtype in buckets_of(gradients, dtypes):
        if _alone(bucket, dtype) is None:
            flat.take(sum(gradient.numel() for gradient in bucket), dtype, bucket[0].device)


def _alone(bucket: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Return a bucket's only gradient if it can be reduced in place."""
    fits = len(bucket) == 1 and bucket[0].dtype == dtype and bucket[0].is_contiguous()
    return bucket[0] if fits else None


def buckets_of(
    gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[list[Tensor], torch.dtype]]:
    """Group gradients of one dtype and device, in order, into buckets of about the same bytes.

    Args:
        gradients: The gradients to reduce, on any devices.
        dtypes: The dtype of each gradient's all-reduce.

    Yields:
        The gradients of a bucket, and the dtype of its all-reduce.
    """
    open_: dict[tuple[torch.dtype, torch.dtype, torch.device], list[Tensor]] = {}
    sizes: dict[tuple[torch.dtype, torch.dtype, torch.device], int] = {}
    for gradient, dtype in zip(gradients, dtypes, strict=True):
        kind = (gradient.dtype, dtype, gradient.device)
        open_.setdefault(kind, []).append(gradient)
        sizes[kind] = sizes.get(kind, 0) + gradient.numel() * gradient.element_size()
        if sizes[kind] >= BUCKET_BYTES:
            yield open_.pop(kind), dtype
            del sizes[kind]
    yield from ((bucket, dtype) for (_, dtype, _), bucket in open_.items())
