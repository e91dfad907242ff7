"""Encode twice, or keep the graphs: what a coupled batch costs either way is measured in windows that train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WAYS = ("twice", "keep", "spill")
_SAFE = 0.97
"""Of the room, what graphs that are kept may take by reckoning: no two microbatches are quite alike."""
_SAMPLES = 2
"""Windows of each way, of which the faster counts; the first one of a way warms up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Went:
    """How a coupled window went.

    Attributes:
        way: How it was encoded.
        rows: Rows of this rank's batch.
        microbatches: Microbatches that these were cut into.
        seconds: How long it took.
        graph_bytes: What the largest graph of a microbatch took; `None` where nobody counted.
        peak_bytes: Most bytes in use; `None` where nobody counted.
        room: Bytes that may be in use; `None` where nothing tells.
        passing: Whether something counted that most windows go without.
    """

    way: str
    rows: int
    microbatches: int
    seconds: float
    graph_bytes: int | None
    peak_bytes: int | None
    room: int | None
    passing: bool


@dataclass(slots=True)
class Ways:
    """Hold which way coupled batches are encoded, and what is known of the others.

    All give the same gradient. Keeping the graphs where they are is one forward less than encoding twice, and nothing
    more, so it is taken wherever they fit. Spilled they fit too, and whether the bytes or the forward take longer
    depends on the model and the machine, so both are timed.

    Attributes:
        asked: ``"auto"``, or the way that is always taken.
        shape: Rows and microbatches of the batch that the rest is about.
        chosen: The way that was chosen; `None` while that is not known.
        fits: Whether kept graphs fit; `None` while that is not known.
        seconds: What the windows of each way took; the first one of each warms up.
        limit: Rows of which the graphs could not be kept, whatever was asked for; `None` while that has not happened.

    Example:
        >>> ways = Ways("auto")
        >>> one = Went(
        ...     way="twice", rows=8, microbatches=4, seconds=1, graph_bytes=10, peak_bytes=50, room=100, passing=False
        ... )
        >>> ways.learn(one)
        >>> ways.next(8), ways.next(64)  # 50 + 3 * 10 bytes fit; of 64 rows nothing is known
        ('keep', 'twice')
    """

    asked: str
    shape: tuple[int, int] = (0, 0)
    chosen: str | None = None
    fits: bool | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    limit: int | None = None

    @property
    def settled(self) -> bool:
        """Whether there is nothing to learn: a way was asked for."""
        return self.asked != "auto"

    def next(self, rows: int) -> str:
        """Say how to encode the next batch.

        Args:
            rows: Rows of it, on this rank.

        Returns:
            One of `WAYS`.
        """
        if self.limit is not None and rows >= self.limit:
            return "twice"
        if self.settled:
            return self.asked
        if rows > self.shape[0]:
            return "twice"
        if self.chosen is not None:
            return self.chosen
        return "spill" if self.fits is False and len(self.seconds.get("twice", [])) > _SAMPLES else "twice"

    def learn(self, went: Went) -> None:
        """Learn from a window that went well.

        Args:
            went: How.
        """
        shape = went.rows, went.microbatches
        if went.rows > self.shape[0] or (went.rows == self.shape[0] and shape != self.shape):
            self.shape, self.chosen, self.fits, self.seconds = shape, None, None, {}
        if self.settled or self.chosen is not None or shape != self.shape:
            return
        if self.fits is None and went.graph_bytes is not None and went.peak_bytes is not None and went.room is not None:
            more = went.graph_bytes * (went.microbatches - 1)
            self.fits = went.peak_bytes + more <= _SAFE * went.room
        if self.fits:
            self.chosen = "keep"
        elif self.fits is False and not went.passing:
            self.seconds.setdefault(went.way, []).append(went.seconds)
            if len(self.seconds.get("spill", [])) > _SAMPLES:
                self.chosen = min(self.seconds, key=lambda way: min(self.seconds[way][1:]))

    def too_much(self, rows: int) -> None:
        """Learn that graphs could not be kept.

        Args:
            rows: Of how many rows.
        """
        self.limit = rows if self.limit is None else min(self.limit, rows)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on alike, as plain numbers and words."""
        known = {"shape": list(self.shape), "chosen": self.chosen, "fits": self.fits, "limit": self.limit}
        return {"asked": self.asked, **known}

    def restored(self, state: Mapping[str, Any] | None) -> Ways:
        """Go on where `state` was taken, unless another way has been asked for since.

        Args:
            state: What it returned; `None` from before there were any ways.

        Returns:
            The record to go on with.
        """
        if state is None or state["asked"] != self.asked:
            return self
        rows, microbatches = state["shape"]
        return Ways(self.asked, (rows, microbatches), state["chosen"], state["fits"], limit=state["limit"])
