"""A small residual network for images.

Shapes are name suffixes: B rows, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualNetwork(nn.Module):
    """Tell the class of an image.

    With groups, it normalises over channels of one image at a time, never over the rows of a batch, so the gradient of
    a batch does not depend on how it is cut; with batch normalisation it does.

    Args:
        channels: Colours of an image: 1 or 3.
        classes: Number of classes.
        widths: Channels of each stage; every stage after the first halves height and width. Multiples of 8.
        blocks: Residual blocks of a stage.
        norm: ``"group"`` or ``"batch"``.

    Example:
        >>> import torch
        >>> ResidualNetwork(channels=1, classes=10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        widths: tuple[int, ...] = (32, 64, 128),
        blocks: int = 1,
        norm: Literal["group", "batch"] = "group",
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], kernel_size=3, padding=1, bias=False)
        stages: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stages.append(ResidualBlock(before, width, stride=2 if stage and not block else 1, norm=norm))
                before = width
        self.stages = nn.Sequential(*stages)
        self.norm = _norm(norm, before)
        self.head = nn.Linear(before, classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Score every class.

        Args:
            images_BCHW: Images around 0, about 1 in scale; shape ``(B, C, H, W)``, any height and width from 4 up.

        Returns:
            Logits; shape ``(B, K)``.
        """
        features_BCHW = F.relu(self.norm(self.stages(self.stem(images_BCHW))))
        return self.head(features_BCHW.mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """Add two convolutions, each after a normalisation, to what comes in.

    Args:
        before: Channels that come in; a multiple of 8.
        width: Channels that go out; a multiple of 8.
        stride: 2 halves height and width, 1 keeps them.
        norm: ``"group"`` or ``"batch"``.
    """

    def __init__(self, before: int, width: int, *, stride: int, norm: Literal["group", "batch"] = "group") -> None:
        super().__init__()
        self.norm1 = _norm(norm, before)
        self.conv1 = nn.Conv2d(before, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm2 = _norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        same = stride == 1 and before == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, width, kernel_size=1, stride=stride, bias=False)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """Refine the features of every image.

        Args:
            features_BCHW: Shape ``(B, before, H, W)``.

        Returns:
            Shape ``(B, width, H / stride, W / stride)``, rounded up.
        """
        active_BCHW = F.relu(self.norm1(features_BCHW))
        inner_BCHW = self.conv2(F.relu(self.norm2(self.conv1(active_BCHW))))
        return inner_BCHW + self.shortcut(active_BCHW)


def _norm(kind: Literal["group", "batch"], channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels) if kind == "group" else nn.BatchNorm2d(channels)
