"""Which blocks to compute again in backward so that a microbatch fits: those that free most bytes for a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from microbatch.batch.batch_tree import map_tensors, rows_of
from microbatch.memory.meter import MemoryMeter
from microbatch.memory.recompute import blocks_of
from microbatch.step.dry_run import rehearse_once
from microbatch.step.dry_run_copies import LossFunction, some_rows
from microbatch.step.foresee import room_for
from microbatch.step.saved_state import Snapshot
from microbatch.step.settings import Settings
from microbatch.step.sizing import Sizing
from microbatch.step.tune import SAFE

_ROWS = 2
"""Rows that blocks are weighed with; one row takes kernels of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """What computing a block again frees, and what it costs.

    Attributes:
        name: The block.
        bytes: Bytes of a row that it keeps for backward, besides its inputs and outputs.
        seconds: Seconds that its forward pass takes for a row; 0 where it was not timed.
    """

    name: str
    bytes: float
    seconds: float


def relieve(settings: Settings, sizing: Sizing, *, batch: object, loss_fn: LossFunction) -> tuple[str, ...] | None:
    """Choose the blocks for ``checkpoint="auto"``, before the first window.

    Args:
        settings: The accumulator's.
        sizing: The size that is to fit; one row where a size has still to be found.
        batch: The first batch.
        loss_fn: As for `Accumulator.step`.

    Returns:
        As few as are needed, and all where not even they are enough; none where nothing limits the memory, the model
        repeats no blocks, or nothing can be rehearsed. `None` before there is a batch to choose by.

    Cost:
        A fake window; where that does not fit, as many more as halving the number of blocks takes, and two forward
        passes of two rows where blocks differ.
    """
    rows = rows_of(batch)
    if not rows:
        return None
    names, room = blocks_of(settings.bare_model), room_for(settings, batch)
    if not names or room is None:
        return ()
    size = 1 if sizing.open else min(sizing.most, rows)
    try:
        found = fewest(settings, loss_fn, batch=batch, size=size, budget=round(SAFE * room))
    except Exception:  # noqa: BLE001 - what is wrong shows in the real step
        return ()
    return tuple(names) if found is None else found


def fewest(
    settings: Settings,
    loss_fn: LossFunction,
    *,
    batch: object,
    size: int,
    budget: int,
    ranked: Sequence[str] | None = None,
) -> tuple[str, ...] | None:
    """Find a small set of blocks with which a microbatch fits.

    Blocks are taken by the bytes that they free for a second, the best first, until the predicted peak is within the
    budget: the greedy answer to a knapsack. Each set is rehearsed, since what a block keeps is back while it is
    computed again.

    Args:
        settings: The accumulator's; its own blocks are passed over.
        loss_fn: As for `Accumulator.step`.
        batch: Rows to rehearse with.
        size: Rows of the microbatch.
        budget: Bytes that may be in use.
        ranked: Blocks, the best first; `None` to weigh them.

    Returns:
        Their names, in the model's order; `None` if not even all of them are enough.

    Raises:
        ConfigError: Something cannot be copied.

    Cost:
        A fake window for each set that is tried: at most 3 + log2 of the number of blocks.
    """

    def fits(names: Sequence[str]) -> bool:
        return rehearse_once(replace(settings, checkpoint=names), loss_fn, batch=batch, size=size) <= budget

    names = blocks_of(settings.bare_model)
    if fits(()):
        return ()
    if ranked is None:
        ranked = [each.name for each in by_worth(weigh(settings, loss_fn, batch=batch))]
    # The last block's activations are needed as soon as they are gone: to compute it again may help nothing.
    enough = next((most for most in (len(ranked) - 1, len(ranked)) if most > 0 and fits(ranked[:most])), None)
    if enough is None:
        return None
    short = 0
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if fits(ranked[:middle]) else (middle, enough)
    return tuple(sorted(ranked[:enough], key=names.index))


