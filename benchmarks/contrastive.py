"""What the gradient of a contrastive loss of the whole batch costs, against accumulating that of each microbatch.

::

    python -m benchmarks.contrastive                      two towers, 128 pairs in microbatches of 8; some minutes
    python -m benchmarks.contrastive --rows 64 --microbatch-size 4 --repeats 9
    python -m benchmarks.contrastive --quick              does everything run?

Everyone trains the same two towers with the same loss. The full batch holds every graph at once. The *loop* is what
people write: it accumulates, and each microbatch's negatives are its own, so its gradient is another one. The others
are ``accumulator.step(batch, loss_fn, encode=...)``: encoded twice, once with the graphs kept, once with them spilled.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

import microbatch as mb
from benchmarks.cases import LEARNING_RATE, SEED
from benchmarks.machine import hardware, in_words, versions
from benchmarks.models import Block, VisionTransformer
from benchmarks.report import write
from benchmarks.summary import order_of_round, summarize, summarize_ratio

OUT = Path(__file__).parent / "results" / "contrastive"
WAYS = ("full", "loop", "twice", "keep", "spill")
GOAL = 1.35  # of the loop's time, encoded twice
FORM = {"layers": 4, "heads": 3, "channels": 192, "width": 128}
TINY = {"layers": 1, "heads": 2, "channels": 16, "width": 8}
TOKENS, VOCABULARY = 32, 512
Batch = dict[str, Tensor]


class Towers(nn.Module):
    """A transformer over the patches of an image, one over the tokens of a text, and a learned scale.

    Args:
        layers: Blocks of each.
        heads: Attention heads of a block.
        channels: Width of the streams.
        width: Width of a representation.
    """

    def __init__(self, *, layers: int, heads: int, channels: int, width: int) -> None:
        super().__init__()
        self.image = VisionTransformer(size=32, patch=4, layers=layers, heads=heads, channels=channels, classes=width)
        self.tokens = nn.Embedding(VOCABULARY, channels)
        self.blocks = nn.Sequential(*(Block(channels, heads, causal=False) for _ in range(layers)))
        self.head = nn.Linear(channels, width)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def text(self, tokens: Tensor) -> Tensor:
        """Return the representations of texts; shape ``(rows, width)``."""
        return self.head(self.blocks(self.tokens(tokens)).mean(1))


def encode(model: Any, piece: Batch) -> tuple[Tensor, Tensor]:
    """Return normalised representations of both sides."""
    return F.normalize(model.image(piece["images"]), dim=1), F.normalize(model.text(piece["tokens"]), dim=1)


def loss_of(model: Any, both: tuple[Tensor, Tensor]) -> mb.Loss:
    """Return CLIP's loss of some pairs, each the other's negatives."""
    return mb.losses.clip(*both, scale=model.scale.exp())


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One way's numbers.

    Attributes:
        way: One of `WAYS`.
        seconds: Each window's time on the wall's clock: every microbatch, and the optimizer's step.
        against_loop: Median, over the rounds, of the ratio to the loop.
        against_full: Likewise, to the full batch.
        gradient_error: Distance from the full batch's gradient, relative to it.
        peak_bytes: Most bytes that torch held at once in a window, weights and all.
    """

    way: str
    seconds: list[float]
    against_loop: float
    against_full: float
    gradient_error: float
    peak_bytes: int


class Desk:
    """One way to train the towers.

    Args:
        way: One of `WAYS`.
        rows: Pairs of the effective batch.
        size: Pairs of a microbatch; divides them.
        form: Of `Towers`.
    """

    def __init__(self, way: str, rows: int, *, size: int, form: dict[str, int]) -> None:
        torch.manual_seed(SEED)
        self.model = Towers(**form)
        self.batch = {
            "images": torch.randn(rows, 3, 32, 32),
            "tokens": torch.randint(VOCABULARY, (rows, TOKENS)),
        }
        self._optimizer = AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self._size = rows if way == "full" else size
        self._accumulator = mb.Accumulator(
            self.model,
            self._optimizer,
            microbatch_size=size,
            memory_budget="none",
            coupled=way if way in {"twice", "keep", "spill"} else "auto",
        )
        self._window: Callable[[], object] = self._loop if way in {"full", "loop"} else self._step

    def seconds(self) -> float:
        """Time one window."""
        gc.collect()
        started = time.perf_counter()
        self._window()
        return time.perf_counter() - started

    def gradient(self) -> list[Tensor]:
        """Return the gradient that the optimizer is given in a first window, and put the weights back."""
        before = [each.detach().clone() for each in self.model.parameters()]
        seen: list[Tensor] = []

        def look(*_: Any) -> None:
            seen.extend(each.grad.clone() for each in self.model.parameters() if each.grad is not None)

        hook = self._optimizer.register_step_pre_hook(look)
        self._window()
        hook.remove()
        with torch.no_grad():
            for each, value in zip(self.model.parameters(), before, strict=True):
                each.copy_(value)
        self._optimizer.state.clear()
        return seen

    def peak_bytes(self) -> int:
        """Measure the memory of a window, untimed."""
        self._window()  # makes the optimizer's state
        meter = mb.MemoryMeter()
        meter.track(self.model, self._optimizer, self.batch)
        with meter:
            self._window()
        return meter.peak_bytes

    def _loop(self) -> None:
        rows = len(self.batch["images"])
        for start in range(0, rows, self._size):
            piece = {name: each[start : start + self._size] for name, each in self.batch.items()}
            (loss_of(self.model, encode(self.model, piece)).sum / rows).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _step(self) -> None:
        self._accumulator.step(self.batch, loss_of, encode=encode)


