"""What a check found: how far apart two gradients are, what that comes from, and what to do about it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

WRONG = frozenset({"gradient", "schedule", "memory"})
"""Harms that make a check fail; time alone does not."""
_SHOWN = 8

_LEAST_NAME = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One thing that keeps a gradient from being the large batch's, or a loop from being right.

    Attributes:
        kind: What it is, as one word to compare with: ``"batch_statistics"``, ``"counts"``, ``"coupling"``,
            ``"randomness"``, ``"state"``, ``"row_order"``, ``"lengths"``, ``"precision"``, ``"gradient_hooks"``,
            ``"divided"``, ``"one_row"``, ``"unexplained"``; of a loop also ``"not_divided"``, ``"wrong_divisor"``,
            ``"zeroed_inside"``, ``"clipped_inside"``, ``"stepped_inside"``, ``"never_stepped"``, ``"last_window"``,
            ``"rows_left_out"``, ``"gradients_left"``, ``"scheduler"``, ``"graph_kept"``, ``"host_reads"``,
            ``"reductions"``.
        words: What was seen, in a sentence without a full stop.
        where: Modules, attributes or terms of the loss that it comes from; empty where that is the whole.
        alone: Relative error that it makes by itself, with every other cause switched off; `None` where it does not
            change the gradient.
        without: Relative error that is left with this cause alone switched off; `None` where nothing switches it off.
        harm: ``"gradient"``, ``"schedule"``, ``"memory"`` or ``"time"``: what suffers.
        remedy: What to do.
    """

    kind: str
    words: str
    where: tuple[str, ...] = ()
    alone: float | None = None
    without: float | None = None
    harm: str = "gradient"
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterError:
    """Say how far one parameter's gradient is off.

    Attributes:
        name: The parameter.
        relative_error: Norm of the difference to the yardstick, over the yardstick's norm.
        rounding: The same of the full batch's own gradient, in the precision that is trained in.
    """

    name: str
    relative_error: float
    rounding: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Whether accumulating gives the large batch's gradient, and if not, why.

    Attributes:
        relative_error: Norm of the difference between the accumulated gradient and the yardstick, over the latter's.
        rounding: The same of the full batch's own gradient, in the precision that is trained in.
        limit: Most that ``relative_error`` may be for the two to be equal to rounding.
        equal: Whether it is not more.
        precision: What is trained in, such as ``"float32"``.
        yardstick: Precision of the full batch's gradient that both are held against.
        rows: Rows of the batch that was compared.
        microbatch_size: Rows of a microbatch; 0 where a loop called no module.
        microbatches: How many.
        causes: What keeps it from being equal, and what else is wrong, the largest first.
        parameters: Errors by parameter, the largest first.
        notes: What to know about how this was found, one sentence each.
    """

    relative_error: float
    rounding: float
    limit: float
    equal: bool
    precision: str
    yardstick: str
    rows: int
    microbatch_size: int
    microbatches: int
    causes: tuple[Cause, ...]
    parameters: tuple[ParameterError, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the gradient is the large batch's, and nothing else was found that makes training another one."""
        return self.equal and not any(cause.harm in WRONG for cause in self.causes)

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        own = f"the full batch's own rounding error is {self.rounding:.1e}"
        if self.equal:
            return f"equal to rounding: {self.relative_error:.1e}; {own}"
        if math.isinf(self.relative_error):
            return f"not the large batch's gradient: it is not finite; {own}"
        return f"not the large batch's gradient: {_percent(self.relative_error)} off; {own}"

    def table(self, *, width: int | None = None) -> str:
        """Lay out the causes, or, where there are none, the parameters with the largest errors.

        Args:
            width: Columns that there are; `None` for no limit. Long names are cut, and numbers never.

        Returns:
            Lines of text, the first of which names the columns.
        """
        return self.causes_table(width=width) if self.causes else self.parameters_table(width=width)

    def causes_table(self, *, width: int | None = None) -> str:
        """Lay out the causes.

        Args:
            width: Columns that there are; `None` for no limit. Long names are cut, and numbers never.

        Returns:
            Lines of text: what each is, where, the error that it makes alone, and the error that is left without it.
        """
        head = ["cause", "where", "alone", "without it"]
        rows = [[c.kind, _some(c.where), _number(c.alone), _number(c.without)] for c in self.causes]
        return _laid_out([head, *rows], width)

    def parameters_table(self, *, width: int | None = None) -> str:
        """Lay out the parameters with the largest errors.

        Args:
            width: Columns that there are; `None` for no limit. Long names are cut, and numbers never.

        Returns:
            Lines of text: each one's relative error, and the full batch's own.
        """
        shown = self.parameters[:_SHOWN]
        rows = [[each.name, _number(each.relative_error), _number(each.rounding)] for each in shown]
        more = len(self.parameters) - len(shown)
        return _laid_out(
            [["parameter", "error", "full batch's own"], *rows, *([[f"and {more} more"]] if more else [])], width
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON.

        Returns:
            Nested dicts and lists; an infinite error is `None`.
        """
        return json.loads(json.dumps({"ok": self.ok, "verdict": self.verdict, **_finite(asdict(self))}))

    def __str__(self) -> str:
        """Write the whole of it."""
        told = [self.verdict, self.table()]
        told += ["\n".join(f"{c.kind}: {c.words}. {c.remedy}" for c in self.causes), "\n".join(self.notes)]
        return "\n\n".join(part for part in told if part)


def _laid_out(rows: list[list[str]], width: int | None) -> str:
    rows = [row + [""] * (len(rows[0]) - len(row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = 2 if rows[0][1] == "where" else 1
    if width is not None:  # the end of a module's name tells more than its beginning
        room = max(_LEAST_NAME, width - sum(widths) - 2 * (len(widths) - 1) + widths[words - 1])
        widths[words - 1] = min(room, widths[words - 1])
        for row in rows:
            name = row[words - 1]
            row[words - 1] = name if len(name) <= room else "…" + name[1 - room :]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _number(error: float | None) -> str:
    return "-" if error is None else "not finite" if math.isinf(error) else f"{error:.1e}"


def _percent(error: float) -> str:
    return f"{error:.3g} times its norm" if error >= 1 else f"{error:.2g}" if error < 1e-3 else f"{error:.2%}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
