"""Many cases in one start of processes, which is what tests of ranks take longest for."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Case: TypeAlias = Callable[[int, int], Any]


def cases_in(names: Mapping[str, Any]) -> dict[str, Case]:
    """Return the functions of a test file that are called ``case_...``, by the rest of their name."""
    return {name.removeprefix("case_"): value for name, value in names.items() if name.startswith("case_")}


def run_cases(cases: Mapping[str, Case], rank: int, ranks: int) -> dict[str, Any]:
    """Run every case; what one raises is told instead of its result, so that the others still run."""
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            found[name] = case(rank, ranks)
        except Exception:  # noqa: BLE001 - told to the test, which fails with it
            found[name] = "failed: " + traceback.format_exc()
    return found


def result(told: Sequence[Mapping[str, Any]], case: str) -> list[Any]:
    """Return what a case gave on every rank; it gives no text, unless it failed."""
    assert [rank[case] for rank in told if isinstance(rank[case], str)] == []
    return [rank[case] for rank in told]
