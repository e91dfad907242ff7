"""Schedule the learning rate: linear warm-up, then a cosine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of


def warmup_cosine(step: int, *, steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Compute the learning rate of one optimizer step, as a share of the peak.

    Linear from ``1 / (warmup_steps + 1)`` up to 1, then half a cosine down to ``final_fraction``, which the last step
    reaches.

    Args:
        step: Optimizer steps taken so far; 0 for the first.
        steps: Optimizer steps of the whole run; at least 1.
        warmup_steps: Steps below the peak; 0 or more.
        final_fraction: Share of the peak that is left at the end, in [0, 1].

    Returns:
        A factor in [0, 1].

    Example:
        >>> [round(warmup_cosine(s, steps=6, warmup_steps=1, final_fraction=0.0), 3) for s in range(6)]
        [0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    decay_steps = steps - 1 - warmup_steps
    progress = min(1.0, (step - warmup_steps) / decay_steps) if decay_steps > 0 else 0.0
    return final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate_of(optimizer: Optimizer, group: Mapping[str, Any], *, key: str = "lr") -> float:
    """Read the learning rate of a parameter group.

    Args:
        optimizer: The optimizer.
        group: One of its groups.
        key: ``"initial_lr"`` for the rate without what a scheduler has made of it.

    Returns:
        The rate; at least 0.

    Raises:
        ConfigError: It has none, or it is no number.
    """
    if "lr" not in group:
        raise ConfigError(
            f"the job's optimizer, {kind_of(optimizer)}, has no learning rate: its groups have no 'lr' to set"
        )
    rate = group.get(key, group["lr"])
    try:
        value = float(rate)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ConfigError(
            f"the learning rate of the job's {type(optimizer).__name__} is {rate!r}: it must be a number that can be "
            "scaled; pass lr= to the optimizer"
        )
    return value


def scale_learning_rates(optimizers: Sequence[Optimizer], peak: float) -> None:
    """Set the learning rate of the first parameter group, and scale those of the other groups in proportion.

    Args:
        optimizers: At least one.
        peak: New learning rate of the first optimizer's first group. All groups take it where that rate was 0.
    """
    first = float(optimizers[0].param_groups[0]["lr"])
    if peak == first:
        return
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["lr"] * peak / first if first else peak


def make_schedulers(
    optimizers: Sequence[Optimizer], *, kind: str, steps: int, warmup_steps: int, final_fraction: float = 0.1
) -> list[LambdaLR]:
    """Make one scheduler for each optimizer.

    Step each scheduler once for every optimizer step that was applied, whatever the number of microbatches. The length
    of the run is not in a scheduler's state. So a run that is resumed with more steps follows the longer curve.

    Args:
        optimizers: The optimizers; their current learning rates are the peak.
        kind: ``"cosine"``, or ``"constant"`` after the warm-up.
        steps: Optimizer steps of the whole run; at least 1.
        warmup_steps: Steps of linear warm-up; 0 or more.
        final_fraction: Share of the peak that a cosine ends at, in [0, 1].

    Returns:
        The schedulers, with the first step's learning rates already set.
    """
    floor = final_fraction if kind == "cosine" else 1.0

    def factor(step: int) -> float:
        return warmup_cosine(step, steps=steps, warmup_steps=warmup_steps, final_fraction=floor)

    return [LambdaLR(optimizer, factor) for optimizer in optimizers]
