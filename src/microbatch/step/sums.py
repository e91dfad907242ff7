"""Create the gradient sums of a window from the options."""

from __future__ import annotations

from microbatch.gradients.bfloat16_sums import Compensated
from microbatch.gradients.gradient_sum import GradientSum
from microbatch.gradients.momentum_buffer import Fold, PutAside
from microbatch.step.options import Options


def sums_for(options: Options, rank: int = 0, *, aside: PutAside) -> GradientSum:
    """Create the gradient sums of one window."""
    rules = () if options.sums.buffer == "own" else zip(options.optimizers, options.linear_states, strict=True)
    found = [(optimizer, rule) for optimizer, rule in rules if rule is not None]
    fold = Fold(found, aside, lead=rank == 0) if found else None
    return GradientSum(options.sums.dtype, narrow=Compensated if options.sums.how == "compensated" else None, fold=fold)
