"""Add up the finished gradients of all ranks, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from microbatch.ranks.process_group import Ranks

BUCKET_BYTES = 25 * 1024 * 1024


class Flat:
    """Memory for one bucket at a time, kept from step to step."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory of the last bucket, or more of it.

        Args:
            numel: Numbers that are to find room.
            dtype: Of them.
            device: Where.

        Returns:
            Uninitialised; shape ``(numel,)``.
        """
        held = self._held.pop((dtype, device), None)
        if held is None or held.numel() < numel:
            del held  # before there is another
            held = torch.empty(numel, dtype=dtype, device=device)
        self._held[dtype, device] = held
        return held[:numel]


def reduce_(
    ranks: Ranks, gradients: Sequence[Tensor], factor: float, *, dtypes: Sequence[torch.dtype], flat: Flat
) -> None:
    """Replace every gradient with the sum over all ranks of ``factor * gradient``.

    Each rank brings its own factor, ``expected / count``, so the ranks need not have expected the same count.

    Args:
        ranks: The ranks.
        gradients: Dense, and the same shapes, dtypes and order on every rank.
        factor: What this rank's gradients are multiplied with on their way.
        dtypes: In which each is added up; rounded once where that is narrower, or where the gradient is.
        flat: Memory for buckets of several gradients. One that fills a bucket is added up where it is.

    Cost:
        One all-reduce per bucket of 25 MiB, and a copy of a bucket.

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
    """Find out whether there is memory for a bucket, while the other ranks can still be told that there is not.

    Args:
        gradients: What `reduce_` will be given.
        dtypes: Likewise.
        flat: Likewise.
    """
    for bucket, dtype in buckets_of(gradients, dtypes):
        if _alone(bucket, dtype) is None:
            flat.take(sum(gradient.numel() for gradient in bucket), dtype, bucket[0].device)


def _alone(bucket: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Return the one gradient of a bucket, if it can be added up in its own memory."""
    fits = len(bucket) == 1 and bucket[0].dtype == dtype and bucket[0].is_contiguous()
    return bucket[0] if fits else None


def buckets_of(
    gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> Iterator[tuple[list[Tensor], torch.dtype]]:
    """Group gradients of one dtype and device, in order, into buckets of about the same bytes.

    Args:
        gradients: What is to be reduced; where they are does not matter.
        dtypes: In which each is added up.

    Yields:
        The gradients of a bucket, and the dtype in which they are added up.
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