def by_worth(weights: Sequence[Weight]) -> list[Weight]:
    """Sort blocks by what they free for a second, the best first.

    Args:
        weights: In the model's order.

    Returns:
        The same; of equal ones the earlier first, whose bytes wait longest. Where any was not timed, by bytes alone.

    Example:
        >>> a, b, c = (Weight(name=n, bytes=s, seconds=t) for n, s, t in [("a", 4, 2), ("b", 9, 3), ("c", 8, 4)])
        >>> [each.name for each in by_worth([a, b, c])]
        ['b', 'a', 'c']
    """
    timed = all(each.seconds > 0 for each in weights)
    return sorted(weights, key=lambda each: each.bytes / each.seconds if timed else each.bytes, reverse=True)


def weigh(settings: Settings, loss_fn: LossFunction, *, batch: object) -> list[Weight]:
    """Measure what each block keeps for backward, on fake copies, and, where they differ, how long it takes.

    Args:
        settings: The accumulator's.
        loss_fn: As for `Accumulator.step`.
        batch: Rows to measure with.

    Returns:
        The weights, in the model's order.

    Raises:
        ConfigError: Something cannot be copied.

    Cost:
        A fake window; where blocks keep different amounts, two forward passes of two rows, after which random state
        and buffers are as before.
    """
    names = blocks_of(settings.bare_model)
    kept: dict[str, float] = dict.fromkeys(names, 0.0)

    def watch(model: nn.Module, meter: MemoryMeter) -> ExitStack:
        return _hooked(model, names, read=lambda: meter.live_bytes, note=lambda name, grown: _more(kept, name, grown))

    plain = replace(settings, checkpoint=())
    rehearse_once(plain, loss_fn, batch=batch, size=_ROWS, watch=watch)
    seconds = dict.fromkeys(names, 0.0)
    if len(set(kept.values())) > 1:
        seconds = _timed(settings, loss_fn, batch=batch, names=names)
    return [Weight(name=name, bytes=kept[name] / _ROWS, seconds=seconds[name] / _ROWS) for name in names]


def _more(kept: dict[str, float], name: str, grown: float) -> None:
    kept[name] = max(kept[name], grown)


def _timed(settings: Settings, loss_fn: LossFunction, *, batch: object, names: Sequence[str]) -> dict[str, float]:
    """Run forward passes on the model itself, and put back what they change."""
    model, device = settings.bare_model, settings.device
    rows = map_tensors(lambda tensor: tensor.to(device), some_rows(batch, _ROWS))
    fastest = dict.fromkeys(names, float("inf"))

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def note(name: str, seconds: float) -> None:
        fastest[name] = min(fastest[name], seconds)

    with _put_back(model, device), torch.no_grad(), _hooked(model, names, read=now, note=note):
        for _ in range(2):  # the first one warms up
            with torch.autocast(device.type, settings.autocast, enabled=settings.autocast is not None):
                loss_fn(model, rows)
    return {name: 0.0 if seconds == float("inf") else seconds for name, seconds in fastest.items()}


@contextmanager
def _put_back(model: nn.Module, device: torch.device) -> Generator[None]:
    snapshot = Snapshot(model, device)
    try:
        yield
    finally:
        snapshot.restore()


def _hooked(
    model: nn.Module, names: Sequence[str], *, read: Callable[[], float], note: Callable[[str, float], None]
) -> ExitStack:
    """Read something before and after each block's forward pass, and note by how much it grew, outputs left out."""
    before: dict[str, float] = {}
    with ExitStack() as stack:
        for name in names:
            block = model.get_submodule(name)

            def enter(*_: Any, name: str = name) -> None:
                before[name] = read()

            def leave(_: Any, __: Any, output: Any, name: str = name) -> None:
                grown = read() - before[name]
                note(name, grown - (_bytes_of(output) if isinstance(grown, int) else 0))

            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        return stack.pop_all()


def _bytes_of(output: Any) -> int:
    tensors = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
    return sum(each.numel() * each.element_size() for each in tensors)
