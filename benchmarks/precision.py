"""What the precisions in which gradients add up lose, hold and cost."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import hardware, in_words, versions
from benchmarks.report import write
from benchmarks.summary import order_of_round, summarize
from microbatch.gradients.bfloat16_sums import Compensated

OUT = Path(__file__).parent / "results" / "precision"
MICROBATCHES = (8, 64, 512, 1024)
HALF = torch.bfloat16
BYTES = {"bf16": 2, "bf16 compensated": 3, "fp32": 4, "fp64": 8}


class Plain:
    """A sum as torch adds up, in any dtype."""

    def __init__(self, first: Tensor, dtype: torch.dtype) -> None:
        self.total = first.to(dtype)

    def add_(self, part: Tensor, *, rows: slice = slice(None)) -> None:
        """Add one gradient."""
        self.total[rows].add_(part)

    def scale_(self, factor: float) -> None:
        """Multiply in place."""
        self.total.mul_(factor)


WAYS: dict[str, Callable[[Tensor], Plain | Compensated]] = {
    "bf16": lambda first: Plain(first, HALF),
    "bf16 compensated": lambda first: Compensated(first.clone()),
    "fp32": lambda first: Plain(first, torch.float32),
    "fp64": lambda first: Plain(first, torch.float64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One way's numbers.

    Attributes:
        way: A key of `WAYS`.
        sum_error: Relative error of the sum itself, by the number of microbatches, against fp64.
        error: The same of what a bf16 parameter's optimizer is given: the sum, rounded to bf16.
        bytes: Bytes an element.
        nanoseconds: Of adding one element, median over the rounds.
        spread: Interquartile range over that.
    """

    way: str
    sum_error: dict[int, float]
    error: dict[int, float]
    bytes: int
    nanoseconds: float
    spread: float


def gradients(microbatches: int, *, width: int, mean: float, device: str) -> Iterator[Tensor]:
    """Draw the bf16 gradients of a window, normal, around a mean.

    Args:
        microbatches: How many.
        width: Elements of each.
        mean: In units of the standard deviation.
        device: Where.

    Yields:
        One at a time; the same for every way.
    """
    generator = torch.Generator(device).manual_seed(microbatches)
    for _ in range(microbatches):
        yield (torch.randn(width, generator=generator, device=device) + mean).to(HALF)


def errors(way: str, microbatches: int, *, width: int, mean: float, device: str) -> tuple[float, float]:
    """Add up a window's gradients, and compare.

    Args:
        way: A key of `WAYS`.
        microbatches: How many.
        width: Elements of each.
        mean: As for `gradients`.
        device: Where.

    Returns:
        The relative errors of the sum and of the sum in bf16.
    """
    exact = torch.zeros(width, dtype=torch.float64, device=device)
    total: Plain | Compensated | None = None
    for each in gradients(microbatches, width=width, mean=mean, device=device):
        exact += each.double()
        if total is None:
            total = WAYS[way](each)
        else:
            total.add_(each)
    assert total is not None  # noqa: S101 - there is at least one microbatch
    off = [(total.total.to(dtype).double() - exact).norm() / exact.norm() for dtype in (total.total.dtype, HALF)]
    return off[0].item(), off[1].item()


def seconds(total: Plain | Compensated, part: Tensor) -> float:
    """Time one addition."""
    if part.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    total.add_(part)
    if part.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(*, repeats: int, width: int, elements: int, mean: float, device: str) -> list[Entry]:
    """Measure every way.

    Args:
        repeats: Rounds of the timing; at least 1.
        width: Elements of the sums whose error is measured.
        elements: Elements of the sums that are timed.
        mean: As for `gradients`.
        device: Where.

    Returns:
        One entry for each of `WAYS`.
    """
    part = torch.randn(elements, device=device).to(HALF)
    sums = {way: make(part) for way, make in WAYS.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for index in range(repeats + 1):
        for way in order_of_round(list(WAYS), index):
            times[way].append(seconds(sums[way], part))
    entries: list[Entry] = []
    for way in WAYS:
        found = {n: errors(way, n, width=width, mean=mean, device=device) for n in MICROBATCHES}
        took = summarize([each / elements * 1e9 for each in times[way][1:]])
        entries.append(
            Entry(
                way=way,
                sum_error={n: each[0] for n, each in found.items()},
                error={n: each[1] for n, each in found.items()},
                bytes=BYTES[way],
                nanoseconds=took.median,
                spread=took.spread,
            )
        )
    return entries


def as_markdown(record: dict[str, Any]) -> str:
    """Return the table.

    Args:
        record: What is written as JSON.

    Returns:
        Markdown.
    """
    machine = in_words(record["hardware"])
    lines = [
        "# Precisions in which gradients add up, measured",
        "",
        f"{record['date']}; {machine}; {record['threads']} threads.",
        "; ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
        "",
        f"bf16 gradients, normal around {record['mean']:g} standard deviations; relative error against fp64 of what a",
        "bf16 parameter's optimizer is given, and in brackets of the sum before it is rounded to bf16 (of compensated",
        "sums, without the 8 bits beside them). Bytes are those of the sum; where it is wider than bf16, `.grad` takes",
        "2 more, one parameter at a time, when it is handed over.",
        "",
        "| sum | " + " | ".join(f"{n:,} microbatches" for n in MICROBATCHES) + " | bytes | ns an element |",
        "|" + "---|" * (len(MICROBATCHES) + 3),
    ]
    for each in record["entries"]:
        cells = [f"{error:.1e} ({each['sum_error'][n]:.1e})" for n, error in each["error"].items()]
        lines.append(
            f"| {each['way']} | {' | '.join(cells)} | {each['bytes']} | {each['nanoseconds']:.2f} ± "
            f"{each['spread'] / 2:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="rounds of the timing")
    parser.add_argument("--width", type=int, default=1 << 14, help="elements of the sums whose error is measured")
    parser.add_argument("--elements", type=int, default=1 << 22, help="elements of the sums that are timed")
    parser.add_argument("--mean", type=float, default=1.0, help="of the gradients, in standard deviations")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch's operators")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write, without suffix")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(flags.threads)
    entries = measure(
        repeats=flags.repeats, width=flags.width, elements=flags.elements, mean=flags.mean, device=flags.device
    )
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(flags.device),
        "versions": versions(),
        "threads": flags.threads,
        "mean": flags.mean,
        "entries": [asdict(each) for each in entries],
    }
    markdown = as_markdown(record)
    print(markdown)
    write(record, markdown, flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
