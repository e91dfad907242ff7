"""What dropout by row costs: one call of it, and a window of a small transformer, beside torch's own."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb
from benchmarks.machine import hardware, in_words, versions
from benchmarks.report import write
from benchmarks.summary import order_of_round, summarize, summarize_ratio
from microbatch.batch.dropout_mode import ByRow, Shown

OUT = Path(__file__).parent / "results" / "dropout"
SHAPES = ((1, 128, 384), (4, 128, 384), (16, 128, 384), (4, 6, 128, 128), (64, 256))
WAYS = ("none", "torch", "by row")
ROWS, SIZES, COLUMNS, WIDTH = 16, (1, 4, 16), 128, 384


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One way's time.

    Attributes:
        case: A shape, or a window's microbatch size.
        way: One of `WAYS`.
        milliseconds: Median over the rounds.
        spread: Interquartile range over that.
        against_torch: Median of the ratios to torch's own dropout in the same round.
    """

    case: str
    way: str
    milliseconds: float
    spread: float
    against_torch: float


def drop(x: Tensor, way: str) -> Tensor:
    """Call dropout once, forward and backward."""
    mode = ByRow(0)
    mode.show(Shown(torch.arange(len(x))))
    if way == "by row":
        with mode:
            out = F.dropout(x, 0.1)
    else:
        out = F.dropout(x, 0.1, training=way == "torch")
    out.backward(out.detach())
    return out


def model_of() -> nn.Module:
    """Make four layers of a transformer that drop out in three places each, attention among them."""
    layers = [nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, dropout=0.1, batch_first=True) for _ in range(4)]
    return nn.Sequential(*layers)


def windows(size: int) -> dict[str, mb.Accumulator]:
    """Make an accumulator for each way, all from the same weights."""
    found: dict[str, mb.Accumulator] = {}
    for way in WAYS:
        torch.manual_seed(0)
        model = model_of()
        if way == "none":
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                elif isinstance(module, nn.MultiheadAttention):
                    module.dropout = 0.0
        found[way] = mb.Accumulator(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-4),
            microbatch_size=size,
            memory_budget="none",
            dropout="by_row" if way == "by row" else None,
        )
    return found


def rounds(case: str, runs: dict[str, Any], *, repeats: int) -> list[Entry]:
    """Time all ways in turn.

    Args:
        case: What they run.
        runs: A function of no arguments for each of `WAYS`.
        repeats: Rounds; at least 1.

    Returns:
        One entry for each.
    """
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for index in range(repeats + 1):
        for way in order_of_round(list(runs), index):
            started = time.perf_counter()
            runs[way]()
            seconds[way].append(time.perf_counter() - started)
    found: list[Entry] = []
    for way, each in seconds.items():
        took = summarize([1000 * second for second in each[1:]])
        ratio = summarize_ratio(each[1:], seconds["torch"][1:]).median
        found.append(Entry(case=case, way=way, milliseconds=took.median, spread=took.spread, against_torch=ratio))
    return found


def measure(*, repeats: int) -> list[Entry]:
    """Measure every shape, and every window."""
    found: list[Entry] = []
    for shape in SHAPES:
        x = torch.randn(shape, requires_grad=True)
        found += rounds(f"one call, {shape}", {way: partial(drop, x, way) for way in WAYS}, repeats=3 * repeats)
    batch = torch.randn(ROWS, COLUMNS, WIDTH)
    for size in SIZES:
        accumulators = windows(size)
        runs = {
            way: lambda each=each: each.step(batch, lambda model, x: model(x).square().mean())
            for way, each in accumulators.items()
        }
        found += rounds(f"window of {ROWS} rows, {size} at once", runs, repeats=repeats)
    return found


def as_markdown(record: dict[str, Any]) -> str:
    """Return the table.

    Args:
        record: What is written as JSON.

    Returns:
        Markdown.
    """
    machine = in_words(record["hardware"])
    lines = [
        "# Dropout by row, measured",
        "",
        f"{record['date']}; {machine}; {record['threads']} threads.",
        "; ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
        "",
        "Forward and backward. A window is of four transformer layers, width 384, 128 tokens a row, dropout 0.1 in",
        "three places of each and in attention, which takes the mathematical path on the CPU wherever it drops out.",
        "",
        "| case | dropout | time | against torch's |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {each['case']} | {each['way']} | {each['milliseconds']:.3g} ms ± {each['spread'] / 2:.1%} | "
        f"{each['against_torch']:.3f} |"
        for each in record["entries"]
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dropout", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch's operators")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write, without suffix")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(flags.threads)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "threads": flags.threads,
        "entries": [asdict(each) for each in measure(repeats=flags.repeats)],
    }
    markdown = as_markdown(record)
    print(markdown)
    write(record, markdown, flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
