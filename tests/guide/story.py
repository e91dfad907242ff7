"""A viewer of runs, as the page is one: events in, what is known of each run out."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

TOTALS = {"retries": 0, "skipped": 0, "odd": 0, "unreadable": 0, "first_unreadable": 0, "peak_bytes": 0}


def strictly(text: str) -> Any:
    """Parse JSON as a browser does: no NaN, no infinity."""

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse, parse_float=_finite)


def _finite(text: str) -> float:
    value = float(text)
    assert math.isfinite(value), f"{text} is no finite number"
    return value


class Story:
    """What a viewer knows of one run.

    Attributes:
        lines: Of metrics, in their order.
        resets: How often the picture began anew.
        totals: Of the whole run.
        standing: Summary, silence and trouble.
    """

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.resets = 0
        self.totals: Mapping[str, Any] = {}
        self.standing: dict[str, Any] = {}

    def take(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            kind = event.get("kind")
            if kind == "reset":
                self.lines, self.totals, self.standing, self.resets = [], {}, {}, self.resets + 1
            elif kind == "totals":
                self.totals = {name: value for name, value in event.items() if name not in ("kind", "id")}
            elif kind is not None:
                self.standing[kind] = event[kind]
            else:
                assert not self.lines or event["id"] > self.lines[-1]["id"], "a line came twice"
                self.lines.append(event)

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines]

    @property
    def whole(self) -> bool:
        return self.totals.get("percent") == 100

    async def until(self, source: AsyncIterator[list[dict[str, Any]]], true: Callable[["Story"], bool]) -> "Story":
        """Listen until something is so."""
        async with asyncio.timeout(60):
            while not true(self):
                self.take(await anext(source))
        return self
