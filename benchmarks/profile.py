"""Where the time of a window goes: every operator's share, and how near its products come to the machine's best.

::

    python -m benchmarks.profile --case gpt --microbatch-size 1 4      half a minute on two cores
    python -m benchmarks.profile --case gpt --microbatch-size 4 --out /tmp/profile
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import CASES
from benchmarks.contenders import loop, make_subject, microbatch
from benchmarks.machine import hardware, in_words, matmul_flops_per_second, versions
from benchmarks.report import write

RESULTS = Path(__file__).parent / "results" / "profile"
CONTENDERS = {"loop": loop, "microbatch": microbatch}
PRODUCTS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}
"""Operators that multiply, and which of their arguments are the factors."""
KINDS = {
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm"),
    "convolutions": ("convolution",),
    "attention": ("attention",),
    "loss": ("softmax", "nll_loss", "gather", "scatter", "amax"),
    "normalisation": ("norm",),
    "activation": ("gelu", "relu"),
    "gradients made and added": ("aten::add_", "aten::fill_", "aten::zero_", "index_add", "embedding", "aten::sum"),
    "optimizer": ("addcdiv", "addcmul", "lerp", "sqrt", "_fused_", "_foreach_", "aten::div", "aten::mul_"),
    "copies and casts": ("copy_", "aten::cat"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One kind of operator in one contender's window.

    Attributes:
        case: A key of `CASES`.
        microbatch_size: Rows that went through at once.
        contender: Who.
        kind: A key of `KINDS`, or ``"the rest"``.
        seconds: In the kernels of that kind, in one window.
        share: Of the window's seconds in kernels.
        of_matmul: For products, their speed over that of one large product; 0 for everything else.
    """

    case: str
    microbatch_size: int
    contender: str
    kind: str
    seconds: float
    share: float
    of_matmul: float


def shares(case: str, microbatch_size: int, contender: str) -> list[Share]:
    """Profile one window, after two that warm up.

    Args:
        case: A key of `CASES`.
        microbatch_size: Rows that go through at once.
        contender: A key of `CONTENDERS`.

    Returns:
        A share for each kind of operator that took part, the largest first.
    """
    window = CONTENDERS[contender](make_subject(case, microbatch_size, device="cpu"))
    for _ in range(2):
        window(nullcontext())
    best = matmul_flops_per_second(torch.device("cpu"), CASES[case].precision)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        window(nullcontext())
    seconds: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages(group_by_input_shape=True):
        kind = _kind(event.key)
        seconds[kind] += event.self_cpu_time_total / 1e6
        flops[kind] += event.count * _flops(event)
    total = sum(seconds.values())
    return [
        Share(
            case=case,
            microbatch_size=microbatch_size,
            contender=contender,
            kind=kind,
            seconds=taken,
            share=taken / total,
            of_matmul=flops[kind] / taken / best,
        )
        for kind, taken in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, print and write.

    Args:
        arguments: Those of the command line; `None` takes the process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--case", choices=list(CASES), default="gpt")
    parser.add_argument("--microbatch-size", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write, without suffix")
    chosen = parser.parse_args(arguments)
    found = [
        share for size in chosen.microbatch_size for name in CONTENDERS for share in shares(chosen.case, size, name)
    ]
    text = table(found)
    print(text)
    record: dict[str, Any] = {"hardware": hardware("cpu"), "versions": versions(), "shares": [asdict(s) for s in found]}
    write(record, text, chosen.out)
    return 0


def table(found: Sequence[Share]) -> str:
    """Write the shares as Markdown.

    Args:
        found: Of one case.

    Returns:
        The page.
    """
    machine = in_words(hardware("cpu"), versions())
    lines = ["# Where the time goes", "", f"`python -m benchmarks.profile --case {found[0].case}`; {machine}.", ""]
    lines += ["| microbatch | contender | kind | seconds | share | of matmul |", "|---|---|---|---|---|---|"]
    for each in found:
        if each.share >= 0.005:
            speed = f"{each.of_matmul:.0%}" if each.of_matmul else ""
            lines.append(
                f"| {each.microbatch_size} | {each.contender} | {each.kind} | {each.seconds:.3f} | {each.share:.1%} | "
                f"{speed} |"
            )
    return "\n".join(lines) + "\n"


def _kind(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "the rest")


def _flops(event: Any) -> float:
    """Count a product's arithmetic from its factors' shapes."""
    if event.key not in PRODUCTS:
        return 0
    left, right = (event.input_shapes[at] for at in PRODUCTS[event.key])
    rows = 1
    for length in left:
        rows *= length
    return 2 * rows * right[-1]


if __name__ == "__main__":
    raise SystemExit(main())
