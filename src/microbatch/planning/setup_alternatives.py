"""List setups that need less memory than a given one, and weigh the changes that they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from microbatch.errors import ConfigError
from microbatch.planning.sharding import OFFLOADS, PRECISIONS, STRATEGIES, Precision, Setup

_LISTED = 6
# Weights of the changes, larger for a less welcome one: an order, not a time.
_COST_OF_STRATEGY: dict[str, int] = dict(zip(STRATEGIES, (0, 1, 2, 3), strict=True))
_COST_OF_OFFLOAD: dict[str | None, int] = dict(zip(OFFLOADS, (0, 5, 8, 12), strict=True))
_COST_OF_PRECISION = {"mixed": 1, "bf16": 4, "bf16-8bit": 5}


def setups_with_less_memory(setup: Setup, *, blocks: bool) -> Iterator[Setup]:
    """List the setups that need less memory, the given one first.

    Args:
        setup: The setup that does not fit.
        blocks: Whether the model has repeated blocks, which can be checkpointed.

    Yields:
        Setups with more sharding, checkpointing, offloading or ranks, or with a smaller precision.
    """
    strategies = STRATEGIES[STRATEGIES.index(setup.strategy) :]
    precisions = [setup.precision, *_smaller(setup.precision)]
    checkpointing = {setup.checkpointing: None} | ({"blocks": None} if blocks else {})
    for strategy, kept, offload, precision, reduce, times in product(
        strategies,
        checkpointing,
        OFFLOADS[OFFLOADS.index(setup.offload) :],
        precisions,
        {setup.reduce: None, "microbatch": None},
        (1, 2, 4, 8),
    ):
        ranks = setup.ranks * times
        if ranks == 1 and strategy != setup.strategy and offload in {None, "optimizer"}:
            continue  # one rank has nothing to shard: the setup would be the same
        try:
            yield replace(
                setup,
                ranks=ranks,
                strategy=strategy,
                checkpointing=kept,
                offload=offload,
                precision=precision,
                reduce=reduce,
            )
        except ConfigError:
            continue


def _smaller(precision: Precision) -> Sequence[Precision]:
    """List the precisions that take fewer bytes."""
    own = precision.bytes, precision.dtype.itemsize
    known = [PRECISIONS[name] for name in _COST_OF_PRECISION]
    return [each for each in known if each.bytes < own[0] or (each.bytes == own[0] and each.dtype.itemsize < own[1])]


def cost_of_changes(setup: Setup, other: Setup) -> tuple[int, ...]:
    """Weigh each change from one setup to another.

    The result is a tuple and not a sum. So a setup that changes less of everything is better whatever the weights are.

    Args:
        setup: The setup that was planned.
        other: The setup to compare it with.

    Returns:
        One weight for each kind of change; 0 where nothing changes.
    """
    return (
        3 * (other.checkpointing != setup.checkpointing),
        _COST_OF_STRATEGY[other.strategy] - _COST_OF_STRATEGY[setup.strategy],
        _COST_OF_OFFLOAD[other.offload] - _COST_OF_OFFLOAD[setup.offload],
        _COST_OF_PRECISION.get(other.precision.name, 0) if other.precision != setup.precision else 0,
        int(other.reduce != setup.reduce),
        10 * (other.ranks // setup.ranks).bit_length() - 10,
    )


def cheapest(found: Sequence[tuple[tuple[int, ...], Setup]]) -> list[tuple[tuple[int, ...], Setup]]:
    """Select the cheapest setups, and drop each one that another setup beats in every kind of change.

    Args:
        found: Setups that fit, each after the weights of its changes.

    Returns:
        At most six of them, cheapest first.
    """
    best = [each for each in found if not any(_dominates(other[0], each[0]) for other in found)]
    return sorted(best, key=lambda each: (sum(each[0]), each[0]))[:_LISTED]


def _dominates(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def changes_between(setup: Setup, other: Setup) -> list[str]:
    """Describe the differences between two setups.

    Args:
        setup: The setup that was planned.
        other: The setup to compare it with.

    Returns:
        One phrase for each difference.
    """
    found = {
        f"{other.ranks} ranks": other.ranks != setup.ranks,
        f"strategy {other.strategy}": other.strategy != setup.strategy,
        f"gradients reduced after each {other.reduce}": other.reduce != setup.reduce,
        "blocks checkpointed (about a third more arithmetic)": other.checkpointing != setup.checkpointing,
        f"{other.precision.name} precision ({other.precision.words})": other.precision != setup.precision,
        f"{other.offload or 'nothing'} on the host": other.offload != setup.offload,
    }
    return [words for words, changed in found.items() if changed]
