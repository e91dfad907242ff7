"""Predicted against measured peak memory: many kinds of models, microbatch sizes, precisions, with checkpoints or not.

``python -m benchmarks.prediction --out benchmarks/results/prediction`` writes a JSON and a Markdown file;
``--quick`` looks at fewer sizes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from benchmarks.machine import hardware, versions
from benchmarks.unseen import HELD_OUT
from benchmarks.zoo import KINDS, Kind, made
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Options
from microbatch.step.size.dry_run import dry_run

# None but the first is among the sizes that are rehearsed for real.
SIZES, QUICK = (1, 3, 6, 12, 24), (3, 24)
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
CLOSE, WORST, UNDER = 0.01, 0.05, 0.005  # the goals: median error, worst error, worst underestimate


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; bytes."""

    model: str
    held_out: bool
    precision: str
    checkpointed: bool
    microbatch_size: int
    predicted: int
    measured: int
    exact: bool
    note: str
    rehearsal_seconds: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1; below 0 is an underestimate."""
        return self.predicted / self.measured - 1


def compare(name: str, kind: Kind, *, precision: str, checkpointed: bool, sizes: Sequence[int]) -> list[Row]:
    """Predict one model's peaks, then measure them.

    Args:
        name: The model's.
        kind: The model.
        precision: ``"fp32"`` or ``"bf16"``.
        checkpointed: Whether its blocks are.
        sizes: Microbatch sizes.
    """
    batch = kind.batch(2 * max(sizes))
    model = made(kind, checkpointed=checkpointed)
    start = time.perf_counter()
    predicted = dry_run(_settings(model, PRECISIONS[precision]), kind.loss_fn, batch=batch)
    seconds = time.perf_counter() - start
    rows: list[Row] = []
    for size in sizes:
        measured = _measure(made(kind, checkpointed=checkpointed), kind, batch, size, PRECISIONS[precision])
        rows.append(
            Row(
                model=name,
                held_out=name in HELD_OUT,
                precision=precision,
                checkpointed=checkpointed,
                microbatch_size=size,
                predicted=predicted.peak_bytes(size),
                measured=measured,
                exact=predicted.exact,
                note=predicted.note,
                rehearsal_seconds=round(seconds, 2),
            )
        )
    return rows


def _settings(model: nn.Module, autocast: torch.dtype | None) -> Options:
    return Options(model=model, optimizers=[AdamW(model.parameters())], microbatch_size=1, autocast=autocast)


def _measure(  # noqa: PLR0917
    model: nn.Module, kind: Kind, batch: dict[str, Tensor], size: int, autocast: torch.dtype | None
) -> int:
    """Return the most bytes that torch's allocator held at once in two steps, what was there before included.

    Of four microbatches at most: the profiler keeps every event, some gigabytes where layers run step by step.
    """
    accumulator = Accumulator(model, AdamW(model.parameters()), microbatch_size=size, autocast=autocast)
    there = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in tree_leaves([list(model.parameters()), list(model.buffers()), batch])
    }
    some = {name: each[: 4 * size] for name, each in batch.items()}
    gc.collect()  # or what earlier runs left behind is released, and counted, inside
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            for _ in range(2):
                accumulator.step(some, kind.loss_fn)
    results: Any = profiled.profiler
    events = [each for each in results.kineto_results.events() if each.name() == "[memory]"]
    events.sort(key=lambda each: each.start_ns())
    return sum(there.values()) + max(accumulate((each.nbytes() for each in events), initial=0))


# -- results ----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> dict[str, float | int]:
    """Say how well the goals are met.

    Args:
        rows: Every comparison.
    """
    errors = [row.error for row in rows]
    return {
        "comparisons": len(rows),
        "median_error": statistics.median(map(abs, errors)),
        "worst_error": max(map(abs, errors)),
        "worst_underestimate": -min(0.0, *errors),
        "median_rehearsal_seconds": statistics.median(row.rehearsal_seconds for row in rows),
    }


def markdown(rows: Sequence[Row], *, command: str) -> str:
    """Write the results for people.

    Args:
        rows: Every comparison.
        command: What reproduces them.
    """
    machine = "; ".join([", ".join(map(" ".join, versions().items())), str(hardware("cpu")["cpu"])])
    seen, unseen = [row for row in rows if not row.held_out], [row for row in rows if row.held_out]
    lines = [
        "# Predicted and measured peak memory",
        "",
        f"`{command}`: {machine}. AdamW, two windows, against every allocation that torch's CPU allocator reports.",
        "",
        "| | comparisons | median error | worst error | worst underestimate |",
        "|---|---|---|---|---|",
    ]
    groups = [("models used while developing", seen), ("models held out until the end", unseen)]
    for title, group in groups:
        if group:
            s = summary(group)
            lines.append(
                f"| {title} | {s['comparisons']} | {s['median_error']:.4%} | {s['worst_error']:.3%} "
                f"| {s['worst_underestimate']:.3%} |"
            )
    lines += [
        f"| goal | | ≤ {CLOSE:.0%} | ≤ {WORST:.0%} | ≤ {UNDER:.1%} |",
        "",
        "The error of each, in percent, by microbatch size; * where the operators differ between sizes.",
        "",
    ]
    sizes = sorted({row.microbatch_size for row in rows})
    lines += [
        f"| model | precision | checkpoints | {' | '.join(map(str, sizes))} | measured at {sizes[-1]} | rehearsal |",
        f"|---|---|---|{'---|' * len(sizes)}---|---|",
    ]
    for (model, precision, checkpointed), group in itertools.groupby(
        rows, key=lambda row: (row.model, row.precision, row.checkpointed)
    ):
        held = list(group)
        cells = " | ".join(f"{100 * row.error:+.3f}" for row in held)
        name = model + ("" if held[0].exact else " *") + (" (held out)" if held[0].held_out else "")
        lines.append(
            f"| {name} | {precision} | {'yes' if checkpointed else 'no'} | {cells} "
            f"| {held[-1].measured / 2**20:.1f} MiB | {held[0].rehearsal_seconds:.1f} s |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two microbatch sizes instead of five")
    parser.add_argument("--models", nargs="*", help="only these")
    parser.add_argument("--out", type=Path, help="where to write, without ending")
    chosen = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    every = {**KINDS, **HELD_OUT}
    rows: list[Row] = []
    for name in chosen.models or every:
        for precision, checkpointed in itertools.product(PRECISIONS, (False, True)):
            sizes = QUICK if chosen.quick else SIZES
            found = compare(name, every[name], precision=precision, checkpointed=checkpointed, sizes=sizes)
            rows += found
            errors = "  ".join(f"{row.microbatch_size}: {row.error:+.3%}" for row in found)
            print(f"{name:18} {precision} {'checkpointed' if checkpointed else '':12} {errors}", flush=True)
    print(json.dumps(summary(rows), indent=1))
    if chosen.out:
        command = "python -m benchmarks.prediction" + (" --quick" if chosen.quick else "")
        chosen.out.with_suffix(".md").write_text(markdown(rows, command=command), encoding="utf-8")
        data = {
            "command": command,
            "hardware": hardware("cpu"),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "summary": summary(rows),
            "rows": [asdict(row) | {"error": row.error} for row in rows],
        }
        chosen.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
