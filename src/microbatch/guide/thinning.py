"""A run of any length as a bounded number of points: what is kept of its lines for a picture."""

from __future__ import annotations

from collections import deque
from typing import Any

from microbatch.guide.metrics_lines import CURVES

MOST_BUCKETS = 512
"""Buckets of a curve; each keeps its lowest and its highest point."""

MOST_NOTABLE = 200
"""Steps that are listed one by one: retries, dropped windows, losses that are not finite, other cuts."""

_NOTABLE = ("id", "step", "loss", "microbatch_size", "retries", "applied", "before")

MOST_DETAILS, MOST_PASSES = 64, 4096
"""Steps of which memory and times are kept, and passes in all of them together."""

Point = tuple[int, int, float]
"""The number of a line, its step, and a value."""


class Curve:
    """Keep the lowest and the highest point of every bucket of steps.

    Where a step lies behind the last bucket, buckets become twice as wide and pairs of them are merged. So no extreme
    is ever lost, and the number of points is bounded.
    """

    def __init__(self) -> None:
        """Begin without points, in buckets of one step."""
        self._width = 1
        self._buckets: dict[int, tuple[Point, Point]] = {}

    def add(self, line: int, step: int, value: float) -> None:
        """Take in one point.

        Args:
            line: Its line's number.
            step: Of the run; at least 1.
            value: Finite.
        """
        index = (step - 1) // self._width
        while index >= MOST_BUCKETS:
            self._merge()
            index = (step - 1) // self._width
        known = self._buckets.get(index)
        if known is None:
            point = (line, step, value)
            self._buckets[index] = (point, point)
        elif value < known[0][2]:
            self._buckets[index] = ((line, step, value), known[1])
        elif value > known[1][2]:
            self._buckets[index] = (known[0], (line, step, value))

    def points(self) -> list[Point]:
        """Return every point that is kept, in no order; a bucket with one value has one."""
        return [point for pair in self._buckets.values() for point in dict.fromkeys(pair)]

    def _merge(self) -> None:
        self._width *= 2
        merged: dict[int, tuple[Point, Point]] = {}
        for index, pair in self._buckets.items():
            low, high = zip(pair, merged.get(index // 2, pair), strict=True)
            merged[index // 2] = (min(low, key=_value), max(high, key=_value))
        self._buckets = merged


class Details:
    """Keep the memory and the times of the newest step, and of steps evenly spread over those before it."""

    def __init__(self) -> None:
        """Begin without any."""
        self._kept: list[dict[str, Any]] = []
        self._newest: dict[str, dict[str, Any]] = {}
        self._every = 1
        self._seen = 0

    def add(self, line: dict[str, Any]) -> None:
        """Take in a line; one without memory and times changes nothing.

        Args:
            line: With its number and its step.
        """
        found = {name: line[name] for name in ("memory", "timeline") if name in line}
        if not found:
            return
        detail = {"id": line["id"], "step": line["step"], **found}
        self._newest |= dict.fromkeys(found, detail)
        if self._seen % self._every == 0:
            self._kept.append(detail)
            while len(self._kept) > MOST_DETAILS or sum(map(passes, self._kept[1:])) > MOST_PASSES:
                self._kept, self._every = self._kept[::2], self._every * 2
        self._seen += 1

    def lines(self) -> list[dict[str, Any]]:
        """Return what is kept, as lines."""
        return [*self._kept, *self._newest.values()]


class Thinned:
    """Keep what is drawn of a run, whatever its length.

    Attributes:
        totals: Retries, skipped windows, odd values and unreadable lines of the whole run, and its highest peak.
        newest: The last line; `None` before there is one.
    """

    def __init__(self) -> None:
        """Begin without a line."""
        self.totals = {"retries": 0, "skipped": 0, "odd": 0, "unreadable": 0, "first_unreadable": 0, "peak_bytes": 0}
        self.newest: dict[str, Any] | None = None
        self._curves = {name: Curve() for name in (*CURVES, "validation")}
        self._details = Details()
        self._notable: deque[dict[str, Any]] = deque(maxlen=MOST_NOTABLE)
        self._size: int | None = None

    def add(self, line: dict[str, Any]) -> None:
        """Take in the next line.

        Args:
            line: As `read_line` returns it, with its number as ``"id"``. Where the microbatch size is another one than
                before, the size before is added to it as ``"before"``.
        """
        number, step, totals = line["id"], line["step"], self.totals
        for name in CURVES:
            value = line.get(name)
            if value is not None:
                self._curves[name].add(number, step, value)
        if "validation" in line:
            self._curves["validation"].add(number, step, line["validation"]["loss"])
        self._details.add(line)
        size = line.get("microbatch_size")
        if size is not None:
            if self._size not in (None, size):
                line["before"] = self._size
            self._size = size
        retries, skipped, lost = line.get("retries", 0), "applied" in line, line.get("loss", 0) is None
        if retries or skipped or lost or "before" in line:
            self._notable.append({name: line[name] for name in _NOTABLE if name in line})
        totals["retries"] += retries
        totals["skipped"] += skipped
        totals["odd"] += line.get("odd", 0)
        totals["peak_bytes"] = max(totals["peak_bytes"], line.get("peak_bytes", 0))
        self.newest = line

    def add_unreadable(self, number: int) -> None:
        """Count a line that could not be read.

        Args:
            number: Of the line.
        """
        self.totals["first_unreadable"] = self.totals["first_unreadable"] or number
        self.totals["unreadable"] += 1

    def lines(self) -> list[dict[str, Any]]:
        """Return the kept points as lines with some of their values, in the order of their numbers."""
        found: dict[int, dict[str, Any]] = {}
        for name, curve in self._curves.items():
            for number, step, value in curve.points():
                short = float(f"{value:.6g}")
                line = found.setdefault(number, {"id": number, "step": step})
                line[name] = {"loss": short} if name == "validation" else short
        newest = [self.newest] if self.newest is not None else []
        for line in [*self._notable, *self._details.lines(), *newest]:
            found[line["id"]] = {**found.get(line["id"], {}), **line}
        return [found[number] for number in sorted(found)]


def passes(line: dict[str, Any]) -> int:
    """Count the passes whose times a line holds.

    Args:
        line: As `read_line` returns it.

    Returns:
        The number of forwards.
    """
    return len(line["timeline"]["forward"]) if "timeline" in line else 0


def _value(point: Point) -> float:
    return point[2]
