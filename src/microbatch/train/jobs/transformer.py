"""A small decoder-only transformer.

Shapes are name suffixes: B rows, T tokens of a row, C channels, H heads, D channels of a head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Say how large a transformer is.

    Attributes:
        vocabulary: Number of different tokens.
        length: Most tokens of a row.
        layers: Blocks of attention and MLP.
        heads: Attention heads of a block.
        channels: Width; a multiple of twice ``heads``, because positions turn pairs of channels.
    """

    vocabulary: int
    length: int = 256
    layers: int = 4
    heads: int = 4
    channels: int = 192


class Transformer(nn.Module):
    """Predict every next token of a row from the tokens up to it.

    Normalisation before each sub-layer, rotary positions, no biases, and one matrix for reading tokens and for
    scoring them. Rows are independent of one another and of the padding on their right, so the gradient of a batch
    does not depend on how it is cut.

    Example:
        >>> model = Transformer(Shape(vocabulary=50, layers=1, heads=2, channels=8))
        >>> model(torch.zeros(3, 7, dtype=torch.long)).shape
        torch.Size([3, 7, 50])
    """

    cos_TD: Tensor
    sin_TD: Tensor

    def __init__(self, shape: Shape) -> None:
        """Make the layers and draw their weights from PyTorch's random state.

        Args:
            shape: How large the model is.
        """
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocabulary, shape.channels)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.channels, bias=False)
        self.head = nn.Linear(shape.channels, shape.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        cos_TD, sin_TD = _rotations(shape)
        self.register_buffer("cos_TD", cos_TD, persistent=False)
        self.register_buffer("sin_TD", sin_TD, persistent=False)
        self._draw_weights()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Score every token of the vocabulary as the next one, at every position.

        Args:
            tokens_BT: Token numbers; shape ``(B, T)``, int64, ``T`` at most ``shape.length``.

        Returns:
            Logits; shape ``(B, T, V)``, in the weights' dtype or autocast's.
        """
        length = tokens_BT.shape[1]
        cos_TD, sin_TD = self.cos_TD[:length], self.sin_TD[:length]
        stream_BTC = self.tokens(tokens_BT)
        for block in self.blocks:
            stream_BTC = block(stream_BTC, cos_TD, sin_TD)
        return self.head(self.norm(stream_BTC))

    def _draw_weights(self) -> None:
        """Draw every matrix so that the stream keeps its scale from the first layer to the last."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            ends_a_branch = name.endswith(("attention.out.weight", "mlp.down.weight"))
            scale = 0.02 / math.sqrt(2 * self.shape.layers) if ends_a_branch else 0.02
            nn.init.normal_(parameter, std=scale)


class Block(nn.Module):
    """Attend, then compute; each adds to the stream."""

    def __init__(self, shape: Shape) -> None:
        """Make the two branches.

        Args:
            shape: How large the model is.
        """
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.channels, bias=False)
        self.attention = Attention(shape)
        self.mlp_norm = nn.LayerNorm(shape.channels, bias=False)
        self.mlp = MLP(shape)

    def forward(self, stream_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        """Add what both branches find to the stream.

        Args:
            stream_BTC: The stream; shape ``(B, T, C)``.
            cos_TD: Cosines of the positions' angles; shape ``(T, D)``.
            sin_TD: Sines of the same.

        Returns:
            The new stream; shape ``(B, T, C)``.
        """
        stream_BTC = stream_BTC + self.attention(self.attention_norm(stream_BTC), cos_TD, sin_TD)
        return stream_BTC + self.mlp(self.mlp_norm(stream_BTC))


class Attention(nn.Module):
    """Causal attention of several heads."""

    def __init__(self, shape: Shape) -> None:
        """Make the projections.

        Args:
            shape: How large the model is.
        """
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.channels, 3 * shape.channels, bias=False)
        self.out = nn.Linear(shape.channels, shape.channels, bias=False)

    def forward(self, stream_BTC: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        """Gather from every token the earlier ones that matter to it.

        Args:
            stream_BTC: Normalised stream; shape ``(B, T, C)``.
            cos_TD: Cosines of the positions' angles; shape ``(T, D)``.
            sin_TD: Sines of the same.

        Returns:
            What to add to the stream; shape ``(B, T, C)``.
        """
        qkv_BTC = self.qkv(stream_BTC)
        query_BHTD, key_BHTD, value_BHTD = (
            part_BTC.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part_BTC in qkv_BTC.chunk(3, dim=-1)
        )
        found_BHTD = F.scaled_dot_product_attention(
            _rotate(query_BHTD, cos_TD, sin_TD), _rotate(key_BHTD, cos_TD, sin_TD), value_BHTD, is_causal=True
        )
        return self.out(found_BHTD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two matrices with a GELU between them, four times as wide inside."""

    def __init__(self, shape: Shape) -> None:
        """Make the two matrices.

        Args:
            shape: How large the model is.
        """
        super().__init__()
        self.up = nn.Linear(shape.channels, 4 * shape.channels, bias=False)
        self.down = nn.Linear(4 * shape.channels, shape.channels, bias=False)

    def forward(self, stream_BTC: Tensor) -> Tensor:
        """Compute on every token alone.

        Args:
            stream_BTC: Normalised stream; shape ``(B, T, C)``.

        Returns:
            What to add to the stream; shape ``(B, T, C)``.
        """
        return self.down(F.gelu(self.up(stream_BTC), approximate="tanh"))


def _rotations(shape: Shape) -> tuple[Tensor, Tensor]:
    """Tabulate the rotary angles: each pair of channels turns at a speed of its own."""
    half = shape.channels // shape.heads // 2
    speed_D = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle_TD = torch.outer(torch.arange(shape.length, dtype=torch.float64), speed_D).repeat(1, 2)
    return angle_TD.cos().float(), angle_TD.sin().float()


def _rotate(heads_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn pairs of channels (the first half with the second) by the angle of their position."""
    first, second = heads_BHTD.chunk(2, dim=-1)
    turned_BHTD = heads_BHTD * cos_TD + torch.cat((-second, first), dim=-1) * sin_TD
    return turned_BHTD.to(heads_BHTD.dtype)
