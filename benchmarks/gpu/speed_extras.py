"""Further rows: the cost of a size that is searched for, of losses that couple samples, of exact BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import microbatch as mb
from benchmarks import contrastive as pairs
from benchmarks import lockstep
from benchmarks.gpu.exact_proofs import Say, sent
from benchmarks.gpu.here import Here
from benchmarks.gpu.outcome import Numbers
from benchmarks.gpu.speed import Timed, in_turn, made, ours
from benchmarks.summary import summarize, summarize_ratio

WINDOWS = 30  # of a run whose size is searched for
MOST = {"encoded twice": 1.2, "exact": 1.25}  # the goals, of the loop's time


def auto(here: Here, say: Say) -> Numbers:
    """Compare a run whose size is searched for with the windows of the size that is found."""
    it = made(here, "124M", here.size(32, 8))
    sizes: list[int] = []

    def listen(event: object) -> None:
        if isinstance(event, mb.PlanChosen):
            sizes.append(event.microbatch_size)

    window = ours(it, "auto", memory_budget=None, listeners=listen)
    ours(it, 1)()  # libraries' first use, and the optimizer's state
    seconds = [here.seconds(window) for _ in range(WINDOWS)]
    usual = summarize(seconds[len(seconds) // 2 :]).median
    say(windows=len(seconds), **{"usual ms": round(1000 * usual, 2)}, seconds_of_each=seconds)
    return {
        "sizes tried": " ".join(map(str, sizes)),
        "windows lost to the search": round(sum(seconds) / usual - len(seconds), 2),
        "slowest window": f"{max(seconds) / usual:.2f} of the usual",
    }


def contrastive(here: Here, say: Say) -> Numbers:
    """Compare a contrastive loss of the whole batch with a loop whose negatives are each microbatch's own."""
    form, rows, size = here.size((pairs.FORM, 512, 64), (pairs.TINY, 8, 2))
    model = pairs.Towers(**form).to(here.device)
    batch = {"images": torch.randn(rows, 3, 32, 32), "tokens": torch.randint(pairs.VOCABULARY, (rows, pairs.TOKENS))}
    adam = torch.optim.AdamW(model.parameters(), fused=here.cuda)

    def loop(size: int) -> Callable[[], object]:
        def window() -> None:
            for start in range(0, rows, size):
                piece = sent({name: each[start : start + size] for name, each in batch.items()}, model)
                (pairs.loss_of(model, pairs.encode(model, piece)).sum / rows).backward()
            adam.step()
            adam.zero_grad(set_to_none=True)

        return window

    def step(way: str) -> Callable[[], object]:
        one = mb.Accumulator(model, adam, microbatch_size=size, memory_budget="none", coupled=way)
        return lambda: one.step(batch, pairs.loss_of, encode=pairs.encode)

    ways = {"loop": loop(size), "full": loop(rows), "encoded twice": step("twice"), "graphs kept": step("keep")}
    _rows(here, say, in_turn(here, ways, adam, rounds=here.size(7, 2)), about={"rows": rows, "microbatch": size})
    return {}


def batch_norm(here: Here, say: Say) -> Numbers:
    """Compare exact BatchNorm with plain accumulation, at several sizes of images."""
    for side in here.size((64, 224), (32,)):
        rows, size = here.size((64, 8), (4, 2))
        ways, optimizer = _ways(here, side, rows=rows, size=size)
        found = in_turn(here, ways, optimizer, rounds=here.size(7, 2))
        _rows(here, say, found, about={"pixels": side, "rows": rows, "microbatch": size})
        del found, ways, optimizer
        here.clean()
    return {}


def _ways(
    here: Here, side: int, *, rows: int, size: int
) -> tuple[dict[str, Callable[[], object]], torch.optim.Optimizer]:
    model = lockstep.resnet18().to(here.device)
    batch = {"x": torch.randn(rows, 3, side, side), "y": torch.randint(100, (rows,))}
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step(size: int, **options: Any) -> Callable[[], object]:
        one = mb.Accumulator(model, sgd, microbatch_size=size, memory_budget="none", **options)
        return lambda: one.step(batch, lockstep.loss)

    def loop() -> None:
        for start in range(0, rows, size):
            piece = sent({name: each[start : start + size] for name, each in batch.items()}, model)
            (lockstep.loss(model, piece) * (len(piece["x"]) / rows)).backward()
        sgd.step()
        sgd.zero_grad(set_to_none=True)

    ways: dict[str, Callable[[], object]] = {
        "loop": loop,
        "full": step(rows, batch_norm="microbatch"),
        "plain": step(size, batch_norm="microbatch"),
        "exact": step(size, batch_norm="exact"),
    }
    if here.cuda:  # to a file on the CPU
        ways["exact, spilled"] = step(size, batch_norm="exact", offload="activations")
    return ways, sgd


def _rows(here: Here, say: Say, found: Mapping[str, Timed], *, about: Mapping[str, Any]) -> None:
    for name, each in found.items():
        time, ratio = summarize(each.seconds), summarize_ratio(each.seconds, found["loop"].seconds)
        row = {**about, "who": name, "ms": round(1000 * time.median, 2), "±": f"{time.spread / 2:.1%}"}
        row |= {"against loop": round(ratio.median, 3), "peak MiB": round(each.peak / 2**20, 1)}
        if (most := MOST.get(name)) is not None:
            noisy = here.tiny or time.noisy or summarize(found["loop"].seconds).noisy
            verdict = "undecided" if noisy else "met" if ratio.median <= most else "missed"
            row["goal"] = f"{verdict}: loop ≤ {most}"
        say(**row, seconds_of_each=each.seconds)
