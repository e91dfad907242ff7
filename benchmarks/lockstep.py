"""What exact batch normalisation costs beside plain accumulation: time, memory on the device, bytes spilled.

::

    python -m benchmarks.lockstep                     five minutes on two cores
    python -m benchmarks.lockstep --case resnet18 --repeats 15 --out /tmp/lockstep

Each way runs in a process of its own, a window each in turn; none gives memory back to the system between windows.
*Exact* spills everything that is large enough, *in plain's memory* leaves as much on the device as plain accumulation
takes there, and *not spilled* all.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb
from benchmarks.machine import hardware, versions
from benchmarks.summary import order_of_round, summarize, summarize_ratio

OUT = Path(__file__).parent / "results" / "lockstep"
MARGIN = 0.97
# Memory that the C library gives back costs page faults when it is taken again, up to a third of a window, and whether
# it does differs from process to process: here all of them keep theirs.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
NOTHING = 1 << 60  # bytes of a storage that is large enough to be spilled: none is


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out), nn.BatchNorm2d(out)])
        self.around: nn.Module = nn.Identity()
        if channels != out or stride != 1:
            conv = nn.Conv2d(channels, out, 1, stride=stride, bias=False)
            self.around = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        out = F.relu(self.norms[0](self.first(x)), inplace=True)
        return F.relu(self.norms[1](self.second(out)) + self.around(x), inplace=True)


class Inverted(nn.Module):
    """A wide block with a depthwise convolution, and a way around it where the shape stays."""

    def __init__(self, channels: int, out: int, *, stride: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        layers: list[nn.Module] = [] if expand == 1 else convolution(channels, wide, 1)
        layers += [*convolution(wide, wide, 3, stride=stride, groups=wide), *convolution(wide, out, 1)[:2]]
        self.inside = nn.Sequential(*layers)
        self.around = channels == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        return x + self.inside(x) if self.around else self.inside(x)


def convolution(channels: int, out: int, size: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Make a convolution, its normalisation and activation."""
    inside = nn.Conv2d(channels, out, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    return [inside, nn.BatchNorm2d(out), nn.ReLU6(inplace=True)]


def resnet18() -> nn.Module:
    """Make the residual network of 18 layers, as for ImageNet."""
    stem = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(channels, out, stride), Residual(out, out, 1)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 100))


def mobilenet() -> nn.Module:
    """Make MobileNetV2."""
    layers = convolution(3, 32, 3, stride=2)
    channels = 32
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, out, number, stride in table:
        for index in range(number):
            layers.append(Inverted(channels, out, stride=stride if index == 0 else 1, expand=expand))
            channels = out
    layers += [*convolution(channels, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 100)]
    return nn.Sequential(*layers)


