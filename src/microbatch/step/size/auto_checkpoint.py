"""Choose the blocks for activation checkpointing that free the most memory for their extra time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from microbatch.batch.batch_tree import map_tensors, rows_of
from microbatch.devices.backend import synchronize
from microbatch.errors import BatchError
from microbatch.memory.meter import MemoryMeter
from microbatch.memory.recompute import blocks_of
from microbatch.memory.signal_errors import suppress_errors
from microbatch.step.options import Options
from microbatch.step.saved_state import Snapshot
from microbatch.step.size.dry_run import dry_run_at
from microbatch.step.size.dry_run_copies import LossFunction, some_rows
from microbatch.step.size.room import room_for
from microbatch.step.size.sizing import Sizing
from microbatch.step.size.timing_search import SAFE

_ROWS = 2
"""Rows for measuring blocks; a single row would run other kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Memory that checkpointing a block frees, and the time it costs.

    Attributes:
        name: Name of the block.
        bytes: Bytes for each row that the block saves for backward, without its inputs and outputs.
        seconds: Seconds of its forward pass for each row; 0 if it was not timed.
    """

    name: str
    bytes: float
    seconds: float


def choose_blocks(options: Options, sizing: Sizing, *, batch: object, loss_fn: LossFunction) -> tuple[str, ...] | None:
    """Choose the blocks for ``checkpoint="auto"``, before the first window.

    Args:
        options: The options of the accumulator.
        sizing: The microbatch size that must fit; while a size is not chosen yet, one row must fit.
        batch: The first batch.
        loss_fn: As for `Accumulator.step`.

    Returns:
        As few blocks as possible, or all if not even they are enough. None of them if memory has no limit, the model
        repeats no blocks, or a dry run fails. `None` if the batch has no rows.

    Cost:
        One window on fake tensors. If that does not fit, more of them for a binary search over the number of blocks,
        and two forward passes of two rows if blocks differ.
    """
    try:
        rows = rows_of(batch)
    except BatchError:
        return None  # the window raises this error, and notifies the other ranks
    if not rows:
        return None
    names, room = blocks_of(options.bare_model), room_for(options, batch)
    if not names or room is None:
        return ()
    size = 1 if sizing.open else min(sizing.most, rows)
    with suppress_errors():  # the real step will raise the error
        found = fewest(options, loss_fn, batch=batch, size=size, budget=round(SAFE * room))
        return tuple(names) if found is None else found
    return ()


def fewest(
    options: Options,
    loss_fn: LossFunction,
    *,
    batch: object,
    size: int,
    budget: int,
    ranked: Sequence[str] | None = None,
) -> tuple[str, ...] | None:
    """Find a small set of blocks with which a microbatch fits.

    This is a greedy solution of a knapsack problem: blocks are sorted by freed bytes for each second, and the first
    ones are taken until the predicted peak is within the budget. Each set has its own dry run, because a block's
    activations are back in memory while it is recomputed.

    Args:
        options: The options of the accumulator, whose own blocks are ignored.
        loss_fn: As for `Accumulator.step`.
        batch: Rows for the dry runs.
        size: Rows of the microbatch.
        budget: Bytes that may be in use.
        ranked: Names of the blocks, the best first; `None` to measure them.

    Returns:
        Names of the blocks, in the model's order; `None` if not even all of them are enough.

    Raises:
        ConfigError: The model, the optimizer or the loss function cannot be copied.

    Cost:
        One window on fake tensors for each set that is tried: at most 3 + log2 of the number of blocks.
    """

    def fits(names: Sequence[str]) -> bool:
        return dry_run_at(replace(options, checkpoint=names), loss_fn, batch=batch, size=size) <= budget

    names = blocks_of(options.bare_model)
    if fits(()):
        return ()
    if ranked is None:
        ranked = [each.name for each in by_worth(weigh(options, loss_fn, batch=batch))]
    # Checkpointing the last block may not help: backward needs its activations immediately.
    enough = next((most for most in (len(ranked) - 1, len(ranked)) if most > 0 and fits(ranked[:most])), None)
    if enough is None:
        return None
    short = 0
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if fits(ranked[:middle]) else (middle, enough)
    return tuple(sorted(ranked[:enough], key=names.index))


def by_worth(weights: Sequence[Weight]) -> list[Weight]:
    """Return blocks by freed bytes for each second, the best first; by bytes alone if a block was not timed.

    Example:
        >>> a, b, c = (Weight(name=n, bytes=s, seconds=t) for n, s, t in [("a", 4, 2), ("b", 9, 3), ("c", 8, 4)])
        >>> [each.name for each in by_worth([a, b, c])]
        ['b', 'a', 'c']
    """
    timed = all(each.seconds > 0 for each in weights)
    # Equal blocks stay in the model's order, because earlier activations wait longer.
    return sorted(weights, key=lambda each: each.bytes / each.seconds if timed else each.bytes, reverse=True)


def weigh(options: Options, loss_fn: LossFunction, *, batch: object) -> list[Weight]:
    """Measure the activations of each block on fake tensors, and its time if blocks differ.

    Args:
        options: The options of the accumulator.
        loss_fn: As for `Accumulator.step`.
        batch: Rows to measure with.

    Returns:
        The weights, in the model's order.

    Raises:
        ConfigError: The model, the optimizer or the loss function cannot be copied.

    Cost:
        One window on fake tensors. If blocks differ in size, two real forward passes of two rows, which restore random
        state and buffers.
    """
    names = blocks_of(options.bare_model)
    kept: dict[str, float] = dict.fromkeys(names, 0.0)

    def watch(model: nn.Module, meter: MemoryMeter) -> ExitStack:
        def note(name: str, grown: float) -> None:
            kept[name] = max(kept[name], grown)

        return _hooked(model, names, read=lambda: meter.live_bytes, note=note)

    plain = replace(options, checkpoint=())
    dry_run_at(plain, loss_fn, batch=batch, size=_ROWS, watch=watch)
    seconds = dict.fromkeys(names, 0.0)
    if len(set(kept.values())) > 1:
        seconds = _timed(options, loss_fn, batch=batch, names=names)
    return [Weight(name=name, bytes=kept[name] / _ROWS, seconds=seconds[name] / _ROWS) for name in names]


def _timed(options: Options, loss_fn: LossFunction, *, batch: object, names: Sequence[str]) -> dict[str, float]:
    """Time real forward passes of each block, and restore random state and buffers."""
    model, device = options.bare_model, options.device
    rows = map_tensors(lambda tensor: tensor.to(device), some_rows(batch, _ROWS))
    fastest = dict.fromkeys(names, float("inf"))

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    def note(name: str, seconds: float) -> None:
        fastest[name] = min(fastest[name], seconds)

    with ExitStack() as stack, torch.no_grad(), _hooked(model, names, read=now, note=note):
        stack.callback(Snapshot(model, device).restore)
        for _ in range(2):  # the first one warms up
            with torch.autocast(device.type, options.autocast, enabled=options.autocast is not None):
                loss_fn(model, rows)
    return {name: 0.0 if seconds == float("inf") else seconds for name, seconds in fastest.items()}


def _hooked(
    model: nn.Module, names: Sequence[str], *, read: Callable[[], float], note: Callable[[str, float], None]
) -> ExitStack:
    """Read a value before and after each block's forward pass; ``note`` gets the difference without outputs."""
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
    return sum(each.numel() * each.element_size() for each in tree_leaves(output) if isinstance(each, Tensor))
