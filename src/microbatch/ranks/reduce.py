"""Add up the finished gradients of all ranks, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from microbatch.ranks.group import Ranks

BUCKET_BYTES = 25 * 1024 * 1024


def reduce_(ranks: Ranks, gradients: Sequence[Tensor], factor: float) -> None:
    """Replace every gradient with the sum over all ranks of ``factor * gradient``.

    Each rank brings its own factor, ``expected / count``, so the ranks need not have expected the same count. Gradients
    narrower than float32 are added up in float32, and rounded once.

    Args:
        ranks: The ranks.
        gradients: Dense, and the same shapes, dtypes and order on every rank.
        factor: What this rank's gradients are multiplied with on their way.

    Cost:
        One all-reduce per bucket of 25 MiB, and a copy of a bucket.

    Source:
        Law R4.
    """
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        flat.mul_(factor)
        ranks.sum_(flat)
        pieces = flat.split([gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))


def reserve(gradients: Sequence[Tensor]) -> None:
    """Find out whether there is memory for a bucket, while the other ranks can still be told that there is not.

    Args:
        gradients: What `reduce_` will be given.

    Cost:
        One allocation, which CUDA's allocator keeps at hand.
    """
    buckets = [(sum(gradient.numel() for gradient in bucket), bucket[0]) for bucket in _buckets(gradients)]
    if buckets:
        numel, like = max(buckets, key=lambda bucket: bucket[0] * bucket[1].element_size())
        torch.empty(numel, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group gradients of one dtype and device, in order, into buckets of about the same bytes."""
    open_: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for gradient in gradients:
        kind = (gradient.dtype, gradient.device)
        open_.setdefault(kind, []).append(gradient)
        sizes[kind] = sizes.get(kind, 0) + gradient.numel() * gradient.element_size()
        if sizes[kind] >= BUCKET_BYTES:
            yield open_.pop(kind)
            del sizes[kind]
    yield from open_.values()
