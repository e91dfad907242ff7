"""Add a matrix product to a sum without a temporary as large as the sum."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# Maximum elements of a piece of a product that is added to a sum of another dtype. Measured for bf16 on the CPU, beside
# whole products: pieces of this size take 0.7 to 1.3 of the time, pieces of 262,144 elements 0.8 to 1.7. Pieces of
# twice the size are a little faster, and with what the addition needs they can be larger than a whole product.
PIECE = 1 << 19
_ALIGNED = 32  # rows; odd or uneven pieces take 1.1 to 1.2 times as long as even ones


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right`` to a sum, in place.

    Args:
        total: Shape ``(m, n)``; its dtype is at least as wide as that of the factors.
        left: Shape ``(k, m)``.
        right: Shape ``(k, n)``.

    Cost:
        One matrix product that accumulates. If the dtypes differ and the device does not support that, products of at
        most 524,288 elements.

    Example:
        >>> total = torch.ones(1, 2)
        >>> add_product_(total, torch.tensor([[2.0], [3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> total
        tensor([[3., 4.]])
    """
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    elif total.device.type != "cpu" and _accumulates_wide(total.device, left.dtype, total.dtype):
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        for rows, piece in product_pieces(left, right):
            total[rows].add_(piece)


def product_pieces(left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Compute ``left^T right``, a few rows at a time.

    Args:
        left: Shape ``(k, m)``.
        right: Shape ``(k, n)``.

    Yields:
        A slice of rows, and these rows of the product: shape ``(rows, n)``, at most 524,288 elements or one row.
    """
    most, rows = max(1, PIECE // max(1, right.shape[1])), left.shape[1]
    even = -(-rows // -(-rows // most)) if rows else 1
    size = min(most, -(-even // _ALIGNED) * _ALIGNED)
    for start in range(0, rows, size):
        yield slice(start, start + size), left[:, start : start + size].T @ right


@cache
def _accumulates_wide(device: torch.device, narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Return whether a GPU and this version of torch add a narrow product to a wide sum in one call."""
    total = torch.ones(16, 16, device=device, dtype=wide)
    ones = torch.ones(16, 16, device=device, dtype=narrow)
    try:
        torch.addmm(total, ones, ones, out_dtype=wide, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
