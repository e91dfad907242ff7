"""The all-gather of representations for a loss that couples samples, and the reduction of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from microbatch.errors import RankAgainError, RankError
from microbatch.ranks.process_group import RUN_AGAIN, RankGroup

_FAILED, _RETRY = 1.0, 2.0  # the state of a rank beside gradients
_AGAIN = "again"  # sent by a rank that ran out of memory and will run its batch again
# A rank's number of rows, the structure of its representations, and the dtype and row shape of each of them.
_Description: TypeAlias = tuple[int, Any, list[tuple[torch.dtype, tuple[int, ...]]]]


class Exchange:
    """Gather the representations of all ranks, return their gradients, and agree on success.

    These three collectives, `gather`, `give_back` and `agree`, run in this order. Every rank takes part in each of
    them, even after a failure, so no rank hangs. A rank that ran out of memory may report that it will run its batch
    again. Then all ranks run their batches again, because the others' losses used representations that will change.

    Args:
        ranks: The data-parallel ranks.
        together: Whether the ranks run their encoders together, as fully sharded ranks do. Then a rank that ran out of
            memory before `gather` cannot encode again on its own.

    Attributes:
        begun: Whether `gather` is over.
        over: Whether all three collectives are over.

    Source:
        Laws C3, R2, R7.
    """

    def __init__(self, ranks: RankGroup, *, together: bool = False) -> None:
        self._ranks, self._together = ranks, together
        self._finished = 0
        self._rows: list[int] = []
        self._sizes = 0
        self._dtype = torch.float32

    @property
    def begun(self) -> bool:
        """Whether `gather` is over."""
        return self._finished > 0

    @property
    def over(self) -> bool:
        """Whether all three collectives are over."""
        return self._finished == 3

    @property
    def rows(self) -> int:
        """Number of rows on all ranks together, after `gather`."""
        return sum(self._rows)

    def gather(self, tensors: Sequence[Tensor], form: Any) -> tuple[list[Tensor], Any]:
        """Concatenate the representations of all ranks, in the order of the ranks.

        Args:
            tensors: This rank's representations, each of shape ``(rows, ...)`` without a graph; none if this rank has
                no rows.
            form: The structure that holds the tensors; the same on every rank that has rows.

        Returns:
            The same tensors with the rows of all ranks, and the structure.

        Raises:
            RankError: A rank failed, or the ranks' representations differ in structure, dtype or row shape.
            RankAgainError: A rank will run its batch again, and needs the other ranks for that.

        Cost:
            One message of a few hundred bytes with a host synchronisation, and one all-gather of all representations.
        """
        rows = len(tensors[0]) if tensors else 0
        kinds = [(tensor.dtype, tuple(tensor.shape[1:])) for tensor in tensors]
        found = self._all_gather((rows, form, kinds))
        self._rows = [each[0] for each in found]
        described = [(form, kinds) for number, form, kinds in found if number]
        if not described:
            return [], None
        form, kinds = described[0]
        if any(each != (form, kinds) for each in described):
            raise RankError(
                f"the ranks' representations differ in structure, dtype or row shape: {described}; encode must return "
                "the same kind on every rank"
            )
        self._sizes = sum(self.rows * shape.numel() for _, shape in _floating(kinds))
        self._dtype = torch.float32
        for dtype, _ in _floating(kinds):
            self._dtype = torch.promote_types(self._dtype, dtype)
        return self._gather_bytes(tensors, kinds), form

    def give_back(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Sum the gradients of the representations over all ranks' losses, and return this rank's rows.

        Args:
            gradients: The gradients of this rank's loss with respect to the gathered representations; `None` for zero.
            like: The gathered representations.

        Returns:
            For each floating-point representation, the gradient of the sum of all ranks' losses, for this rank's rows;
            `None` for other dtypes.

        Raises:
            RankError: A rank failed.
            RankAgainError: A rank will run its batch again.

        Cost:
            One all-reduce as large as the gathered representations, in float32 or a wider dtype.
        """
        flat = [
            (torch.zeros_like(tensor) if grad is None else grad).to(self._dtype).flatten()
            for grad, tensor in zip(gradients, like, strict=True)
            if tensor.is_floating_point()
        ]
        total = self._sum(torch.cat(flat) if flat else self._zeros(0))
        start = sum(self._rows[: self._ranks.index])
        stop = start + self._rows[self._ranks.index]
        pieces = iter(total.split([each.numel() for each in flat]))
        return [
            next(pieces).view(tensor.shape)[start:stop].to(tensor.dtype) if tensor.is_floating_point() else None
            for tensor in like
        ]

    def agree(self) -> None:
        """Wait until every rank has run backward from its representations."""
        self._sum(self._zeros(0))

    def fail(self, *, again: bool) -> None:
        """Report a failure of this rank in the collective that the other ranks wait in.

        Args:
            again: Whether this rank will run the same batch again.

        Raises:
            RankError: This rank would run the batch again, but another rank has failed and will not.
        """
        if self._finished == 0:
            # The other ranks only wait for this rank's representations; a later attempt may make them.
            if not again or self._together:
                self._all_gather(_AGAIN if again else None, failed=True)
        else:
            self._sum(self._zeros(self._sizes if self._finished == 1 else 0), failed=not again, again=again)

    def _all_gather(self, own: _Description | str | None, *, failed: bool = False) -> list[_Description]:
        self._finished += 1
        found = self._ranks.tell(own)
        self._check(
            [index for index, each in enumerate(found) if each is None],
            found.count(_AGAIN),
            failed=failed and own is None,
            again=own == _AGAIN,
        )
        return found

    def _check(self, failed_there: Sequence[int], again_there: float, *, failed: bool, again: bool) -> None:
        """Raise the error for the other ranks' failures, unless this rank has itself failed for good."""
        if failed:
            return
        if failed_there:
            raise self._ranks.failed_error(failed_there)
        if again_there and not again:
            raise RankAgainError(
                f"another rank ran out of memory in a computation that all ranks depend on, {RUN_AGAIN}"
            )

    def _sum(self, numbers: Tensor, *, failed: bool = False, again: bool = False) -> Tensor:
        self._finished += 1
        size, index = self._ranks.size, self._ranks.index
        states = numbers.new_zeros(size)  # one for each rank, which is 0 on all other ranks
        states[index] = _FAILED if failed else _RETRY if again else 0.0
        vector = torch.cat([states, numbers])
        self._ranks.sum_(vector)
        found = vector[:size].tolist()
        there = [rank for rank, state in enumerate(found) if state == _FAILED]
        self._check(there, found.count(_RETRY), failed=failed, again=again)
        return vector[size:]

    def _zeros(self, number: int) -> Tensor:
        return torch.zeros(number, dtype=self._dtype, device=self._ranks.device)

    def _gather_bytes(
        self, tensors: Sequence[Tensor], kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]
    ) -> list[Tensor]:
        """All-gather tensors of any dtypes as bytes, in one collective, padded to the rank with the most rows."""
        row_bytes = [dtype.itemsize * torch.Size(shape).numel() for dtype, shape in kinds]
        device = self._ranks.device
        mine = torch.zeros(max(self._rows) * sum(row_bytes), dtype=torch.uint8, device=device)
        if tensors:
            own = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])
            mine[: len(own)] = own
        pieces: list[list[Tensor]] = []
        for rows, given in zip(self._rows, self._ranks.gather(mine), strict=True):
            parts = given[: rows * sum(row_bytes)].split([rows * each for each in row_bytes])
            # Cloned, because a slice of the bytes may not be aligned for its dtype.
            pieces.append(
                [part.clone().view(dtype).view(rows, *shape) for part, (dtype, shape) in zip(parts, kinds, strict=True)]
            )
        return [torch.cat(columns) for columns in zip(*pieces, strict=True)]


def _floating(kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[tuple[torch.dtype, torch.Size]]:
    return [(dtype, torch.Size(shape)) for dtype, shape in kinds if dtype.is_floating_point]
