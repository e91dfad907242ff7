"""What `microbatch` is to reach, and whether it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cases import CASES
from benchmarks.measure import Entry
from benchmarks.summary import summarize_ratio

# Scalars for the loss and the counts, the random state, copies of small buffers.
MOST_MEMORY, SCALARS = 1.005, 64 * 1024
PEERS = ("accelerate", "fabric", "trainer")
UPDATE_TOLERANCE = 10  # times that of gradients, because Adam divides by them


@dataclass(frozen=True, slots=True)
class Goal:
    """The most that `microbatch` may need of what another contender does.

    Attributes:
        case: A key of `CASES`.
        sizes: Microbatch sizes that it is for; empty for all others of the case.
        what: ``"time"`` or ``"memory"``.
        against: The other contender.
        most: Its share.
    """

    case: str
    sizes: tuple[int, ...]
    what: str
    against: str
    most: float


GOALS = (
    Goal("gpt", (1,), "time", "loop", 0.60),
    Goal("gpt", (1,), "time", "full", 0.80),
    Goal("gpt", (1,), "memory", "full", 1 / 3),
    Goal("gpt", (4,), "time", "loop", 0.75),
    Goal("gpt", (4,), "time", "full", 0.80),
    Goal("gpt", (4,), "memory", "full", 1 / 2),
    Goal("gpt-bf16", (1, 4), "time", "loop", 0.70),
    Goal("gpt-bf16", (1, 4), "time", "full", 0.90),
    Goal("ragged", (8,), "time", "loop", 0.25),
    Goal("ragged", (8,), "memory", "loop", 0.50),
    Goal("ragged", (8,), "time", "trimmed", 0.45),
    Goal("ragged", (8,), "time", "full", 0.30),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a goal is reached.

    Attributes:
        case: A key of `CASES`.
        microbatch_size: Rows that went through at once.
        goal: In words.
        measured: In words.
        verdict: ``"met"``, ``"missed"``, or ``"undecided"`` where another job was running.
    """

    case: str
    microbatch_size: int
    goal: str
    measured: str
    verdict: str


def agrees(entry: Entry) -> bool:
    """Tell whether a contender did the hand-written loop's arithmetic, to rounding."""
    tolerance = CASES[entry.case].tolerance
    return entry.gradient_error <= tolerance and entry.update_error <= UPDATE_TOLERANCE * tolerance


def verdicts(entries: Sequence[Entry]) -> list[Verdict]:
    """Hold every entry of `microbatch` against the others of the same row.

    Args:
        entries: What was measured.

    Returns:
        Verdicts, by row.
    """
    return [
        verdict
        for entry in entries
        if entry.contender == "microbatch"
        for verdict in _of_row(entry, {each.contender: each for each in entries if _row(each) == _row(entry)})
    ]


def _row(entry: Entry) -> tuple[str, int]:
    return entry.case, entry.microbatch_size


def _of_row(mine: Entry, others: dict[str, Entry]) -> list[Verdict]:
    found = [
        verdict
        for goal in _goals(mine, others)
        if (verdict := _hold(goal, mine, others[goal.against])) is not None
    ]  # fmt: skip
    return [*found, _verdict(mine, "the loop's gradient", f"{mine.gradient_error:.0e} off", good=agrees(mine))]


def _goals(mine: Entry, others: dict[str, Entry]) -> list[Goal]:
    case, size = _row(mine)
    mine_alone = [goal for goal in GOALS if goal.case == case and size in goal.sizes and goal.against in others]
    settled = {(goal.what, goal.against) for goal in mine_alone}
    most_time = 1.02 if mine.time.median >= 0.1 else 1.5  # of a window that takes no time, only overhead is left
    usual = [Goal(case, (), "time", "loop", most_time), Goal(case, (), "memory", "loop", MOST_MEMORY)]
    peers = [Goal(case, (), "time", name, 1.0) for name in PEERS if name in others]
    return mine_alone + [goal for goal in usual if (goal.what, goal.against) not in settled] + peers


def _hold(goal: Goal, mine: Entry, other: Entry) -> Verdict | None:
    words = f"{goal.what} at most {goal.most:.2f} of {goal.against}'s"
    if goal.what == "time":
        ratio = summarize_ratio(mine.seconds, other.seconds).median
        noisy = mine.noisy or other.noisy
        return _verdict(mine, words, f"{ratio:.3f}", good=None if noisy else ratio <= goal.most)
    if mine.peak_bytes is None or other.peak_bytes is None:
        return None
    share = mine.peak_bytes / other.peak_bytes
    return _verdict(mine, words, f"{share:.3f}", good=mine.peak_bytes <= goal.most * other.peak_bytes + SCALARS)


def _verdict(entry: Entry, goal: str, measured: str, *, good: bool | None) -> Verdict:
    case, size = _row(entry)
    verdict = "undecided" if good is None else "met" if good else "missed"
    return Verdict(case=case, microbatch_size=size, goal=goal, measured=measured, verdict=verdict)
