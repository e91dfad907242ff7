"""What a window divides its loss by, as far as that is known before the first backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from microbatch.batch.batch_tree import rows_of
from microbatch.errors import MissingCountError, WindowError
from microbatch.loss.loss import Count, Share, check_number
from microbatch.loss.tally import Tally
from microbatch.ranks.agreement import Message, agree
from microbatch.ranks.process_group import Ranks
from microbatch.step.settings import Counts


class Denominators:
    """Keep the window's tally, and learn from its batches what to expect.

    Args:
        counts: Denominators of the loss's terms: a function of the whole batch, or its result; `None` where the one
            denominator is whatever was really in the window.
        estimate: What the count was last time; `None` for the first window.
        ranks: Who else holds a share of the batch.
        parameters: How many gradients the window has; the ranks must agree on it.
        known: Rows and denominators over all ranks, where an earlier attempt at the window learned them.

    Attributes:
        tally: Sums and counts of the window's losses.
        known: What was learned: rows and denominators over all ranks.

    Source:
        Laws N1 to N9.
    """

    def __init__(
        self,
        counts: Counts | None,
        *,
        estimate: float | None,
        ranks: Ranks | None,
        parameters: int,
        known: tuple[float, Mapping[str, float]] | None = None,
    ) -> None:
        self._counts = counts
        self._estimate = estimate
        self._ranks = ranks
        self._parameters = parameters
        self._earlier = known
        self.known: tuple[float, Mapping[str, float]] | None = None
        self.tally = Tally(estimate=estimate or 1.0)

    def expect(self, batches: Sequence[Any], *, begun: bool) -> None:
        """Learn from the window's batches what can be known before the first backward.

        Args:
            batches: This rank's share of the effective batch.
            begun: Whether a backward has run already.

        Raises:
            WindowError: One has, and ``counts`` needs the whole batch before it.
            MissingCountError: ``counts`` does not give a dict of term to count.
        """
        rows = float(sum(rows_of(batch) for batch in batches))
        if self._counts is None:
            self.tally.rows = int(rows)
            self.tally.estimate = self._estimate or rows
            return
        if begun:
            raise WindowError("counts= needs the whole batch before the first backward; call window.split once, first")
        if self._earlier is not None:
            self._take(*self._earlier)
        else:
            self._declare(self._counts, batches, rows=rows)

    def share(self, rows: float) -> None:
        """Expect what every rank expects, because the ranks' gradients meet before they are normalised.

        Args:
            rows: Of the effective batch, over all ranks.
        """
        if self.tally.declared is None:
            self.tally.rows, self.tally.estimate, self.tally.shared = None, self._estimate or rows, True

    def need(self) -> None:
        """See to it that what must be known before a backward is.

        Raises:
            MissingCountError: The window was given no batch, and ``counts`` cannot be known without one.
        """
        if self._counts is None or self.tally.declared is not None:
            return
        if callable(self._counts) or self._ranks is not None:
            raise MissingCountError(
                "counts= is evaluated on the whole batch, on all ranks together, before the first backward; let "
                "window.split(batch) cut it"
            )
        self._declare(self._counts, [], rows=0.0)

    def whole(self, shares: list[Share], *, rows: int) -> list[Share]:
        """Learn them from a loss of the whole batch, over all ranks, which says every one of them at once.

        Args:
            shares: The loss.
            rows: Rows of the batch.

        Returns:
            The shares that contribute.

        Cost:
            A host synchronisation where several terms have counts on the device.
        """
        if len(shares) > 1 and any(not share.is_mean for share in shares):
            counts = {share.name: _number(share.count, share.name) for share in shares}
            shares = [share for share in shares if counts[share.name]]
            self._take(float(rows), {name: count for name, count in counts.items() if count})
        else:
            self.tally.rows = rows
            self.tally.estimate = self._estimate or float(rows)
        return shares

    def _declare(self, counts_of: Counts, batches: Sequence[Any], *, rows: float) -> None:
        counts = _declared(counts_of, batches)
        if self._ranks is not None:
            message = Message(
                names=list(counts),
                sums=[0.0] * len(counts),
                counts=list(counts.values()),
                samples=rows,
                double=False,
                present=[False] * self._parameters,
            )
            agreed = agree(self._ranks, message, parameters=self._parameters)
            rows, counts = agreed.samples, dict(zip(agreed.names, agreed.counts, strict=True))
        self._take(rows, counts)

    def _take(self, rows: float, counts: Mapping[str, float]) -> None:
        self.known = rows, counts
        self.tally = Tally(estimate=rows, declared=counts)
        self.tally.rows = int(rows)


def _declared(counts: Counts, batches: Sequence[Any]) -> dict[str, float]:
    """Evaluate ``counts`` over a window's batches and add up, by term."""
    found = [counts(batch) for batch in batches] if callable(counts) else [counts]
    total: dict[str, float] = {}
    for each in found:
        if not isinstance(each, Mapping):
            raise MissingCountError(f"counts= must give a dict of term to count, not a {type(each).__name__}")
        for name, count in each.items():
            total[str(name)] = total.get(str(name), 0.0) + _number(count, str(name))
    return total


def _number(count: Count, name: str) -> float:
    return check_number(count.item() if isinstance(count, Tensor) else count, f"the count of {name!r}")
