"""The current microbatch size: halved when memory runs out, doubled again after enough windows without trouble."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from microbatch.errors import ConfigError

PATIENCE = 20
"""Windows without trouble before the size grows again; doubled each time that the larger size failed."""


@dataclass(slots=True)
class Sizing:
    """Hold the microbatch size by which every batch is cut.

    Attributes:
        asked: Rows that the user asked for, or ``"auto"``.
        halvings: How often the size has been halved.
        calm: Windows without trouble since the size last changed.
        patience: Windows without trouble before the size grows.
        on_trial: Whether the size has grown and has not lasted for ``patience`` windows yet.
        chosen: With ``"auto"``, the rows that are being tried or were chosen; `None` before the first window.
        width: With ``"auto"`` and ``lengths``, tokens of the longest row of the first batch. A microbatch then has the
            same number of tokens in every batch, however long the rows are.

    Example:
        >>> sizing = Sizing(asked=10)
        >>> sizing.shrink(10, used=10)
        >>> sizing.rows
        5
        >>> for _ in range(PATIENCE):
        ...     sizing.settle()
        >>> sizing.rows
        10

    Source:
        Laws M1, M6: whatever the size, the effective batch and its gradient are the same.
    """

    asked: int | str
    halvings: int = 0
    calm: int = 0
    patience: int = PATIENCE
    on_trial: bool = False
    chosen: int | None = None
    width: int | None = None

    @property
    def open(self) -> bool:
        """Whether no size has been tried or chosen yet."""
        return self.asked == "auto" and self.chosen is None

    @property
    def most(self) -> int:
        """Rows that go through the model at once, before any halving."""
        most = self.chosen if self.asked == "auto" else self.asked
        if not isinstance(most, int):
            raise ConfigError('microbatch_size="auto" has no size before the first batch has been cut')
        return most

    @property
    def rows(self) -> int:
        """Rows that go through the model at once now."""
        return self.halved(self.most)

    def choose(self, rows: int) -> None:
        """Set a size to try or to keep."""
        self.chosen, self.halvings, self.calm, self.on_trial = rows, 0, 0, False

    @property
    def tokens(self) -> int | None:
        """Tokens that go through the model at once, before any halving; `None` if batches are cut by rows."""
        return None if self.width is None else self.most * self.width

    def halved(self, asked: int) -> int:
        """Halve a size ``halvings`` times."""
        return max(1, asked >> self.halvings)

    def shrink(self, asked: int, *, used: int) -> None:
        """Halve the size until it is at most half of a microbatch that did not fit.

        Args:
            asked: Rows or tokens of a full microbatch, before any halving.
            used: Rows or tokens of the largest microbatch; fewer than ``asked`` if the batch is small.
        """
        if self.on_trial:
            self.patience *= 2
        self.halvings += 1
        while self.halved(asked) > max(1, used // 2):
            self.halvings += 1
        self.calm, self.on_trial = 0, False

    def settle(self) -> None:
        """Count a window without trouble; after enough of them, double the size."""
        if not self.halvings and not self.on_trial:
            return
        self.calm += 1
        if self.calm < self.patience:
            return
        if self.on_trial:
            self.patience = PATIENCE
        self.calm, self.on_trial = 0, self.halvings > 0
        self.halvings = max(0, self.halvings - 1)

    def copy(self) -> Sizing:
        """Return a copy; made in every step, so without the detours of `dataclasses.replace`."""
        return Sizing(
            self.asked, self.halvings, self.calm, self.patience, self.on_trial, chosen=self.chosen, width=self.width
        )

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as plain numbers."""
        return asdict(self)

    def restored(self, state: Mapping[str, Any]) -> Sizing:
        """Return the size of a saved state, or this one if the user's size has changed since."""
        return Sizing(**state) if state["asked"] == self.asked else self
