"""Windows of GPTs in bf16: `microbatch` beside the hand-written loop, the full batch and compiled loops, in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb
from benchmarks.gpu.exact_proofs import Say
from benchmarks.gpu.here import Here
from benchmarks.gpu.outcome import NotHereError, Numbers
from benchmarks.models import GPT
from benchmarks.summary import order_of_round, summarize, summarize_ratio
from microbatch.memory.out_of_memory import is_out_of_memory

FORMS = {
    "124M": {"vocabulary": 50_257, "length": 1024, "layers": 12, "heads": 12, "channels": 768},
    "1B": {"vocabulary": 50_257, "length": 1024, "layers": 22, "heads": 16, "channels": 2048},
    "tiny": {"vocabulary": 512, "length": 16, "layers": 1, "heads": 2, "channels": 32},
}
ROWS, ROUNDS = 32, 5
SMALL, AGAINST_LOOP, NEVER, AGAINST_FULL = 8, 0.95, 1.01, 1.03  # the goals
Window = Callable[[], object]


@dataclass(slots=True)
class Timed:
    """One contender's windows.

    Attributes:
        window: Takes one step.
        seconds: Of each window.
        peak: Most bytes on the device, everything included.
        size: Rows of a microbatch in the last window, as its record has them; `None` without a record.
    """

    window: Window
    seconds: list[float] = field(default_factory=list[float])
    peak: int = 0
    size: float | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What all contenders train: one model, one optimizer and one batch, which they share.

    Attributes:
        model: A GPT, which computes in bf16 by autocast.
        optimizer: AdamW.
        tokens: The batch, in pinned memory if the device has such.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tokens: Tensor

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def arithmetic(self) -> float:
        """Floating-point operations of a window's matrix products, forward and backward."""
        blocks: Any = self.model.get_submodule("blocks")
        channels, (rows, length) = self.model.get_parameter("norm.weight").numel(), self.tokens.shape
        weights = sum(
            p.numel() for name, p in self.model.named_parameters() if p.dim() == 2 and "positions" not in name
        )
        return 6.0 * rows * length * (weights + len(blocks) * channels * length)


