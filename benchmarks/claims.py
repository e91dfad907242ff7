"""What is often said about gradient accumulation and its memory, held against what is measured here.

::

    python -m benchmarks.claims                        ten minutes on two cores
    python -m benchmarks.claims --case vit --out /tmp/claims
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from benchmarks.cases import CASES, loss_sum
from benchmarks.contenders import Subject, make_subject
from benchmarks.machine import hardware, versions
from benchmarks.report import write

RESULTS = Path(__file__).parent / "results" / "claims"
DEFAULT_CASES = ("gpt", "vit", "residual")
LossSum: TypeAlias = Callable[[nn.Module, dict[str, Tensor]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One microbatch size of one model, run one way.

    Attributes:
        case: A key of `CASES`.
        batch_size: Rows of the effective batch.
        way: A key of `WAYS`.
        microbatch_size: Rows that went through at once; the batch's, for no accumulation.
        checkpointed: Whether every block was computed again in backward.
        peak_bytes: Most bytes alive at once in a step, weights, gradients, optimizer state and batch included.
        activations_bytes: What one microbatch's forward keeps for its backward.
        seconds: Of each step.
    """

    case: str
    batch_size: int
    way: str
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


def by_hand(subject: Subject, loss: LossSum) -> Callable[[], None]:
    """Return a step of the hand-written loop."""

    def step() -> None:
        for piece in subject.pieces():
            (loss(subject.model, piece) / subject.count).backward()
        subject.optimizer.step()
        subject.optimizer.zero_grad()

    return step


def with_microbatch(subject: Subject, loss: LossSum) -> Callable[[], None]:
    """Return a step of `microbatch`."""
    size = subject.microbatch_size
    accumulator = mb.Accumulator(subject.model, subject.optimizer, microbatch_size=size, memory_budget="none")

    def loss_fn(model: nn.Module, piece: dict[str, Tensor]) -> mb.Loss:
        return mb.Loss(sum=loss(model, piece), count=piece["labels"].numel())

    def step() -> None:
        accumulator.step(subject.batch, loss_fn)

    return step


WAYS = {"by hand": by_hand, "microbatch": with_microbatch}


class Kept:
    """Count what a forward pass keeps for backward.

    Args:
        loss: The forward pass.

    Attributes:
        most: Bytes of distinct storages, without the model's own, in the pass that kept most.
    """

    def __init__(self, loss: LossSum) -> None:
        self._loss = loss
        self.most = 0

    def __call__(self, model: nn.Module, piece: dict[str, Tensor]) -> Tensor:
        """Run the pass, and look at every tensor that autograd saves."""
        own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
        kept: dict[int, int] = {}

        def look(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
            loss = self._loss(model, piece)
        self.most = max(self.most, sum(kept.values()))
        return loss


def measure(case_name: str, way: str, microbatch_size: int, *, checkpointed: bool, repeats: int) -> Row:
    """Take a few steps on a case's batch.

    Args:
        case_name: A key of `CASES`.
        way: A key of `WAYS`.
        microbatch_size: Rows that go through at once.
        checkpointed: Whether to compute every block again.
        repeats: Steps that are timed.
    """
    subject = make_subject(case_name, microbatch_size, device="cpu")
    if checkpointed:
        blocks: Any = subject.model.get_submodule("blocks")
        for name, block in list(blocks.named_children()):
            setattr(blocks, name, Again(block))
    step = WAYS[way](subject, loss_sum)
    step()  # makes the optimizer's state
    seconds: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    with mb.MemoryMeter() as meter:
        meter.track(subject.model, subject.optimizer, subject.batch)
        step()
    kept = Kept(loss_sum)
    WAYS[way](subject, kept)()
    return Row(
        case=case_name,
        batch_size=subject.rows,
        way=way,
        microbatch_size=microbatch_size,
        checkpointed=checkpointed,
        peak_bytes=meter.peak_bytes,
        activations_bytes=kept.most,
        seconds=seconds,
    )


def verdicts(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, str]]:
    """Yield each claim, a case, a way, and what was measured against the whole batch by hand."""
    for case, way in dict.fromkeys((row.case, row.way) for row in rows):
        found = {(row.microbatch_size, row.checkpointed): row for row in rows if (row.case, row.way) == (case, way)}
        whole = max(size for size, _ in found)
        plain = {
            row.checkpointed: row
            for row in rows
            if (row.case, row.way, row.microbatch_size) == (case, "by hand", whole)
        }
        full, one = plain[False], found[1, False]
        sizes = [size for size, again in sorted(found) if not again]
        small = [size for size in sizes if size <= whole // 4]
        shares = [found[size, False].peak_bytes / full.peak_bytes for size in small]
        less = f"{1 / max(shares):.1f} to {1 / min(shares):.1f} times less, microbatches of {small[-1]} to 1"
        yield "accumulation takes 4 to 16 times less memory", case, way, less
        saved = f"{1 - max(shares):.0%} to {1 - min(shares):.0%}"
        yield "accumulation saves 75 to 90 % of memory", case, way, saved
        fewer = full.activations_bytes / one.activations_bytes
        yield (
            "activations shrink with the microbatch",
            case,
            way,
            f"{fewer:.0f} times less for {whole} times fewer rows",
        )
        if (whole, True) in found:
            again = found[whole, True]
            kept = again.activations_bytes / full.activations_bytes
            slower = again.time / full.time
            yield (
                "checkpoints save 50 to 70 % of activations",
                case,
                way,
                f"{1 - kept:.0%}, in {slower:.2f} of the time",
            )
            both = found[1, True]
            of_peak, fewer = both.peak_bytes / full.peak_bytes, full.activations_bytes / both.activations_bytes
            words = f"{of_peak:.0%} of the whole batch's peak, activations {fewer:.0f} times less"
            yield "accumulation and checkpoints together", case, way, words
        doubled = [found[half, False].time / found[size, False].time for half, size in itertools.pairwise(sizes)]
        middle = statistics.median(doubled)
        words = f"{min(doubled):.2f} to {max(doubled):.2f}, median {middle:.2f}"
        yield "twice the microbatches take 1.5 times as long", case, way, words
        best = min(sizes, key=lambda size: found[size, False].time)
        yield "the best microbatch is 8 to 32", case, way, f"{best} of {whole}"


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
    lines += [
        "",
        "Against the whole batch at once by plain PyTorch. Activations are what a forward keeps for backward.",
    ]
    lines += ["", "| said | model | by hand | `microbatch` |", "|---|---|---|---|"]
    found = {(claim, case, way): measured for claim, case, way, measured in verdicts(rows)}
    claims, cases = (list(dict.fromkeys(key[at] for key in found)) for at in (0, 1))
    lines += [
        f"| {claim} | {case} | {found[claim, case, 'by hand']} | {found[claim, case, 'microbatch']} |"
        for claim in claims
        for case in cases
        if (claim, case, "microbatch") in found
    ]
    lines += [
        "",
        "| model | way | microbatch | checkpoints | step | peak | activations |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.case}, batch {row.batch_size} | {row.way} | {row.microbatch_size} | "
        f"{'yes' if row.checkpointed else 'no'} | "
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
        sizes = sorted({*CASES[case].all_sizes, whole})
        for size, again in [*((size, False) for size in sizes), (1, True), (whole, True)]:
            rows += [measure(case, way, size, checkpointed=again, repeats=flags.repeats) for way in WAYS]
    record = {"hardware": hardware("cpu"), "versions": versions(), "threads": flags.threads}
    markdown = as_markdown(rows, record)
    print(markdown)
    record |= {"rows": [asdict(row) for row in rows]}
    write(record, markdown, flags.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
