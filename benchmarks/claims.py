"""What is often said about gradient accumulation and its memory, held against what is measured here.

::

    python -m benchmarks.claims                        ten minutes on two cores
    python -m benchmarks.claims --case vit --out /tmp/claims
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from benchmarks.cases import CASES, LEARNING_RATE, loss_sum
from benchmarks.machine import hardware, versions

RESULTS = Path(__file__).parent / "results" / "claims"
DEFAULT_CASES = ("gpt", "vit", "residual")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One microbatch size of one model.

    Attributes:
        case: A key of `CASES`.
        batch_size: Rows of the effective batch.
        microbatch_size: Rows that went through at once; the batch's, for no accumulation.
        checkpointed: Whether every block was computed again in backward.
        peak_bytes: Most bytes alive at once in a step, weights, gradients, optimizer state and batch included.
        activations_bytes: Of these, what forward had made.
        seconds: Of each step.
    """

    case: str
    batch_size: int
    microbatch_size: int
    checkpointed: bool
    peak_bytes: int
    activations_bytes: int
    seconds: list[float]

    @property
    def time(self) -> float:
        """The fastest step, in seconds: the others were slower for reasons of their own."""
        return min(self.seconds)


class Again(nn.Module):
    """A block whose activations are computed again in backward.

    Args:
        block: The block.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Return what the block returns."""
        return cast("Tensor", checkpoint(self.block, x, use_reentrant=False))


def measure(case_name: str, microbatch_size: int, *, checkpointed: bool, repeats: int) -> Row:
    """Take a few steps on a case's batch.

    Args:
        case_name: A key of `CASES`.
        microbatch_size: Rows that go through at once.
        checkpointed: Whether to compute every block again.
        repeats: Steps that are timed.
    """
    case = CASES[case_name]
    torch.manual_seed(0)
    model, batch = case.model(), case.batch()
    if checkpointed:
        blocks: Any = model.get_submodule("blocks")
        for name, block in list(blocks.named_children()):
            setattr(blocks, name, Again(block))
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=microbatch_size, memory_budget="none")
    count = batch["labels"].numel() / case.batch_size

    def loss_fn(model: nn.Module, piece: dict[str, Tensor]) -> mb.Loss:
        return mb.Loss(sum=loss_sum(model, piece), count=len(piece["labels"]) * count)

    accumulator.step(batch, loss_fn)  # makes the optimizer's state
    seconds: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        accumulator.step(batch, loss_fn)
        seconds.append(time.perf_counter() - started)
    with mb.MemoryMeter(detail=True) as meter:
        meter.track(model, optimizer, batch)
        accumulator.step(batch, loss_fn)
    return Row(
        case=case_name,
        batch_size=case.batch_size,
        microbatch_size=microbatch_size,
        checkpointed=checkpointed,
        peak_bytes=meter.peak_bytes,
        activations_bytes=meter.report().at_peak.get("activations", 0),
        seconds=seconds,
    )


def verdicts(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """Yield each claim, a case, and what was measured."""
    for case in dict.fromkeys(row.case for row in rows):
        found = {(row.microbatch_size, row.checkpointed): row for row in rows if row.case == case}
        whole = max(size for size, _ in found)
        full, one = found[whole, False], found[1, False]
        sizes = [size for size, again in sorted(found) if not again]
        small = [size for size in sizes if size <= whole // 4]
        shares = [found[size, False].peak_bytes / full.peak_bytes for size in small]
        less = f"{1 / max(shares):.1f} to {1 / min(shares):.1f} times less, microbatches of {small[-1]} to 1"
        yield "accumulation takes 4 to 16 times less memory", case, less
        saved = f"{1 - max(shares):.0%} to {1 - min(shares):.0%}"
        yield "accumulation saves 75 to 90 % of memory", case, saved
        yield (
            "activations shrink with the microbatch",
            case,
            f"{full.activations_bytes / one.activations_bytes:.1f} times less for {whole} times fewer rows",
        )
        if (whole, True) in found:
            again = found[whole, True]
            kept = again.activations_bytes / full.activations_bytes
            slower = again.time / full.time
            yield "checkpoints save 50 to 70 % of activations", case, f"{1 - kept:.0%}, in {slower:.2f} of the time"
            both = found[1, True]
            of_peak, of_activations = both.peak_bytes / full.peak_bytes, full.activations_bytes / both.activations_bytes
            yield (
                "both together",
                case,
                f"{of_peak:.0%} of the whole batch's peak, activations {of_activations:.0f} times less",
            )
        doubled = [found[half, False].time / found[size, False].time for half, size in itertools.pairwise(sizes)]
        yield (
            "twice the microbatches take 1.5 times as long",
            case,
            f"{min(doubled):.2f} to {max(doubled):.2f}, median {statistics.median(doubled):.2f}",
        )
        best = min(sizes, key=lambda size: found[size, False].time)
        yield "the best microbatch is 8 to 32", case, f"{best} of {whole}"


def as_markdown(rows: Sequence[Row], record: Mapping[str, Any]) -> str:
    """Return the tables.

    Args:
        rows: What was measured.
        record: On what.

    Returns:
        Markdown.
    """
    on = "; ".join(f"{name} {value}" for each in ("hardware", "versions") for name, value in record[each].items())
    lines = ["# Said, and measured", "", f"`python -m benchmarks.claims`; {on}."]
    lines += ["", "| said | model | measured |", "|---|---|---|"]
    told = sorted(verdicts(rows), key=lambda each: [claim for claim, _, _ in verdicts(rows)].index(each[0]))
    lines += [f"| {claim} | {case} | {measured} |" for claim, case, measured in told]
    lines += [
        "",
        "| model | microbatch | checkpoints | step | peak | activations at the peak |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.case}, batch {row.batch_size} | {row.microbatch_size} | {'yes' if row.checkpointed else 'no'} | "
        f"{row.time:.2f} s | {row.peak_bytes / 2**20:.0f} MiB | {row.activations_bytes / 2**20:.1f} MiB |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("--case", nargs="+", default=list(DEFAULT_CASES), choices=sorted(CASES))
    parser.add_argument("--repeats", type=int, default=2, help="steps that are timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(flags.threads)
    rows: list[Row] = []
    for case in flags.case:
        whole = CASES[case].batch_size
        of = partial(measure, case, repeats=flags.repeats)
        rows += [of(size, checkpointed=False) for size in CASES[case].all_sizes] + (
            [of(whole, checkpointed=False)] if whole not in CASES[case].all_sizes else []
        )
        rows += [of(size, checkpointed=True) for size in (1, whole)]
    record = {"hardware": hardware("cpu"), "versions": versions(), "threads": flags.threads}
    markdown = as_markdown(rows, record)
    print(markdown)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    record |= {"rows": [asdict(row) for row in rows]}
    flags.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    flags.out.with_suffix(".md").write_text(markdown, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