_DESKS: list[Desk] = []  # of a process of its own: one


def _sit_down(way: str, rows: int, size: int, form: dict[str, int], threads: int) -> None:  # noqa: PLR0917 - by position
    torch.set_num_threads(threads)
    _DESKS.append(Desk(way, rows, size=size, form=form))


def _ask(what: str) -> Any:
    return getattr(_DESKS[0], what)()


def measure(*, rows: int, size: int, form: dict[str, int], repeats: int, threads: int) -> list[Entry]:
    """Measure every way, in turn, round after round, each in a process of its own.

    Args:
        rows: Pairs of the effective batch.
        size: Pairs of a microbatch; divides them.
        form: Of `Towers`.
        repeats: Rounds; at least 1.
        threads: Threads of torch's operators.

    Returns:
        One entry for each of `WAYS`.
    """
    context = multiprocessing.get_context("spawn")
    pools = {
        way: ProcessPoolExecutor(1, context, initializer=_sit_down, initargs=(way, rows, size, form, threads))
        for way in WAYS
    }
    try:
        gradients = {way: pools[way].submit(_ask, "gradient").result() for way in WAYS}
        for way in WAYS:
            pools[way].submit(_ask, "seconds").result()  # warms up
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for index in range(repeats):
            for way in order_of_round(list(WAYS), index):
                seconds[way].append(pools[way].submit(_ask, "seconds").result())
        peaks = {way: pools[way].submit(_ask, "peak_bytes").result() for way in WAYS}
    finally:
        for pool in pools.values():
            pool.shutdown()
    return [
        Entry(
            way=way,
            seconds=seconds[way],
            against_loop=summarize_ratio(seconds[way], seconds["loop"]).median,
            against_full=summarize_ratio(seconds[way], seconds["full"]).median,
            gradient_error=relative_error(gradients[way], gradients["full"]),
            peak_bytes=peaks[way],
        )
        for way in WAYS
    ]


def relative_error(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return the distance of two gradients, relative to the second.

    Args:
        mine: One.
        theirs: The other.

    Returns:
        The distance.
    """
    difference = sum(float((a - b).double().square().sum()) for a, b in zip(mine, theirs, strict=True))
    return math.sqrt(difference / sum(float(b.double().square().sum()) for b in theirs))


def as_markdown(record: dict[str, Any]) -> str:
    """Return the table.

    Args:
        record: What is written as JSON.

    Returns:
        Markdown.
    """
    machine = in_words(record["hardware"])
    twice = next(each for each in record["entries"] if each["way"] == "twice")
    noisy = any(summarize(each["seconds"]).noisy for each in record["entries"] if each["way"] in {"loop", "twice"})
    verdict = "undecided, another job was running" if noisy else "met" if twice["against_loop"] <= GOAL else "missed"
    lines = [
        "# Losses that couple samples, measured",
        "",
        f"{record['date']}; {machine}; {record['threads']} threads.",
        "; ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
        "",
        f"Two towers, {record['parameters']:,} parameters, {record['rows']} pairs in microbatches of",
        f"{record['microbatch_size']}. *Gradient* is the distance from the full batch's.",
        "",
        "| way | window | against loop | against full | gradient | peak memory |",
        "|" + "---|" * 6,
    ]
    for each in record["entries"]:
        time_of = summarize(each["seconds"])
        lines.append(
            f"| {each['way']} | {1000 * time_of.median:.0f} ms ± {time_of.spread / 2:.1%} | "
            f"{each['against_loop']:.3f} | {each['against_full']:.3f} | {each['gradient_error']:.0e} | "
            f"{each['peak_bytes'] / 2**20:.1f} MiB |"
        )
    lines += ["", f"Goal: encoded twice, at most {GOAL} of the loop's time: {twice['against_loop']:.3f}, {verdict}."]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contrastive",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rows", type=int, default=128, help="pairs of the effective batch")
    add("--microbatch-size", type=int, default=8, help="pairs that go through at once; divides the rows")
    add("--repeats", type=int, default=7, help="rounds")
    add("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch's operators")
    add("--quick", action="store_true", help="two rounds of tiny towers: does everything run?")
    add("--out", type=Path, default=OUT, help="where to write, without suffix")
    flags = parser.parse_args(arguments)
    form = TINY if flags.quick else FORM
    if flags.quick:
        flags.rows, flags.microbatch_size, flags.repeats = 8, 2, 2
    entries = measure(
        rows=flags.rows, size=flags.microbatch_size, form=form, repeats=flags.repeats, threads=flags.threads
    )
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "threads": flags.threads,
        "rows": flags.rows,
        "microbatch_size": flags.microbatch_size,
        "parameters": sum(each.numel() for each in Towers(**form).parameters()),
        "entries": [asdict(entry) for entry in entries],
    }
    markdown = as_markdown(record)
    print(markdown)
    if not flags.quick:
        write(record, markdown, flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
