"""What a meter found, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from microbatch.memory.budget import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Storages that were alive at the peak and came from one place.

    Attributes:
        category: What they are, such as ``"activations"``.
        module: Path of the module that made them, or the name of a parameter or buffer; empty where neither is known.
        operator: The operator that made them; empty for what was there before the meter was on.
        bytes: All of them together.
        storages: How many.
    """

    category: str
    module: str
    operator: str
    bytes: int
    storages: int

    @property
    def words(self) -> str:
        """The part as one calls it."""
        made = f" of {self.operator.removesuffix('.default')}" if self.operator else ""
        place = f" in {self.module}" if self.module else ""
        return f"{self.category}{made}{place}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """What was alive, now and at the peak.

    Attributes:
        peak_bytes: Most bytes alive at once.
        live_bytes: Bytes alive now.
        at_peak: Of the peak, bytes by category; empty without ``detail=True``, and so are the next two.
        live: Of what is alive now, likewise.
        parts: What was alive at the peak by place and operator, largest first.
    """

    peak_bytes: int
    live_bytes: int
    at_peak: Mapping[str, int]
    live: Mapping[str, int]
    parts: Sequence[Part]

    def table(self, *, parts: int = 8) -> str:
        """Write the report for people.

        Args:
            parts: How many of the largest parts to list.

        Returns:
            Lines of text.
        """
        lines = [f"peak {format_bytes(self.peak_bytes)}, now {format_bytes(self.live_bytes)}"]
        if self.at_peak:
            lines += ["", "at the peak"]
            lines += [self._line(size, category) for category, size in self.at_peak.items()]
            lines += ["", "the largest of it"]
            lines += [self._line(part.bytes, part.words) for part in self.parts[:parts]]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain numbers and texts, for JSON."""
        return asdict(self)

    def _line(self, size: int, words: str) -> str:
        return f"  {size / max(1, self.peak_bytes):4.0%}  {format_bytes(size):>9}  {words}"
