"""What a window spends outside of forward, backward and the optimizer: all that the library adds to the loop.

::

    python -m benchmarks.phases                  ten models of the Transformers package; two minutes on two cores
    python -m benchmarks.phases --case gpt --microbatch-size 1

Both contenders take turns in one process, with a C library that keeps freed memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import autograd

import microbatch as mb
from benchmarks import contenders
from benchmarks.cases import CASES, THIRD_PARTY
from benchmarks.contenders import Subject, Window, make_subject
from benchmarks.machine import hardware, in_words, versions
from benchmarks.report import write
from microbatch.gradients import autograd_engine, fused_matmul

RESULTS = Path(__file__).parent / "results" / "phases"
MAKERS: dict[str, Callable[[Subject], Window]] = {"loop": contenders.loop, "microbatch": contenders.microbatch}
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Where the time of one contender's window goes.

    Attributes:
        case: A key of `CASES`.
        contender: A key of `MAKERS`.
        microbatch_size: Rows that went through at once.
        parameters: Number of parameter tensors of the model.
        forward: Seconds in the model and the loss, as `backward` and `optimizer` the median over the windows.
        backward: Seconds in the autograd engine.
        optimizer: Seconds in the optimizer's step.
        rest: Seconds in everything else.
        window: Seconds of the whole window.
    """

    case: str
    contender: str
    microbatch_size: int
    parameters: int
    forward: float
    backward: float
    optimizer: float
    rest: float
    window: float


class _Clock:
    """The seconds that were spent in each phase since `start`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time counts for a phase."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - started

        return run


def phases(case: str, microbatch_size: int, *, windows: int) -> list[Phases]:
    """Time both contenders' windows in turn, after three that warm up.

    Args:
        case: A key of `CASES`.
        microbatch_size: Rows that go through at once.
        windows: Windows of each contender.

    Returns:
        An entry for each contender.
    """
    subjects = {name: make_subject(case, microbatch_size, device="cpu") for name in MAKERS}
    made = {name: MAKERS[name](subject) for name, subject in subjects.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MAKERS}
    for turn in range(windows + 3):
        for name in list(made)[:: 1 if turn % 2 else -1]:
            clock = _Clock()
            with _watched(clock, subjects[name]):
                started = time.perf_counter()
                made[name](nullcontext())
                whole = time.perf_counter() - started
            if turn >= 3:
                found[name].append(clock.seconds | {"rest": whole - sum(clock.seconds.values()), "window": whole})
    return [
        Phases(
            case=case,
            contender=name,
            microbatch_size=microbatch_size,
            parameters=len(list(subjects[name].model.parameters())),
            forward=median(each["forward"] for each in taken),
            backward=median(each["backward"] for each in taken),
            optimizer=median(each["optimizer"] for each in taken),
            rest=median(each["rest"] for each in taken),
            window=median(each["window"] for each in taken),
        )
        for name, taken in found.items()
    ]


@contextmanager
def _watched(clock: _Clock, subject: Subject) -> Generator[None]:
    """Put the clock around the loss, the autograd engine and the optimizer."""
    optimizer: Any = subject.optimizer
    places: list[tuple[Any, str, str]] = [
        (contenders, "loss_sum", "forward"),
        (autograd, "_engine_run_backward", "backward"),
        (autograd_engine, "_engine_run_backward", "backward"),
        (fused_matmul, "_engine_run_backward", "backward"),
        (optimizer, "step", "optimizer"),
    ]
    with ExitStack() as stack:
        for place, name, phase in places:
            stack.enter_context(patch.object(place, name, clock.timed(phase, getattr(place, name))))
        yield


def table(found: Sequence[Phases]) -> str:
    """Write the phases as Markdown.

    Args:
        found: Of any cases.

    Returns:
        The page.
    """
    machine = in_words(hardware("cpu"), versions())
    lines = ["# Where a window's time goes", "", f"`python -m benchmarks.phases`, kept heap; {machine}.", ""]
    lines += ["Milliseconds of one window. The last column is the rest, as a share of the loop's whole window.", ""]
    heads = ("case", "weights", "microbatch", "contender", *PHASES, "rest", "window", "rest of loop")
    lines += [f"| {' | '.join(heads)} |"]
    lines += ["|---" * 10 + "|"]
    loops = {(each.case, each.microbatch_size): each.window for each in found if each.contender == "loop"}
    for each in found:
        times = (each.forward, each.backward, each.optimizer, each.rest, each.window)
        share = each.rest / loops[each.case, each.microbatch_size]
        cells = [each.case, each.parameters, each.microbatch_size, each.contender, *(f"{1e3 * t:.2f}" for t in times)]
        lines.append(f"| {' | '.join(map(str, cells))} | {share:.1%} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Those of the command line; `None` takes the process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.phases", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--case", choices=list(CASES), nargs="+", default=THIRD_PARTY)
    parser.add_argument("--microbatch-size", type=int, nargs="+", default=[4])
    parser.add_argument("--windows", type=int, default=21, help="of each contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write, without suffix")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    mb.keep_heap()
    pairs = [(case, size) for case in chosen.case for size in chosen.microbatch_size]
    found = [each for case, size in pairs for each in phases(case, size, windows=chosen.windows)]
    text = table(found)
    print(text)
    record: dict[str, Any] = {"hardware": hardware("cpu"), "versions": versions(), "phases": list(map(asdict, found))}
    write(record, text, chosen.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
