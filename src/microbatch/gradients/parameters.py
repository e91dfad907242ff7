"""Which parameter it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Named:
    """A trainable parameter and the name that messages call it by."""

    name: str
    parameter: nn.Parameter | Tensor
