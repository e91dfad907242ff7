"""What the noise scale costs: windows of a small GPT with it and without it, in turn."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import microbatch as mb
from benchmarks.machine import hardware, in_words, versions
from benchmarks.models import GPT
from benchmarks.report import write
from benchmarks.summary import order_of_round, summarize, summarize_ratio

OUT = Path(__file__).parent / "results" / "noise"
EVERY = 10
NEVER = 2**40
"""So large that no window of a benchmark is measured: what is left is the option's own cost in the other windows."""
WAYS: Mapping[str, mb.NoiseScale | None] = {
    "without": None,
    "not measured": mb.NoiseScale(every=NEVER),
    "measured": mb.NoiseScale(every=1),
}
ROWS, VOCABULARY, LENGTH, LAYERS, HEADS, CHANNELS = 32, 4096, 64, 4, 8, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One way's time.

    Attributes:
        size: Rows of a microbatch.
        way: One of `WAYS`.
        milliseconds: Median over the rounds.
        spread: Interquartile range over that.
        ratio: Median of the ratios to the window without the option in the same round.
    """

    size: int
    way: str
    milliseconds: float
    spread: float
    ratio: float


def loss_of(model: nn.Module, tokens_BT: Tensor) -> mb.Loss:
    """Return the loss of the next tokens."""
    return mb.losses.causal_lm(model(tokens_BT), tokens_BT)


def accumulators(size: int, *, device: str) -> dict[str, mb.Accumulator]:
    """Make an accumulator for each way, all from the same weights."""
    found: dict[str, mb.Accumulator] = {}
    for way, noise_scale in WAYS.items():
        torch.manual_seed(0)
        model = GPT(vocabulary=VOCABULARY, length=LENGTH, layers=LAYERS, heads=HEADS, channels=CHANNELS).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        found[way] = mb.Accumulator(
            model, optimizer, microbatch_size=size, memory_budget="none", noise_scale=noise_scale
        )
    return found


def times(steps: Mapping[str, Callable[[], object]], *, repeats: int, wait: Callable[[], object]) -> dict[str, Any]:
    """Time all ways in turn.

    Args:
        steps: A function of no arguments for each way, which takes one step.
        repeats: Rounds after the first, which is not counted; at least 1.
        wait: Waits for the device.

    Returns:
        Seconds of each round, by way.
    """
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for index in range(repeats + 1):
        for way in order_of_round(list(steps), index):
            wait()
            started = time.perf_counter()
            steps[way]()
            wait()
            seconds[way].append(time.perf_counter() - started)
    return {way: each[1:] for way, each in seconds.items()}


def measure(sizes: Sequence[int], *, repeats: int, device: str) -> list[Entry]:
    """Measure windows of each microbatch size.

    Args:
        sizes: Rows of a microbatch.
        repeats: Rounds; at least 1.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        One entry for each size and way.
    """
    batch = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    found: list[Entry] = []
    for size in sizes:
        made = accumulators(size, device=device)
        steps = {way: lambda each=each: each.step(batch, loss_of) for way, each in made.items()}
        seconds = times(steps, repeats=repeats, wait=wait)
        for way, each in seconds.items():
            took, ratio = summarize([1000 * second for second in each]), summarize_ratio(each, seconds["without"])
            found.append(Entry(size=size, way=way, milliseconds=took.median, spread=took.spread, ratio=ratio.median))
    return found


def average(entries: Sequence[Mapping[str, Any]], size: int) -> float:
    """Return the cost of the option in a run: one window of ten is measured.

    Args:
        entries: What `measure` found, as plain values.
        size: Rows of a microbatch.

    Returns:
        Share of the time without it.

    Example:
        >>> rows = [{"size": 4, "way": "measured", "ratio": 1.05}, {"size": 4, "way": "not measured", "ratio": 1.0}]
        >>> round(average(rows, 4), 4)
        0.005
    """
    ratios = {each["way"]: each["ratio"] for each in entries if each["size"] == size}
    return (ratios["measured"] + (EVERY - 1) * ratios["not measured"]) / EVERY - 1


def as_markdown(record: dict[str, Any]) -> str:
    """Return the table.

    Args:
        record: What is written as JSON.

    Returns:
        Markdown.
    """
    machine = in_words(record["hardware"])
    entries = record["entries"]
    lines = [
        "# The noise scale, measured",
        "",
        f"{record['date']}; {machine}; {record['threads']} threads.",
        "; ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
        "",
        f"A window is {ROWS} rows of {LENGTH} tokens through a GPT of {LAYERS} blocks, width {CHANNELS}, {VOCABULARY}",
        "tokens, with AdamW. Each way takes a step in turn; ratios are to the window without it in the same round.",
        "",
        "| rows at once | window | time | against without |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {each['size']} | {each['way']} | {each['milliseconds']:.3g} ms ± {each['spread'] / 2:.1%} | "
        f"{each['ratio']:.4f} |"
        for each in entries
    ]
    lines += ["", f"With every={EVERY}, a run takes more time by:", ""]
    sizes = dict.fromkeys(each["size"] for each in entries)
    lines += [f"- {size} rows at once: {average(entries, size):+.2%}" for size in sizes]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=__doc__)
    parser.add_argument("--repeats", type=int, default=40, help="rounds")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8], help="rows of a microbatch")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch's operators")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write, without suffix")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(flags.threads)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(flags.device),
        "versions": versions(),
        "threads": flags.threads,
        "entries": [asdict(each) for each in measure(flags.sizes, repeats=flags.repeats, device=flags.device)],
    }
    markdown = as_markdown(record)
    print(markdown)
    write(record, markdown, flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
