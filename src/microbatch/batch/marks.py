"""The marks `Whole` and `Rows`, with which a user says what a value of a batch is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from microbatch.arguments import whole
from microbatch.errors import BatchError


@dataclass(frozen=True, slots=True)
class Whole:
    """Mark a value of a batch that has no rows, so that every microbatch gets the complete value.

    The mark is needed for tensors of one or more dimensions and for lists, such as class weights, and for objects that
    hold tensors or arrays. 0-d tensors, numbers, strings and `None` never have rows. The loss function receives the
    value without the mark.

    Attributes:
        value: Any object.

    Example:
        >>> import torch
        >>> from microbatch.batch.batch_tree import rows_of
        >>> batch = {"x": torch.zeros(4, 2), "class_weights": Whole(torch.ones(10))}
        >>> rows_of(batch)
        4
    """

    value: Any


@dataclass(frozen=True, slots=True)
class Rows:
    """Mark a value of a batch, and say where its rows are.

    Without the mark, the rows of a tensor are its first dimension. The mark is needed for tensors with rows in another
    dimension, for several consecutive entries per row, and for lists with one item per row. The loss function receives
    the rows of its microbatch without the mark, in the value's own layout.

    A value whose first half belongs to its second half, such as N chosen texts above N rejected ones, is marked as
    ``Rows(value.unflatten(0, (2, -1)), dim=1)``. The loss function undoes it with ``.flatten(0, 1)``.

    Attributes:
        value: A tensor, a NumPy array, a list or a tuple with the rows' items, or another object that slices itself.
            Or a dict or a dataclass of such values, which all have the same layout.
        dim: Dimension of the rows, from 0; for tensors and arrays. Below 0 it counts from the last dimension.
        group: Number of consecutive entries that are one row; at least 1. For example 2 for pairs one after the other.

    Raises:
        BatchError: The value cannot have rows, or ``dim`` or ``group`` is not a whole number in range.

    Example:
        >>> import torch
        >>> from microbatch.batch.batch_tree import rows_of
        >>> rows_of({"images": Rows([torch.zeros(3, 8, 8), torch.zeros(3, 5, 9)])})
        2
        >>> time, rows, features = 20, 4, 8
        >>> rows_of(Rows(torch.zeros(time, rows, features), dim=1))
        4
        >>> rows_of(Rows(torch.zeros(10, 3), group=2))
        5
    """

    value: Any
    dim: int = 0
    group: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        for name, number, least in (("dim", self.dim, None), ("group", self.group, 1)):
            plain = whole(number, least=least)
            if plain is None:
                limit = "" if least is None else f" of at least {least}"
                raise BatchError(f"mb.Rows takes a whole number{limit} as {name}=, not {number!r:.200}")
            object.__setattr__(self, name, plain)  # as an int
        if isinstance(self.value, Rows | Whole):
            raise BatchError(f"mb.Rows takes a value without a mark, not an mb.{type(self.value).__name__}")
        if self.value is None or isinstance(self.value, bool | int | float | complex):
            raise BatchError(
                f"mb.Rows takes a tensor, an array, a list with one item per row, or a dict of them, not "
                f"{self.value!r:.200}. Leave the mark out for a value without rows"
            )
