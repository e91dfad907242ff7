"""Choose how to encode a batch for a coupled loss: twice, or once with graphs kept or offloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from microbatch.step.part import OpenWindow, Part
from microbatch.step.record import Step
from microbatch.step.size.room import room_for

_SAFE = 0.97
"""Share of the available memory that kept graphs may fill by estimate, because microbatches differ a little."""


class CoupledWay(Part):
    """Choose how coupled batches are encoded.

    All ways give the same gradient. Keeping the graphs saves one forward for each microbatch. So ``"auto"`` keeps them
    once a window that encoded twice has shown that they fit. The estimate is the window's peak, plus the graph of one
    microbatch for each other microbatch.

    Args:
        asked: ``"auto"``, or a fixed way: ``"twice"``, ``"keep"`` or ``"spill"``.

    Example:
        >>> way = CoupledWay("auto")
        >>> way.keep(8), way.shows(rows=8, microbatches=4, graph_bytes=10, peak_bytes=50, room=100), way.keep(8)
        (False, None, True)
        >>> way.keep(64)  # not known for this many rows
        False
    """

    def __init__(self, asked: str) -> None:
        self._asked = asked
        self._fits: int = 0  # rows of the largest batch whose graphs fit
        self._limit: int | None = None  # rows of the smallest batch whose graphs did not
        self._batch: object = None

    def keep(self, rows: int, *, settled: bool = True) -> bool:
        """Return whether to keep the graphs of the next batch.

        Args:
            rows: Rows of the batch on this rank.
            settled: Whether the microbatch size is chosen. Until then, sizes are compared by encoding twice.

        Returns:
            Whether to keep them, on the device or offloaded.
        """
        if self._limit is not None and rows >= self._limit:
            return False
        return settled and rows <= self._fits if self._asked == "auto" else self._asked != "twice"

    def shows(
        self, *, rows: int, microbatches: int, graph_bytes: int | None, peak_bytes: int | None, room: int | None
    ) -> None:
        """Update the estimate from a window that encoded a batch twice.

        Args:
            rows: Rows of this rank's batch.
            microbatches: Number of microbatches of the batch.
            graph_bytes: Bytes of the largest graph of a microbatch; `None` if not measured.
            peak_bytes: Peak memory of the window, in bytes; `None` if not measured.
            room: Bytes that may be in use; `None` if there is no known limit.
        """
        if graph_bytes is not None and peak_bytes is not None and room is not None:
            more = graph_bytes * (microbatches - 1)
            self._fits = max(self._fits, rows) if peak_bytes + more <= _SAFE * room else min(self._fits, rows - 1)

    def too_much(self, rows: int) -> None:
        """Encode batches twice from now on that have as many rows as one whose graphs did not fit."""
        self._limit = rows if self._limit is None else min(self._limit, rows)

    def cut(self, window: OpenWindow, batch: object, cutting: Any) -> None:
        """Store the batch, whose memory counts if it is on the device."""
        self._batch = batch

    def done(self, window: OpenWindow, step: Step) -> None:
        """Update the estimate after a window that encoded its batch twice."""
        coupled, batch, self._batch = window.coupled, self._batch, None
        if self._asked == "auto" and coupled is not None and not coupled.keeps and coupled.graph_bytes is not None:
            self.shows(
                rows=coupled.own,
                microbatches=step.microbatches,
                graph_bytes=coupled.graph_bytes,
                peak_bytes=step.peak_bytes,
                room=room_for(window.options, batch),
            )

    def put_back(self, window: OpenWindow, error: BaseException) -> None:
        """Release the batch."""
        self._batch = None

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"asked": self._asked, "fits": self._fits, "limit": self._limit}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`, unless ``coupled`` has changed since."""
        if state.get("asked") == self._asked:
            self._fits, self._limit = state["fits"], state["limit"]
