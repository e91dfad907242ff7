"""Small smooth networks with batch normalisation: residual, with depthwise convolutions, with skips, and drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Smooth, because a kink that rounding moves a row across is a difference of its own, also in the full batch.
ACTIVATION = nn.SiLU
WIDTH = 4


class Residual(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = convolution(channels, out, stride=stride)
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        same = channels == out and stride == 1
        self.around = nn.Identity() if same else convolution(channels, out, size=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.second(self.first(x)) + self.around(x))


class Inverted(nn.Module):
    """A wide block with a depthwise convolution, and a way around it where the shape stays."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        wide = 3 * channels
        self.inside = nn.Sequential(
            convolution(channels, wide, size=1),
            convolution(wide, wide, stride=stride, groups=wide),
            nn.Conv2d(wide, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.around = channels == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x) if self.around else self.inside(x)


class UNet(nn.Module):
    """Down, up, and across."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.enter = convolution(3, width)
        self.down = convolution(width, 2 * width, stride=2)
        self.bottom = convolution(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.leave = nn.Sequential(convolution(2 * width, width), nn.Conv2d(width, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        across = self.enter(x)
        up = self.up(self.bottom(self.down(across)))
        return self.leave(torch.cat([across, up], 1)).mean((2, 3))


class Twice(nn.Module):
    """A module that is used twice."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self.inside(x))


def convolution(channels: int, out: int, *, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    """Make a convolution, its normalisation, and an activation."""
    inside = nn.Conv2d(channels, out, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(inside, nn.BatchNorm2d(out), ACTIVATION())


def head(positions: int, *, classes: int = 3) -> list[nn.Module]:
    """Make the layers that classify what has so many positions and 4 channels."""
    return [nn.Flatten(), nn.Linear(WIDTH * positions, classes)]


def resnet18(width: int = 4) -> nn.Module:
    """Make a residual network of 18 layers."""
    layers: list[nn.Module] = [convolution(3, width)]
    channels = width
    for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Residual(channels, out, stride), Residual(out, out)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def mobilenet(width: int = 4) -> nn.Module:
    """Make a network of inverted residual blocks."""
    blocks = [Inverted(width, width), Inverted(width, 2 * width, 2), Inverted(2 * width, 2 * width)]
    head = [convolution(2 * width, 8 * width, size=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 4)]
    return nn.Sequential(convolution(3, width, stride=2), *blocks, *head)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "normalised": lambda: convolution(WIDTH, WIDTH),
    "residual": lambda: Residual(WIDTH, WIDTH),
    "inverted": lambda: Inverted(WIDTH, WIDTH),
    "no affine": lambda: nn.BatchNorm2d(WIDTH, affine=False),
    "no tracking": lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False),
    "cumulative": lambda: nn.BatchNorm2d(WIDTH, momentum=None),
    "synchronised": lambda: nn.SyncBatchNorm(WIDTH),
    "twice": lambda: Twice(convolution(WIDTH, WIDTH)),
    "frozen": lambda: nn.BatchNorm2d(WIDTH).eval(),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "tanh": nn.Tanh,
    "relu in place": lambda: nn.Sequential(nn.Softplus(), nn.ReLU(inplace=True)),
}


def drawn(names: Sequence[str]) -> nn.Module:
    """Make a network of these layers; the same name twice is the same layer twice."""
    made = {name: LAYERS[name]() for name in dict.fromkeys(names)}
    inside = [made[name] for name in names]
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), *inside, *head(16), nn.BatchNorm1d(3))


def images(rows: int, *, side: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Draw images and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, side, side, dtype=torch.float64, generator=generator)
    # Rows unlike each other, so that the statistics of a few of them are far from all's.
    scale = torch.rand(rows, 1, 1, 1, dtype=torch.float64, generator=generator) * 2
    shift = torch.randn(rows, 1, 1, 1, dtype=torch.float64, generator=generator)
    return {"x": x * scale + shift, "y": torch.randint(0, 3, (rows,), generator=generator)}


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross-entropy of the labels."""
    return F.cross_entropy(model(batch["x"]), batch["y"])


def double(model: nn.Module) -> nn.Module:
    """Give a model running statistics of some other data, weights unlike 1, and float64."""
    model = model.double()
    with torch.no_grad():
        for index, (name, tensor) in enumerate([*model.named_buffers(), *model.named_parameters()]):
            generator = torch.Generator().manual_seed(index)
            if tensor.is_floating_point() and tensor.dim() == 1:
                spread = torch.rand(tensor.shape, dtype=tensor.dtype, generator=generator)
                tensor.copy_(spread + (0.0 if "mean" in name or "bias" in name else 0.5))
    return model