CASES: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "mobilenet": mobilenet}
WAYS: dict[str, dict[str, Any]] = {
    "full batch": {"batch_norm": "microbatch"},
    "plain": {"batch_norm": "microbatch"},
    "exact": {"batch_norm": "exact"},
    "exact, in plain's memory": {"batch_norm": "exact"},
    "exact, not spilled": {"batch_norm": "exact"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One way's numbers on one case.

    Attributes:
        case: A key of `CASES`.
        way: A key of `WAYS`.
        side: Pixels of an image's side.
        rows: Rows of the batch.
        size: Rows of a microbatch.
        seconds: Each window's time on the wall's clock.
        against_plain: Median, over the rounds, of the ratio to plain accumulation; and half of its interquartile range.
        peak_bytes: Most bytes at once, beside weights, buffers and the batch.
        gradient_bytes: Bytes of the gradients, which are part of it.
        spilled_bytes: Bytes moved away in a window.
        error: Distance from the full batch's gradient, relative.
    """

    case: str
    way: str
    side: int
    rows: int
    size: int
    seconds: list[float]
    against_plain: tuple[float, float]
    peak_bytes: int
    gradient_bytes: int
    spilled_bytes: int
    error: float


@dataclass
class Desk:
    """One model under one accumulator."""

    model: nn.Module
    accumulator: mb.Accumulator
    spill: mb.Spill
    batch: dict[str, Tensor]
    gradient: list[Tensor] = field(default_factory=list[Tensor])

    def window(self) -> float:
        """Run one, and return its seconds."""
        gc.collect()
        started = time.perf_counter()
        self.accumulator.step(self.batch, loss)
        return time.perf_counter() - started

    def leave(self, allowed: int) -> None:
        """Leave as much on the device as does not raise the peak above so many bytes, as an accumulator would."""
        for _ in range(3):
            self.spill.room = max(0, self.spill.room + int(MARGIN * allowed) - self.memory()[0])

    def first_gradient(self) -> Tensor:
        """Return the first window's gradient, as one vector."""
        return torch.cat([one.flatten() for one in self.gradient])

    def memory(self) -> tuple[int, int]:
        """Return the most bytes beside weights, buffers and the batch, and the bytes spilled."""
        meter = mb.MemoryMeter()
        meter.track(self.model, self.batch)
        before, spilled = meter.live_bytes, self.spill.bytes_spilled
        with meter:
            self.accumulator.step(self.batch, loss)
        return meter.peak_bytes - before, self.spill.bytes_spilled - spilled


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(model(batch["x"]), batch["y"])


def desk(case: str, way: str, *, rows: int, size: int, side: int) -> Desk:
    """Set one up; all of a case have the same weights and data."""
    torch.manual_seed(0)
    model = CASES[case]()
    batch = {"x": torch.randn(rows, 3, side, side), "y": torch.randint(0, 100, (rows,))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    spill = mb.Spill(model, smallest=NOTHING if way == "exact, not spilled" else 1 << 16)
    settings = dict(WAYS[way], offload=spill) if "exact" in way else WAYS[way]
    accumulator = mb.Accumulator(
        model, optimizer, microbatch_size=rows if way == "full batch" else size, memory_budget="none", **settings
    )
    found = Desk(model, accumulator, spill, batch)

    def keep(*_: object) -> None:
        found.gradient = found.gradient or [each.grad.clone() for each in model.parameters() if each.grad is not None]

    optimizer.register_step_pre_hook(keep)
    return found


_DESKS: list[Desk] = []  # of a process of its own: one


def _sit_down(case: str, way: str, rows: int, size: int, side: int, threads: int) -> None:  # noqa: PLR0917 - by position
    torch.set_num_threads(threads)
    _DESKS.append(desk(case, way, rows=rows, size=size, side=side))


def _ask(what: str, *given: Any) -> Any:
    return getattr(_DESKS[0], what)(*given)


def measure(case: str, *, rows: int, size: int, side: int, repeats: int, threads: int) -> list[Entry]:
    """Measure every way of a case, in turns, each in a process of its own.

    Args:
        case: A key of `CASES`.
        rows: Rows of the batch.
        size: Rows of a microbatch.
        side: Pixels of an image's side.
        repeats: Rounds; at least 1.
        threads: Threads of torch's operators.

    Returns:
        One entry for each of `WAYS`.
    """
    os.environ.update(KEPT)
    context = multiprocessing.get_context("spawn")
    pools = {
        way: ProcessPoolExecutor(1, context, initializer=_sit_down, initargs=(case, way, rows, size, side, threads))
        for way in WAYS
    }
    try:
        for way in WAYS:
            for _ in range(2):
                pools[way].submit(_ask, "window").result()  # warms up
        plain = pools["plain"].submit(_ask, "memory").result()[0]
        pools["exact, in plain's memory"].submit(_ask, "leave", plain).result()
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for index in range(repeats):
            for way in order_of_round(list(WAYS), index):
                seconds[way].append(pools[way].submit(_ask, "window").result())
        memory = {way: pools[way].submit(_ask, "memory").result() for way in WAYS}
        gradients = {way: pools[way].submit(_ask, "first_gradient").result() for way in WAYS}
    finally:
        for pool in pools.values():
            pool.shutdown()
    entries: list[Entry] = []
    reference = gradients["full batch"].double()
    for way in WAYS:
        ratio = summarize_ratio(seconds[way], seconds["plain"])
        peak, spilled = memory[way]
        gradient = gradients[way].double()
        entries.append(
            Entry(
                case=case,
                way=way,
                side=side,
                rows=rows,
                size=rows if way == "full batch" else size,
                seconds=seconds[way],
                against_plain=(ratio.median, ratio.spread),
                peak_bytes=peak,
                gradient_bytes=gradients[way].nbytes,
                spilled_bytes=spilled,
                error=((gradient - reference).norm() / reference.norm()).item(),
            )
        )
    return entries


def table(entries: Sequence[Entry]) -> str:
    """Write the entries as Markdown; the peak is beside weights, buffers and the batch."""
    lines = [
        "| case | pixels | way | microbatch | window | against plain | peak | gradients | spilled | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in entries:
        time_ = summarize(each.seconds)
        ratio, spread = each.against_plain
        lines.append(
            f"| {each.case} | {each.side}² | {each.way} | {each.size} of {each.rows} | {time_.median:.3f} s "
            f"| {ratio:.2f} ± {spread:.2f} | {each.peak_bytes / 2**20:.1f} MiB | {each.gradient_bytes / 2**20:.1f} MiB "
            f"| {each.spilled_bytes / 2**20:.1f} MiB | {each.error:.1e} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lockstep", description=__doc__)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--microbatch-size", type=int, default=4)
    parser.add_argument("--side", type=int, nargs="+", default=[64, 128], help="pixels of an image's side")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch's operators")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    entries: list[Entry] = []
    for case, side in product(given.case, given.side):
        entries += measure(
            case,
            rows=given.rows,
            size=given.microbatch_size,
            side=side,
            repeats=given.repeats,
            threads=given.threads,
        )
    text = table(entries)
    print(text)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"when": datetime.now(UTC).isoformat(), "machine": hardware("cpu"), "versions": versions()}
    record["threads"] = given.threads
    given.out.with_suffix(".json").write_text(json.dumps({**record, "entries": [asdict(each) for each in entries]}))
    given.out.with_suffix(".md").write_text(
        f"# Exact batch normalisation\n\n`python -m benchmarks.lockstep --repeats {given.repeats}`, "
        f"{given.threads} threads; "
        + "; ".join(f"{name} {value}" for name, value in {**hardware("cpu"), **versions()}.items())
        + f".\n\n{text}\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
