"""What a window fuses: products with its weights, and the loss of a large vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from microbatch.gradients.add import GradientSum, Named
from microbatch.gradients.fuse import Fuse
from microbatch.loss.heads import cross_entropy
from microbatch.memory.scratch import Scratch


def fuse_for(named: Sequence[Named], gradients: GradientSum, *, scratch: Scratch) -> Fuse:
    """Make the mode in which a window's microbatches run.

    Args:
        named: Parameters whose gradients may be fused.
        gradients: Where they add up.
        scratch: Memory for logits and their gradient.

    Returns:
        The mode, not entered.
    """

    def place_is_final() -> bool:
        return fuse.final

    stand_in = partial(cross_entropy, place=scratch.places(final=place_is_final))
    fuse = Fuse(named, gradients, stand_ins={torch.nn.functional.cross_entropy: stand_in}, empty=scratch.empty)
    return fuse
