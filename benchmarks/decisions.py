"""Measure what was decided by measuring: what is fused, what is kept between windows, which head, which optimizer.

::

    python -m benchmarks.decisions                     two minutes on two cores
    python -m benchmarks.decisions --repeats 5 --out /tmp/decisions
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

import microbatch as mb
from benchmarks.cases import CASES
from benchmarks.machine import hardware, in_words, versions
from benchmarks.memory import allocated_peak, warm_up_profiler
from benchmarks.report import write
from benchmarks.summary import Summary, order_of_round, summarize, summarize_ratio
from microbatch.products import add_product_

RESULTS = Path(__file__).parent / "results" / "decisions"
TOKENS, WIDTH, VOCABULARY = 512, 384, 50_257


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way of doing a thing, beside the first way of doing it.

    Attributes:
        question: What is decided.
        way: How it is done here.
        time: Of one run, in seconds.
        ratio: Of each round's times to those of the first way.
        peak_bytes: Most bytes that it allocated beyond what was there.
    """

    question: str
    way: str
    time: Summary
    ratio: Summary
    peak_bytes: int


Ways = Mapping[str, Callable[[], object]]


def compare(question: str, ways: Ways, *, repeats: int) -> list[Row]:
    """Run several ways in turn.

    Args:
        question: What is decided.
        ways: Each does the same thing once.
        repeats: Rounds; at least 1.

    Returns:
        A row for each way.
    """
    peaks = {name: allocated_peak(run) for name, run in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(repeats):
        for name in order_of_round(list(ways), index):
            started = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(ways))
    return [
        Row(
            question=question,
            way=name,
            time=summarize(taken),
            ratio=summarize_ratio(taken, seconds[first]),
            peak_bytes=peaks[name],
        )
        for name, taken in seconds.items()
    ]


def questions() -> Iterator[tuple[str, Ways]]:
    """Yield every question with the ways to be compared."""
    torch.manual_seed(0)
    yield "head and loss of a vocabulary of 50,257, 512 tokens", heads()
    for rows in (1, 8):
        where = f"{rows} rows of 8 x 8"
        yield f"3 x 3 convolution of 256 channels, {where}", accumulation(nn.Conv2d(256, 256, 3, padding=1), rows, 256)
        yield f"1 x 1 convolution of 1,024 channels, {where}", accumulation(nn.Conv2d(1024, 1024, 1), rows, 1024)
        yield f"1 x 1 convolution of 1,024 channels as a product, {where}", pointwise(rows)
    yield "LayerNorm's weight and bias, 512 tokens of 384", accumulation(nn.LayerNorm(WIDTH), 1, None)
    yield "bias of a linear layer, 512 tokens, 384 to 1,536", bias()
    yield "gradients of a GPT's first microbatch in a window, 512 tokens", buffers()
    yield "AdamW on a GPT of 30M parameters", optimizers()
    mb.keep_heap()  # page faults of the temporary, which other heaps have, would only favour fusing
    for shape in ((4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (VOCABULARY, WIDTH)):
        for tokens in (64, 256, 1024):
            for dtype in (torch.float32, torch.bfloat16):
                what = f"{shape[0]:,} x {shape[1]:,} weight, {tokens:,} tokens, {str(dtype).removeprefix('torch.')}"
                yield f"gradient of a {what}", fused(shape, tokens, dtype)


def heads() -> Ways:
    """Return the plain loss, ours, and torch's own where it has one."""
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH) / WIDTH)
    labels = torch.randint(VOCABULARY, (TOKENS,))

    def plain() -> None:
        _forget(hidden, weight)
        F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum").backward()

    def ours(tile: int | None) -> None:
        _forget(hidden, weight)
        mb.linear_cross_entropy(hidden, weight, labels, tile=tile).sum.backward()

    def torchs() -> None:
        _forget(hidden, weight)
        F.linear_cross_entropy(hidden, weight, labels, reduction="sum").backward()

    found: dict[str, Callable[[], object]] = {
        "cross_entropy(linear(x))": plain,
        "mb.linear_cross_entropy": partial(ours, None),
        "mb.linear_cross_entropy(tile=64)": partial(ours, 64),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch.nn.functional.linear_cross_entropy"] = torchs
    return found


def accumulation(layer: nn.Module, rows: int, channels: int | None) -> Ways:
    """Return a layer's backward with its gradients added to a sum, and without: at most that could be saved."""
    x = torch.randn(TOKENS, WIDTH) if channels is None else torch.randn(rows, channels, 8, 8)
    x.requires_grad_()
    parameters = list(layer.parameters())
    layer(x).sum().backward()  # the sums are there, as from the second microbatch on
    seed = torch.randn_like(layer(x))

    def adding() -> None:
        x.grad = None
        layer(x).backward(seed)

    def not_adding() -> None:
        torch.autograd.grad(layer(x), [x, *parameters], seed)

    return {"added to the sum": adding, "not added (the most that fusing could save)": not_adding}


def pointwise(rows: int) -> Ways:
    """Return a 1 x 1 convolution's weight gradient as torch makes it, and as an accumulating matrix product."""
    x, dy = torch.randn(rows, 1024, 8, 8), torch.randn(rows, 1024, 8, 8)
    weight, total = torch.randn(1024, 1024, 1, 1), torch.zeros(1024, 1024, 1, 1)

    def torchs() -> None:
        only_weight = [False, True, False]
        stride, none = [1, 1], [0, 0]
        backward = torch.ops.aten.convolution_backward
        total.add_(backward(dy, x, weight, None, stride, none, stride, False, none, 1, only_weight)[1])

    def product() -> None:
        total.view(1024, 1024).addmm_(dy.movedim(1, -1).reshape(-1, 1024).T, x.movedim(1, -1).reshape(-1, 1024))

    return {"convolution_backward and add": torchs, "accumulating product": product}


def bias() -> Ways:
    """Return what the bias costs beside the product that it belongs to."""
    x, dy = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, 4 * WIDTH)
    weight, total = torch.zeros(4 * WIDTH, WIDTH), torch.zeros(4 * WIDTH)
    ones = torch.ones(TOKENS)

    def with_sum() -> None:
        weight.addmm_(dy.T, x)
        total.add_(dy.sum(0))

    def with_product() -> None:
        weight.addmm_(dy.T, x)
        total.addmv_(dy.T, ones)

    def without() -> None:
        weight.addmm_(dy.T, x)

    return {"sum, added": with_sum, "accumulating product": with_product, "none": without}


