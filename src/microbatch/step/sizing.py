"""The microbatch size of now: what was asked for, halved when memory ends, doubled again after a while of calm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from microbatch.errors import ConfigError

PATIENCE = 20
"""Windows without trouble before the size grows again; twice as many each time that growing failed."""


@dataclass(slots=True)
class Sizing:
    """Hold the one number that every cut is made by.

    Attributes:
        asked: Rows that the user asked for, or ``"auto"``.
        halvings: How often it has been halved.
        calm: Windows that went well since the size last changed.
        patience: Windows that have to, before it grows.
        on_trial: Whether the size has grown and not yet lasted.
        chosen: With ``"auto"``, the rows that are being tried, or were chosen; `None` before the first window.
        width: With ``"auto"`` and ragged rows, the tokens of one of these rows: the longest of the first batch. The
            tokens of a microbatch are then as many for every batch, however long its rows are.

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
        """Whether a size has still to be found."""
        return self.asked == "auto" and self.chosen is None

    @property
    def most(self) -> int:
        """Rows that go through the model at once where nothing has been halved.

        Raises:
            ConfigError: Nobody has said yet.
        """
        most = self.chosen if self.asked == "auto" else self.asked
        if not isinstance(most, int):
            raise ConfigError('microbatch_size="auto" has no size before the first batch has been cut')
        return most

    @property
    def rows(self) -> int:
        """Rows that go through the model at once, now.

        Raises:
            ConfigError: Nobody has said yet.
        """
        return self.halved(self.most)

    def choose(self, rows: int) -> None:
        """Go on with a size that was found.

        Args:
            rows: It; at least 1.
        """
        self.chosen, self.halvings, self.calm, self.on_trial = rows, 0, 0, False

    @property
    def tokens(self) -> int | None:
        """Tokens that go through the model at once where nothing has been halved; `None` where rows are counted."""
        return None if self.width is None else self.most * self.width

    def halved(self, asked: int) -> int:
        """Halve what was asked for as often as memory ended.

        Args:
            asked: Rows, or tokens.

        Returns:
            At least 1.
        """
        return max(1, asked >> self.halvings)

    def shrink(self, asked: int, *, used: int) -> None:
        """Halve what did not fit.

        Args:
            asked: Rows, or tokens, that were allowed before any halving.
            used: Of these, what the largest microbatch had: less than allowed where the batch is small.
        """
        if self.on_trial:
            self.patience *= 2
        self.halvings += 1
        while self.halved(asked) > max(1, used // 2):
            self.halvings += 1
        self.calm, self.on_trial = 0, False

    def settle(self) -> None:
        """Count a window that went well; after enough of them, double the size."""
        if not self.halvings and not self.on_trial:
            return
        self.calm += 1
        if self.calm < self.patience:
            return
        if self.on_trial:
            self.patience = PATIENCE
        self.calm, self.on_trial = 0, self.halvings > 0
        self.halvings = max(0, self.halvings - 1)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain numbers."""
        return {
            "asked": self.asked,
            "halvings": self.halvings,
            "calm": self.calm,
            "patience": self.patience,
            "on_trial": self.on_trial,
            "chosen": self.chosen,
            "width": self.width,
        }

    def restored(self, state: Mapping[str, Any]) -> Sizing:
        """Go on where `state` was taken, unless another size has been asked for since.

        Args:
            state: What it returned.

        Returns:
            The size to go on with.
        """
        return Sizing(**state) if state["asked"] == self.asked else self
