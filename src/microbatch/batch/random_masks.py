"""Random masks that are a function of where an element stands: seed, call, row and coordinates in the row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements whose bits are mixed at once: on the CPU they stay in cache, on a GPU few kernels do.
_PIECE, _PIECE_ON_DEVICE = 1 << 16, 1 << 24
_GOLDEN = 0x9E3779B97F4A7C15
# Multipliers of SplitMix64 and of MurmurHash3's last steps.
_MIX64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MIX32 = (0x85EBCA6B, 0xC2B2AE35)


def derive(*numbers: int) -> int:
    """Make one seed of several numbers.

    Args:
        numbers: Any, in an order that matters.

    Returns:
        63 bits that depend on all of them.

    Example:
        >>> derive(1, 2) == derive(1, 2), derive(1, 2) == derive(2, 1)
        (True, False)
    """
    bits = 0
    for number in numbers:
        bits = (bits ^ number) + _GOLDEN & (1 << 64) - 1
        for shift, factor in _MIX64:
            bits = (bits ^ bits >> shift) * factor & (1 << 64) - 1
        bits ^= bits >> 31
    return bits >> 1


def row_mask(
    keep: float, shape: Sequence[int], *, seed: int, rows: Tensor, from_end: bool = False, device: torch.device
) -> Tensor:
    """Draw which elements are kept, so that an element's lot depends on its row and its place in the row alone.

    A row's lot is the same whichever rows it comes with. Coordinates count, not offsets: a row that is cut off at some
    length keeps the lots of what is left.

    Args:
        keep: Probability of each element; in (0, 1).
        shape: The mask's; the first dimension are the rows.
        seed: Of this draw.
        rows: Which row of the batch each one is; shape ``(rows,)``, int64, on ``device``.
        from_end: Whether coordinates count from the end of each dimension, for rows that are cut off at the beginning.
        device: Where the mask should be.

    Returns:
        True where an element is kept; bool.

    Cost:
        Eleven passes of 32-bit integers over a piece that stays in cache; about 15 small operators.

    Example:
        >>> cpu, pair = torch.device("cpu"), torch.tensor([7, 3])
        >>> both = row_mask(0.5, (2, 9), seed=1, rows=pair, device=cpu)
        >>> alone = row_mask(0.5, (1, 5), seed=1, rows=pair[1:], device=cpu)
        >>> torch.equal(both[1:, :5], alone)
        True

    Source:
        SplitMix64 for the rows' keys, MurmurHash3's finaliser for the elements.
    """
    begin, later = _row_keys(seed, rows)
    coordinates = _coordinates(shape[1:], from_end=from_end, device=device)
    mask = torch.empty((len(rows), coordinates.numel()), dtype=torch.bool, device=device)
    # Signed numbers from the least on: kept are those below a bound that leaves `keep` of them.
    bound = min(round(keep * 2**32) - 2**31, 2**31 - 1)
    piece = _PIECE if device.type == "cpu" else _PIECE_ON_DEVICE
    columns = max(1, min(coordinates.numel(), piece))
    for first in range(0, len(rows), max(1, piece // columns)):
        some = slice(first, first + max(1, piece // columns))
        for place, out in zip(coordinates.split(columns), mask[some].split(columns, dim=1), strict=True):
            torch.lt(_mixed(begin[some, None] + place, later[some, None]), bound, out=out)
    return mask.view(*shape)


def _row_keys(seed: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Make two words of 32 bits for every row; shape ``(rows,)``, int32."""
    bits = _mixed64(rows.long() * _signed(_GOLDEN, 64) + _signed(derive(seed), 64))
    words = bits.view(torch.int32).view(-1, 2)
    return words[:, 0], words[:, 1]


def _coordinates(sizes: Sequence[int], *, from_end: bool, device: torch.device) -> Tensor:
    """Add up a random word for each coordinate; shape ``(product of sizes,)``, int32."""
    total = torch.zeros((), dtype=torch.int32, device=device)
    for dimension, size in enumerate(sizes):
        index = torch.arange(size, device=device) + (dimension + 1 << 40)
        words = _mixed64(index.flip(0) if from_end else index).view(torch.int32).view(-1, 2)[:, 0]
        total = total.unsqueeze(-1) + words
    return total.reshape(-1)


def _mixed(bits: Tensor, later: Tensor) -> Tensor:
    """Mix words in place, so that their upper bits are random."""
    first, second = _MIX32
    held = torch.empty_like(bits)
    bits.bitwise_xor_(_shifted(bits, 16, out=held)).mul_(_signed(first, 32))
    # Rows whose first words put them in step by chance part here.
    bits.bitwise_xor_(later)
    return bits.bitwise_xor_(_shifted(bits, 13, out=held)).mul_(_signed(second, 32))


def _mixed64(bits: Tensor) -> Tensor:
    for shift, factor in _MIX64:
        bits = (bits ^ _shifted(bits, shift)) * _signed(factor, 64)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int, *, out: Tensor | None = None) -> Tensor:
    """Shift to the right, with zeros coming in: of signed numbers the sign would."""
    width = bits.dtype.itemsize * 8
    return torch.bitwise_right_shift(bits, by, out=out).bitwise_and_((1 << width - by) - 1)


def _signed(number: int, width: int) -> int:
    return number - (1 << width) if number >= 1 << width - 1 else number
