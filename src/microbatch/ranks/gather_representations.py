"""What ranks tell one another about representations: everybody's to everybody, and their gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from microbatch.errors import RankAgainError, RankError
from microbatch.ranks.process_group import Ranks

# Of a rank: its rows, the form of its representations, and each one's dtype and shape without the rows.
_AGAIN = "again"
_Said: TypeAlias = tuple[int, Any, list[tuple[torch.dtype, tuple[int, ...]]]]


class Exchange:
    """Gather the representations of all ranks, hand their gradients back, and agree on how it went.

    These are three moments, and at each of them every rank says something, also one that has failed since the last: no
    rank waits for a message that never comes. A rank that ran out of memory and will run its batch again says so, and
    then all of them do, because the others' loss was of representations that will be made anew.

    Args:
        ranks: The ranks.
        together: Whether the ranks make their representations together, so that one which ran out of memory before the
            first moment cannot make its own again while the others wait for them.

    Attributes:
        begun: Whether the first moment has passed.
        over: Whether the last one has.

    Source:
        Laws C3, R2, R7.
    """

    def __init__(self, ranks: Ranks, *, together: bool = False) -> None:
        self._ranks, self._together = ranks, together
        self._moment = 0
        self._rows: list[int] = []
        self._sizes = 0
        self._dtype = torch.float32

    @property
    def begun(self) -> bool:
        """Whether the first moment has passed."""
        return self._moment > 0

    @property
    def over(self) -> bool:
        """Whether all three moments have passed."""
        return self._moment == 3

    @property
    def rows(self) -> int:
        """Rows of all ranks, once they are gathered."""
        return sum(self._rows)

    def gather(self, tensors: Sequence[Tensor], form: Any) -> tuple[list[Tensor], Any]:
        """Put the representations of all ranks together, in the order of the ranks.

        Args:
            tensors: This rank's, each of shape ``(rows, ...)`` without a graph; none on a rank without rows.
            form: How they belong together; the same on every rank that has rows.

        Returns:
            The same tensors with all ranks' rows, and the form.

        Raises:
            RankError: A rank failed, or the ranks' representations are of different kinds.
            RankAgainError: A rank will run its batch again, and cannot do so alone.

        Cost:
            One message of a few hundred bytes with a host synchronisation, and one all-gather of all representations.
        """
        rows = len(tensors[0]) if tensors else 0
        kinds = [(tensor.dtype, tuple(tensor.shape[1:])) for tensor in tensors]
        told = self._tell((rows, form, kinds))
        self._rows = [each[0] for each in told]
        speaking = [(form, kinds) for number, form, kinds in told if number]
        if not speaking:
            return [], None
        form, kinds = speaking[0]
        if any(each != (form, kinds) for each in speaking):
            raise RankError(f"the ranks' representations are of different kinds: {speaking}")
        self._sizes = sum(self.rows * shape.numel() for _, shape in _floating(kinds))
        self._dtype = torch.float32
        for dtype, _ in _floating(kinds):
            self._dtype = torch.promote_types(self._dtype, dtype)
        return self._bytes(tensors, kinds), form

    def give_back(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Add up what the ranks' losses say about all representations, and take this rank's part.

        Args:
            gradients: This rank's loss's, for all ranks' rows; `None` where it has none.
            like: The representations.

        Returns:
            For each floating-point representation the gradient of the sum of all ranks' losses, for this rank's rows;
            `None` for others.

        Raises:
            RankError: A rank failed.
            RankAgainError: A rank will run its batch again.

        Cost:
            One all-reduce of as many numbers as there are in the representations, in float32 at least.
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
        """Wait until every rank has pushed its gradients back.

        Raises:
            RankError: A rank failed.
            RankAgainError: A rank will run its batch again.

        Cost:
            One all-reduce of two numbers, with a host synchronisation.
        """
        self._sum(self._zeros(0))

    def fail(self, *, again: bool) -> None:
        """Tell the ranks, who wait for this one, that it has failed.

        Args:
            again: Whether it will run the same batch again.

        Raises:
            RankError: It would, and another one has failed for good.
        """
        if self._moment == 0:
            # The others wait for this batch's representations, and it does not matter in which attempt they are made.
            if not again or self._together:
                self._tell(_AGAIN if again else None, failed=True)
        else:
            self._sum(self._zeros(self._sizes if self._moment == 1 else 0), failed=not again, again=again)

    def _tell(self, said: _Said | str | None, *, failed: bool = False) -> list[_Said]:
        self._moment += 1
        told = self._ranks.tell(said)
        self._check(told.count(None), told.count(_AGAIN), failed=failed and said is None, again=said == _AGAIN)
        return told

    def _check(self, failed_there: float, again_there: float, *, failed: bool, again: bool) -> None:
        """Raise what the others' word means, where this rank has not failed itself."""
        if failed:
            return
        if failed_there:
            raise RankError(_failed(int(failed_there), self._ranks.size))
        if again_there and not again:
            raise RankAgainError(
                "another rank ran out of memory in what all ranks of this window need, so the batch has to be run "
                "again on every rank; gradients, random state and buffers are as before the window"
            )

    def _sum(self, numbers: Tensor, *, failed: bool = False, again: bool = False) -> Tensor:
        self._moment += 1
        vector = torch.cat([numbers.new_tensor([float(failed), float(again)]), numbers])
        self._ranks.sum_(vector)
        self._check(*vector[:2].tolist(), failed=failed, again=again)
        return vector[2:]

    def _zeros(self, number: int) -> Tensor:
        return torch.zeros(number, dtype=self._dtype, device=self._ranks.device)

    def _bytes(self, tensors: Sequence[Tensor], kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
        """Gather tensors of any dtypes as bytes, in one collective, each rank's padded to the longest."""
        row_bytes = [dtype.itemsize * torch.Size(shape).numel() for dtype, shape in kinds]
        device = self._ranks.device
        mine = torch.zeros(max(self._rows) * sum(row_bytes), dtype=torch.uint8, device=device)
        if tensors:
            own = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])
            mine[: len(own)] = own
        pieces: list[list[Tensor]] = []
        for rows, given in zip(self._rows, self._ranks.gather(mine), strict=True):
            parts = given[: rows * sum(row_bytes)].split([rows * each for each in row_bytes])
            # A copy, because bytes in the middle of others may not stand where numbers can.
            pieces.append(
                [part.clone().view(dtype).view(rows, *shape) for part, (dtype, shape) in zip(parts, kinds, strict=True)]
            )
        return [torch.cat(columns) for columns in zip(*pieces, strict=True)]


def _floating(kinds: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[tuple[torch.dtype, torch.Size]]:
    return [(dtype, torch.Size(shape)) for dtype, shape in kinds if dtype.is_floating_point]


def _failed(number: int, size: int) -> str:
    return (
        f"{number} of {size} ranks failed inside this window; its gradients are dropped here too (the failing rank's "
        "own error says why)"
    )
