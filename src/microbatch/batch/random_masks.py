"""Draw random masks as a function of an element's position: seed, call, row, and coordinates in the row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements that are hashed at once. On the CPU a block stays in cache; on a GPU large blocks need few kernels.
_BLOCK, _BLOCK_ON_DEVICE = 1 << 16, 1 << 24
_GOLDEN = 0x9E3779B97F4A7C15
# Shifts and multipliers of SplitMix64, and multipliers of MurmurHash3's finaliser.
_MIX64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MIX32 = (0x85EBCA6B, 0xC2B2AE35)


def derive(*numbers: int) -> int:
    """Return a 63-bit seed that depends on several integers and on their order.

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
    """Draw a mask in which each element depends only on the seed, its row and its coordinates in the row.

    A row has the same mask in every microbatch, whichever other rows are in it. The mask depends on coordinates and not
    on offsets in memory. So a row that is trimmed keeps the mask of the elements that remain.

    Args:
        keep: Probability that an element is kept; between 0 and 1, both excluded.
        shape: Shape of the mask; the first dimension is the rows.
        seed: Seed of this call.
        rows: Number of each row in the effective batch; shape ``(rows,)``, int64, on ``device``.
        from_end: Whether coordinates count from the end of each dimension, for rows that are trimmed at their
            beginning.
        device: Device of the mask.

    Returns:
        True where an element is kept; shape ``shape``, bool, on ``device``.

    Cost:
        Eleven passes of 32-bit integer arithmetic over a block that stays in cache; about 15 small operators.

    Example:
        >>> cpu, pair = torch.device("cpu"), torch.tensor([7, 3])
        >>> both = row_mask(0.5, (2, 9), seed=1, rows=pair, device=cpu)
        >>> alone = row_mask(0.5, (1, 5), seed=1, rows=pair[1:], device=cpu)
        >>> torch.equal(both[1:, :5], alone)
        True

    Source:
        SplitMix64 for the rows' words, MurmurHash3's finaliser for the elements.
    """
    first_word, second_word = _row_keys(seed, rows)
    places = _coordinate_words(shape[1:], from_end=from_end, device=device)
    mask = torch.empty((len(rows), places.numel()), dtype=torch.bool, device=device)
    # An element is kept if its hash, a signed 32-bit integer, is below `bound`: a share `keep` of all integers is.
    bound = min(round(keep * 2**32) - 2**31, 2**31 - 1)
    block = _BLOCK if device.type == "cpu" else _BLOCK_ON_DEVICE
    columns = max(1, min(places.numel(), block))
    for first in range(0, len(rows), max(1, block // columns)):
        rows_of_block = slice(first, first + max(1, block // columns))
        for place, out in zip(places.split(columns), mask[rows_of_block].split(columns, dim=1), strict=True):
            torch.lt(_mixed(first_word[rows_of_block, None] + place, second_word[rows_of_block, None]), bound, out=out)
    return mask.view(*shape)


def _row_keys(seed: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute two random 32-bit words for each row; each of shape ``(rows,)``, int32."""
    bits = _mixed64(rows.long() * _as_signed(_GOLDEN, 64) + _as_signed(derive(seed), 64))
    words = bits.view(torch.int32).view(-1, 2)
    return words[:, 0], words[:, 1]


def _coordinate_words(sizes: Sequence[int], *, from_end: bool, device: torch.device) -> Tensor:
    """Sum one random word per dimension for each position in a row; shape ``(product of sizes,)``, int32."""
    total = torch.zeros((), dtype=torch.int32, device=device)
    for dimension, size in enumerate(sizes):
        index = torch.arange(size, device=device) + (dimension + 1 << 40)
        words = _mixed64(index.flip(0) if from_end else index).view(torch.int32).view(-1, 2)[:, 0]
        total = total.unsqueeze(-1) + words
    return total.reshape(-1)


def _mixed(bits: Tensor, second_word: Tensor) -> Tensor:
    """Hash each element's word and its row's second word, in place; the upper bits of the result are random."""
    first, second = _MIX32
    scratch = torch.empty_like(bits)
    bits.bitwise_xor_(_shift_right(bits, 16, out=scratch)).mul_(_as_signed(first, 32))
    # Two rows whose first words are the same by chance get different masks by their second words.
    bits.bitwise_xor_(second_word)
    return bits.bitwise_xor_(_shift_right(bits, 13, out=scratch)).mul_(_as_signed(second, 32))


def _mixed64(bits: Tensor) -> Tensor:
    """Apply SplitMix64's mixing function to each element; shape and dtype (int64) of ``bits``."""
    for shift, factor in _MIX64:
        bits = (bits ^ _shift_right(bits, shift)) * _as_signed(factor, 64)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, by: int, *, out: Tensor | None = None) -> Tensor:
    """Shift to the right and fill with zeros, where torch fills signed integers with the sign bit."""
    width = bits.dtype.itemsize * 8
    return torch.bitwise_right_shift(bits, by, out=out).bitwise_and_((1 << width - by) - 1)


def _as_signed(number: int, width: int) -> int:
    """Return the signed integer of ``width`` bits that has the same bits as ``number``."""
    return number - (1 << width) if number >= 1 << width - 1 else number
