"""Build a U-Net from its channels, on any device."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Convolved(nn.Sequential):
    """Apply two 3 x 3 convolutions, each with a group norm and an activation.

    Args:
        before: Channels of the input.
        after: Channels of the output.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        for channels in (before, after):
            self.append(nn.Conv2d(channels, after, 3, padding=1))
            self.append(nn.GroupNorm(min(32, after), after))
            self.append(nn.SiLU())


class UNet(nn.Module):
    """Map an image to an image with the U-Net of Ronneberger et al. 2015 (arXiv:1505.04597), with group norms.

    Args:
        channels: Channels of the image.
        widths: Channels at every resolution, each half the resolution before.
    """

    def __init__(self, channels: int, widths: list[int]) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.first = Convolved(channels, widths[0])
        self.down = nn.ModuleList([Convolved(wide, wider) for wide, wider in pairs])
        self.up = nn.ModuleList([nn.ConvTranspose2d(wider, wide, 2, stride=2) for wide, wider in reversed(pairs)])
        self.join = nn.ModuleList([Convolved(2 * wide, wide) for wide, _ in reversed(pairs)])
        self.last = nn.Conv2d(widths[0], channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Run the model.

        Args:
            images: Shape ``(B, C, H, W)``.

        Returns:
            The same shape.
        """
        levels = [self.first(images.to(self.last.weight.dtype))]
        for down in self.down:
            levels.append(down(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([levels.pop(), up(x)], dim=1))
        return self.last(x)
