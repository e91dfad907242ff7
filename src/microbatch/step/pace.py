"""Notice that steps have become markedly faster or slower since their microbatch size was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from microbatch.step.sizing import Sizing
from microbatch.step.tune import Tuning

_WINDOWS = 20
"""Windows whose median is compared; one that was disturbed does not move it."""
_MARKED = 1.5
"""Times as slow, or as fast, as after the choice, from where on another size may be the fastest."""
_LOOKS = 3
"""Times that a run looks again at most."""


@dataclass(slots=True)
class Pace:
    """Hold how fast windows were after the choice, and how fast they are.

    Attributes:
        tuning: What was known when the size was chosen.
        usual: Median seconds of a row after the choice; `None` until enough windows have been.
        recent: Seconds of a row in the windows since.
        looks: Times that may still be looked again.

    Example:
        >>> pace = Pace(Tuning([1, 2], Sizing(asked="auto", chosen=2)))
        >>> [pace.changed(seconds) for seconds in [1.0] * 20 + [1.4] * 20 + [2.0] * 10].count(True)
        1
    """

    tuning: Tuning
    usual: float | None = None
    recent: list[float] = field(default_factory=list[float])
    looks: int = _LOOKS

    def changed(self, seconds: float) -> bool:
        """Note a window, and tell whether it is time to look again.

        Args:
            seconds: What a row of it took.

        Returns:
            Whether the last 20 windows' median is 1.5 times the usual, or less than it over 1.5.
        """
        if not self.looks:
            return False
        self.recent = [*self.recent, seconds][-_WINDOWS:]
        if len(self.recent) < _WINDOWS:
            return False
        now = median(self.recent)
        if self.usual is None:
            self.usual, self.recent = now, []
            return False
        return max(now / self.usual, self.usual / now) >= _MARKED

    def look(self, sizing: Sizing) -> Tuning:
        """Begin to look again, at the size of now and at its neighbours alone.

        Args:
            sizing: What every cut is made by.

        Returns:
            The tuning; where it cannot decide, the size stays.
        """
        self.looks -= 1
        self.usual, self.recent = None, []
        return self.tuning.around(sizing)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain numbers."""
        return {"tuning": self.tuning.state(), "usual": self.usual, "recent": list(self.recent), "looks": self.looks}

    @classmethod
    def restored(cls, state: Mapping[str, Any], tuning: Tuning) -> Pace:
        """Go on where `state` was taken.

        Args:
            state: What it returned.
            tuning: Restored from its part of that.

        Returns:
            The record.
        """
        return cls(tuning, state["usual"], list(state["recent"]), state["looks"])
