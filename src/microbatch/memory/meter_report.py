"""The report of a memory meter, as text and as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from microbatch.memory.budget import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The storages alive at the peak that have one category, module and operator.

    Attributes:
        category: Their category, such as ``"activations"``.
        module: Path of the module that made them, or the name of a parameter or buffer; empty if unknown.
        operator: The operator that made them; empty if they are older than the meter.
        bytes: Total bytes.
        storages: Number of storages.
    """

    category: str
    module: str
    operator: str
    bytes: int
    storages: int

    @property
    def words(self) -> str:
        """A description of the part, such as ``"activations of aten.mm in layers.0"``."""
        made = f" of {self.operator.removesuffix('.default')}" if self.operator else ""
        place = f" in {self.module}" if self.module else ""
        return f"{self.category}{made}{place}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """The live bytes of now and of the peak; the last three attributes are empty without ``detail=True``.

    Attributes:
        peak_bytes: Peak of the live bytes.
        live_bytes: Bytes alive now.
        at_peak: Bytes of the peak by category.
        live: Bytes alive now by category.
        parts: Bytes of the peak by category, module and operator, largest first.
    """

    peak_bytes: int
    live_bytes: int
    at_peak: Mapping[str, int]
    live: Mapping[str, int]
    parts: Sequence[Part]

    def table(self, *, parts: int = 8) -> str:
        """Format the report as text.

        Args:
            parts: Number of the largest parts to list.

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
        """Return the report as plain numbers and strings, for JSON."""
        return asdict(self)

    def _line(self, size: int, words: str) -> str:
        return f"  {size / max(1, self.peak_bytes):4.0%}  {format_bytes(size):>9}  {words}"
