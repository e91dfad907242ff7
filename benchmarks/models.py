"""The models that are measured: a GPT, a residual network, a vision transformer; plain modules, nothing tuned.

Shapes are name suffixes: B rows, T tokens or patches of a row, C channels, H heads, D channels of a head, V vocabulary,
K classes. Rows never see one another, except through `nn.BatchNorm2d` where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and an MLP, each normalised before and added to the stream.

    Args:
        channels: Width of the stream; a multiple of ``heads``.
        heads: Attention heads.
        causal: Whether a token sees only itself and those before it.
    """

    def __init__(self, channels: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.attention_norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.mlp_norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)

    def forward(self, stream_BTC: Tensor) -> Tensor:
        """Return the stream with what both branches found added."""
        parts_BTC = self.qkv(self.attention_norm(stream_BTC)).chunk(3, dim=-1)
        query, key, value = (part_BTC.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part_BTC in parts_BTC)
        found_BHTD = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        stream_BTC = stream_BTC + self.out(found_BHTD.transpose(1, 2).flatten(2))
        return stream_BTC + self.down(F.gelu(self.up(self.mlp_norm(stream_BTC)), approximate="tanh"))


class GPT(nn.Module):
    """A decoder-only transformer of GPT-2's form: learned positions, one matrix for embedding and head.

    Args:
        vocabulary: Number of different tokens.
        length: Tokens of a row.
        layers: Blocks.
        heads: Attention heads of a block.
        channels: Width.
    """

    def __init__(self, *, vocabulary: int, length: int, layers: int, heads: int, channels: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, channels)
        self.positions = nn.Embedding(length, channels)
        self.blocks = nn.Sequential(*(Block(channels, heads, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits of every next token; shape ``(B, T, V)``."""
        stream_BTC = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        return self.head(self.norm(self.blocks(stream_BTC)))


class Autocast(nn.Module):
    """A model whose forward pass runs under autocast, whoever calls it.

    Args:
        model: The model, in float32.
        dtype: What its products run in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the model returns, in float32."""
        with torch.autocast(inputs.device.type, self.dtype):
            return self.model(inputs).float()


class VisionTransformer(nn.Module):
    """A transformer over the patches of an image, averaged before the head.

    Args:
        size: Height and width of an image, in pixels; a multiple of ``patch``.
        patch: Height and width of a patch, in pixels.
        layers: Blocks.
        heads: Attention heads of a block.
        channels: Width.
        classes: Number of classes.
    """

    def __init__(self, *, size: int, patch: int, layers: int, heads: int, channels: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(torch.randn((size // patch) ** 2, channels) * 0.02)
        self.blocks = nn.Sequential(*(Block(channels, heads, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of every class; shape ``(B, K)``."""
        stream_BTC = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(stream_BTC)).mean(dim=1))


class ResidualBlock(nn.Module):
    """Two convolutions, each normalised after, added to what comes in.

    Args:
        before: Channels that come in.
        width: Channels that go out.
        stride: 2 halves height and width, 1 keeps them.
        norm: Makes the normalisation of so many channels.
    """

    def __init__(self, before: int, width: int, *, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.norm2 = norm(width)
        same = stride == 1 and before == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, width, kernel_size=1, stride=stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the refined features."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(features)))))
        return F.relu(inner + self.shortcut(features))


class ResidualNetwork(nn.Module):
    """A small residual network of ResNet-18's form, two blocks a stage.

    Args:
        widths: Channels of each stage; every stage after the first halves height and width.
        classes: Number of classes.
        norm: ``"group"`` normalises each image alone, ``"batch"`` over the rows that go through at once.
    """

    def __init__(self, *, widths: tuple[int, ...], classes: int, norm: str) -> None:
        super().__init__()

        def make_norm(channels: int) -> nn.Module:
            return nn.GroupNorm(8, channels) if norm == "group" else nn.BatchNorm2d(channels)

        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1, bias=False), make_norm(widths[0]), nn.ReLU())
        blocks: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(2):
                blocks.append(ResidualBlock(before, width, stride=2 if stage and not block else 1, norm=make_norm))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of every class; shape ``(B, K)``."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))
