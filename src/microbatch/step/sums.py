"""Where a window's gradients add up, as its settings say."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from microbatch.batch.random_masks import derive
from microbatch.gradients.bfloat16_sums import Compensated, NarrowSum, Stochastic
from microbatch.gradients.gradient_sum import GradientSum
from microbatch.gradients.momentum_buffer import Fold, PutAside
from microbatch.step.settings import Settings


def sums_for(settings: Settings, *, seed: int, aside: PutAside, rank: int = 0) -> GradientSum:
    """Make the sums of one window.

    Args:
        settings: The accumulator's.
        seed: Of the window; what is rounded at random is rounded by it.
        aside: Puts an optimizer's state aside while gradients add up in it.
        rank: Which rank this is: the first brings the state, and each rounds by numbers of its own.

    Returns:
        The sums, not opened.
    """
    narrow = None
    if settings.accumulate == "compensated":
        narrow = Compensated
    elif settings.accumulate == "stochastic":
        narrow = partial(_stochastic, dict[torch.device, torch.Generator](), derive(seed, rank))
    rules = zip(settings.optimizers, settings.linear_states, strict=True)
    found = [(optimizer, rule) for optimizer, rule in rules if rule is not None]
    fold = Fold(found, aside, lead=rank == 0) if found else None
    return GradientSum(settings.accumulate_dtype, narrow=narrow, fold=fold)


def _stochastic(generators: dict[torch.device, torch.Generator], seed: int, first: Tensor) -> NarrowSum:
    device = first.device
    if device not in generators:
        generators[device] = torch.Generator(device).manual_seed(seed)
    return Stochastic(first, generators[device])