def fused(shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> Ways:
    """Return how a weight's gradient is added to a float32 sum: whole, or inside of the product."""
    total = torch.zeros(shape)
    dy, x = torch.randn(tokens, shape[0], dtype=dtype), torch.randn(tokens, shape[1], dtype=dtype)
    whole: Callable[[], object] = lambda: total.add_(dy.T @ x)  # noqa: E731
    return {"whole, added": whole, "fused": partial(add_product_, total, dy, x)}


def buffers() -> Ways:
    """Return how a window's first microbatch makes its gradients: afresh, or in the last window's memory."""
    torch.manual_seed(0)
    shapes = [each.shape for each in CASES["gpt"].model().parameters() if each.ndim == 2]
    pairs = [(torch.randn(TOKENS, out), torch.randn(TOKENS, width)) for out, width in shapes]
    kept = [torch.zeros(shape) for shape in shapes]

    def afresh() -> None:
        made = [left.T @ right for left, right in pairs]
        del made

    def zeroed() -> None:
        for total, (left, right) in zip(kept, pairs, strict=True):
            total.zero_().addmm_(left.T, right)

    def overwritten() -> None:
        for total, (left, right) in zip(kept, pairs, strict=True):
            torch.mm(left.T, right, out=total)

    return {"made afresh": afresh, "kept, zeroed": zeroed, "kept, written over": overwritten}


def optimizers() -> Ways:
    """Return AdamW's implementations."""

    def stepping(**how: Any) -> Callable[[], object]:
        model = CASES["gpt"].model()
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = AdamW(model.parameters(), lr=1e-4, **how)
        optimizer.step()
        return optimizer.step

    return {"default": stepping(), "foreach=True": stepping(foreach=True), "fused=True": stepping(fused=True)}


def _forget(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.grad = None


def as_markdown(rows: Sequence[Row], record: Mapping[str, Any]) -> str:
    """Return the tables.

    Args:
        rows: What was measured.
        record: On what.

    Returns:
        Markdown.
    """
    lines = [
        "# Decided by measuring",
        "",
        f"`python -m benchmarks.decisions`; {in_words(record['hardware'], record['versions'])}.",
    ]
    for question in dict.fromkeys(row.question for row in rows):
        lines += ["", f"## {question}", "", "| way | time | ratio | allocated |", "|---|---|---|---|"]
        lines += [
            f"| {row.way} | {1000 * row.time.median:.2f} ms ± {row.time.spread / 2:.0%} | {row.ratio.median:.3f} | "
            f"{row.peak_bytes / 2**20:.1f} MiB |"
            for row in rows
            if row.question == question
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decisions", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(flags.threads)
    warm_up_profiler()
    rows = [row for question, ways in questions() for row in compare(question, ways, repeats=flags.repeats)]
    record = {"hardware": hardware("cpu"), "versions": versions(), "threads": flags.threads, "repeats": flags.repeats}
    markdown = as_markdown(rows, record)
    print(markdown)
    record |= {"rows": [asdict(row) for row in rows]}
    write(record, markdown, flags.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