def token_sum(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the summed cross-entropy of the next tokens, under bf16 autocast."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def made(here: Here, form: str, rows: int, *, weights: torch.dtype = torch.float32) -> Subject:
    """Make a model and a batch.

    Args:
        here: Where.
        form: A key of `FORMS`.
        rows: Rows of the batch.
        weights: Their dtype.

    Raises:
        NotHereError: The device's memory is too small for weights, gradients and the optimizer's state.
    """
    sizes = FORMS["tiny" if here.tiny else form]
    try:
        with here.device:
            model = GPT(**sizes).to(weights)
        # The quickest optimizer that torch has, for everyone.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=here.cuda)
        tokens = torch.randint(sizes["vocabulary"], (rows, sizes["length"]))
    except torch.OutOfMemoryError as error:
        raise NotHereError(f"the device's memory is too small: {str(error)[:200]}") from error
    return Subject(model, optimizer, tokens.pin_memory() if here.cuda else tokens)


def loop(it: Subject, size: int, loss: Callable[[Any, Tensor], Tensor] = token_sum) -> Window:
    """Return the loop that is written by hand, with copies that wait for nothing."""
    count = it.tokens[:, 1:].numel()

    def window() -> None:
        for piece in it.tokens.split(size):
            (loss(it.model, piece.to(it.device, non_blocking=True)) / count).backward()
        it.optimizer.step()
        it.optimizer.zero_grad(set_to_none=True)

    return window


def ours(it: Subject, size: int | str, **options: Any) -> Window:
    """Return the same window by `microbatch`."""
    options = {"memory_budget": "none", **options}
    accumulator = mb.Accumulator(it.model, it.optimizer, microbatch_size=size, **options)

    def loss_fn(model: nn.Module, tokens: Tensor) -> mb.Loss:
        return mb.Loss(sum=token_sum(model, tokens), count=tokens[:, 1:].numel())

    return lambda: accumulator.step(it.tokens, loss_fn)


def in_turn(
    here: Here, windows: dict[str, Window], optimizer: torch.optim.Optimizer, *, rounds: int = ROUNDS, warm: int = 2
) -> dict[str, Timed]:
    """Measure windows in turn, in an order that rotates; who runs out of memory is left out.

    Args:
        here: Where.
        windows: By contender.
        optimizer: Of all of them.
        rounds: How often.
        warm: Windows of each that are not counted; memory is measured in the last of them.

    Returns:
        What was measured, by contender.
    """
    found: dict[str, Timed] = {}
    for name, window in windows.items():
        each = Timed(window)
        try:
            for _ in range(warm - 1):
                each.size = getattr(window(), "microbatch_size", None)
            each.peak = here.held() + here.peak(window)
            found[name] = each
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if name not in found:  # outside of the block, where no traceback holds what the window had
            optimizer.zero_grad(set_to_none=True)
            here.clean()
    for index in range(rounds):
        for name in order_of_round(list(found), index):
            found[name].seconds.append(here.seconds(found[name].window))
    return found


def report(here: Here, say: Say, it: Subject, *, size: int, found: dict[str, Timed], rate: float) -> None:
    """Write a row for each contender at one size, with the goals of ours."""
    for name, each in found.items():
        time = summarize(each.seconds)
        row: dict[str, Any] = {"microbatch": size, "who": name, "ms": round(1000 * time.median, 2)}
        row["±"] = f"{time.spread / 2:.1%}"
        ratios = {
            other: summarize_ratio(each.seconds, found[other].seconds).median
            for other in ("loop", "full")
            if other in found
        }
        row |= {f"against {other}": round(ratio, 3) for other, ratio in ratios.items()}
        row["of matmul"] = f"{it.arithmetic / time.median / rate:.1%}"
        row["peak MiB"] = round(each.peak / 2**20, 1)
        if each.size not in {None, size}:  # memory ended
            row["who"] = f"{name}, in the end {each.size} rows at once"
        if name == "microbatch":
            noisy = here.tiny or any(summarize(found[other].seconds).noisy for other in (name, *ratios))
            row["goal"] = goal(size, ratios, noisy=noisy)
        say(**row, seconds_of_each=each.seconds)


def goal(size: int, ratios: dict[str, float], *, noisy: bool) -> str:
    """Return in words whether the goals of a size are met.

    Args:
        size: Rows of a microbatch.
        ratios: Of a window's time to the loop's and to the full batch's, as far as they were measured.
        noisy: Whether another job was running.

    Example:
        >>> goal(8, {"loop": 0.9, "full": 1.05}, noisy=False)
        'missed: loop ≤ 0.95, full ≤ 1.03'
    """
    most = {"loop": AGAINST_LOOP if size <= SMALL else NEVER} | ({"full": AGAINST_FULL} if size >= SMALL else {})
    wanted = {name: limit for name, limit in most.items() if name in ratios}
    words = ", ".join(f"{name} ≤ {limit}" for name, limit in wanted.items())
    verdict = "met" if all(ratios[name] <= limit for name, limit in wanted.items()) else "missed"
    return f"{'undecided' if noisy else verdict}: {words}"


def gpt(here: Here, say: Say, *, form: str, sizes: Sequence[int], weights: str = "float32") -> Numbers:
    """Measure uncompiled windows of one GPT at several microbatch sizes.

    With weights in bf16, the loops add up in bf16, and `microbatch` in float32: more memory traffic, and a right sum.
    """
    it = made(here, form, here.size(ROWS, 8), weights=getattr(torch, weights))
    rows, rate = len(it.tokens), here.matmul_rate(torch.bfloat16)
    for size in sizes:
        if size > rows:
            continue
        if here.late:
            say(microbatch=size, who="not reached")
            continue
        windows = {"loop": loop(it, size), "microbatch": ours(it, size)}
        if size < rows:
            windows["full"] = loop(it, rows)
        found = in_turn(here, windows, it.optimizer, rounds=here.size(3 if form == "1B" else ROUNDS, 2))
        if size == rows and "loop" in found:
            found["full"] = found["loop"]
        if not {"loop", "microbatch"} <= found.keys():
            say(microbatch=size, who=", ".join(windows.keys() - found.keys()), ms="out of memory")
            continue
        report(here, say, it, size=size, found=found, rate=rate)
    return {
        "parameters": sum(p.numel() for p in it.model.parameters()),
        "rows": rows,
        "tokens a row": it.tokens.shape[1],
    }


def compiled(here: Here, say: Say, *, form: str, sizes: Sequence[int]) -> Numbers:
    """Measure compiled windows beside a compiled loop, and CUDA graphs beside a loop with CUDA graphs."""
    it = made(here, form, here.size(ROWS, 8))
    rate = here.matmul_rate(torch.bfloat16)
    for size in sizes:
        if here.late:
            say(microbatch=size, who="not reached")
            continue
        torch.compiler.reset()
        windows = {
            "loop": loop(it, size, torch.compile(token_sum, dynamic=False) if here.cuda else token_sum),
            "microbatch": ours(it, size, compile=here.cuda),
            "microbatch, uncompiled": ours(it, size),
            "loop, uncompiled": loop(it, size),
        }
        found = in_turn(here, windows, it.optimizer, rounds=here.size(ROUNDS, 2), warm=3)
        if {"loop", "microbatch"} <= found.keys():
            report(here, say, it, size=size, found=found, rate=rate)
    here.rest("compiled loops")
    return {"compiled": "the loss function and the model in it, for each size"}
