"""The results of a window, after all ranks have met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)  # not frozen: many fields, made for every window
class Met:
    """Results of a window over all ranks: sums and counts of the loss, and the gradient's norm.

    Attributes:
        names: Names of the loss's terms.
        sums: Sum of each term, on the host.
        counts: Count of each term.
        samples: Rows of the effective batch.
        dtype: The dtype in which the loss is reported.
        norm: Norm of the accumulated gradient, on the device; shape ``()``.
        host_norm: The value of ``norm`` on the host.
        normalized: Whether the gradient is already divided by the count.
        present: For each parameter, whether any rank has a gradient; empty for a single process.
        metrics: Sum of each metric, by name, on the device.
    """

    names: Sequence[str]
    sums: Sequence[float]
    counts: Mapping[str, float]
    samples: float
    dtype: torch.dtype
    norm: Tensor
    host_norm: float
    normalized: bool
    present: Sequence[bool]
    metrics: Mapping[str, Tensor]

    @property
    def finite(self) -> bool:
        """Whether the loss and the gradient are finite."""
        return all(map(math.isfinite, (self.host_norm, *self.sums)))
