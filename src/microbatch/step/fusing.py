"""What a window fuses: products with its weights, and the loss of a large vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from microbatch.gradients.fused_matmul import Fuse
from microbatch.gradients.gradient_sum import GradientSum
from microbatch.gradients.parameters import Named
from microbatch.loss.tiled_cross_entropy import cross_entropy
from microbatch.memory.scratch import Scratch


def fuse_for(
    named: Sequence[Named],
    gradients: GradientSum,
    *,
    scratch: Scratch,
    keep: Callable[[Tensor], object] | None = None,
) -> Fuse:
    """Make the mode in which a window's microbatches run.

    Args:
        named: Parameters whose gradients may be fused.
        gradients: Where they add up.
        scratch: Memory for logits and their gradient.
        keep: Called with what is kept until the window ends: casts of weights.

    Returns:
        The mode, not entered.
    """

    def place_is_final() -> bool:
        return fuse.final

    stand_in = partial(cross_entropy, place=scratch.places(final=place_is_final))
    stand_ins = {torch.nn.functional.cross_entropy: stand_in}
    fuse = Fuse(named, gradients, stand_ins=stand_ins, empty=scratch.empty, keep=keep)
    return fuse
