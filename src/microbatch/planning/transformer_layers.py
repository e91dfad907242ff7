"""Build the layers of a transformer from its sizes, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Hold the sizes of a transformer.

    Attributes:
        width: Features of a token.
        layers: Number of blocks.
        heads: Number of query heads.
        shared_heads: Number of key and value heads.
        head_width: Features of a head.
        hidden: Features of a block's hidden layer.
        gated: Whether the hidden layer is gated, with RMS norms and rotary positions; otherwise as in GPT-2.
        bias: Whether queries, keys and values have biases.
        causal: Whether a token attends only to itself and to earlier tokens.
    """

    width: int
    layers: int
    heads: int
    shared_heads: int
    head_width: int
    hidden: int
    gated: bool
    bias: bool
    causal: bool


class Norm(nn.Module):
    """Divide features by their root mean square, in float32, as decoders in low precision do.

    Args:
        width: Features of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the features of each token.

        Args:
            x: Shape ``(..., width)``.

        Returns:
            The same shape and dtype.
        """
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled.to(x.dtype)


class Block(nn.Module):
    """Apply attention, then a hidden layer, and add a residual connection around each.

    Args:
        shape: Sizes of the transformer.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        inner, shared = shape.heads * shape.head_width, shape.shared_heads * shape.head_width
        norm = Norm if shape.gated else nn.LayerNorm
        self.attention_norm, self.hidden_norm = norm(shape.width), norm(shape.width)
        self.query = nn.Linear(shape.width, inner, bias=shape.bias)
        self.key = nn.Linear(shape.width, shared, bias=shape.bias)
        self.value = nn.Linear(shape.width, shared, bias=shape.bias)
        self.out = nn.Linear(inner, shape.width, bias=not shape.gated)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False) if shape.gated else None
        self.up = nn.Linear(shape.width, shape.hidden, bias=not shape.gated)
        self.down = nn.Linear(shape.hidden, shape.width, bias=not shape.gated)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block.

        Args:
            x: Shape ``(B, T, width)``.

        Returns:
            The same shape.
        """
        x = x + self._attend(self.attention_norm(x))
        normed = self.hidden_norm(x)
        if self.gate is None:
            return x + self.down(F.gelu(self.up(normed), approximate="tanh"))
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def _attend(self, x: Tensor) -> Tensor:
        shape = self.shape
        q, k, v = (
            layer(x).unflatten(-1, (-1, shape.head_width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if shape.gated:
            q, k = _rotate(q), _rotate(k)
        if (times := shape.heads // shape.shared_heads) > 1:
            k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Head(nn.Module):
    """Normalise the features, then apply one linear layer.

    Args:
        shape: Sizes of the transformer.
        outputs: Number of tokens in the vocabulary, or of classes.
    """

    def __init__(self, shape: Shape, outputs: int) -> None:
        super().__init__()
        self.norm = Norm(shape.width) if shape.gated else nn.LayerNorm(shape.width)
        self.linear = nn.Linear(shape.width, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            x: Shape ``(..., width)``.

        Returns:
            Shape ``(..., outputs)``.
        """
        return self.linear(self.norm(x))


class Embedding(nn.Module):
    """Embed tokens, and add learned position embeddings where the model has no rotary positions.

    Args:
        shape: Sizes of the transformer.
        vocabulary: Number of tokens in the vocabulary.
        length: Number of learned positions; 0 for none.
    """

    def __init__(self, shape: Shape, *, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, shape.width)
        self.positions = nn.Embedding(length, shape.width) if length else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed the tokens.

        Args:
            tokens: Shape ``(B, T)``, int64.

        Returns:
            Shape ``(B, T, width)``.
        """
        x = self.tokens(tokens)
        return x if self.positions is None else x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))


class Patches(nn.Module):
    """Embed the patches of an image, and add learned position embeddings.

    Args:
        width: Features of a patch.
        channels: Channels of the image.
        patch: Side of a patch, in pixels.
        count: Patches of an image.
    """

    def __init__(self, width: int, *, channels: int, patch: int, count: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros(count, width))

    def forward(self, images: Tensor) -> Tensor:
        """Embed the images.

        Args:
            images: Shape ``(B, C, H, W)``.

        Returns:
            Shape ``(B, count, width)``.
        """
        return self.project(images.to(self.positions.dtype)).flatten(2).transpose(1, 2) + self.positions


class Transformer(nn.Module):
    """Run an embedding, the blocks and a head in order.

    Args:
        embed: Maps the input to features.
        blocks: The blocks, in order.
        head: Maps features to logits.
    """

    def __init__(self, embed: nn.Module, *, blocks: list[Block], head: Head) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = embed, nn.ModuleList(blocks), head

    def forward(self, given: Tensor) -> Tensor:
        """Run the model.

        Args:
            given: Tokens of shape ``(B, T)``, or images of shape ``(B, C, H, W)``.

        Returns:
            Logits of every token or patch.
        """
        x = self.embed(given)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _rotate(x: Tensor) -> Tensor:
    """Apply rotary position embedding: rotate pairs of features by an angle that grows with the position."""
    length, width = x.shape[-2:]
    rates = 10_000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.outer(torch.arange(length, device=x.device), rates).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos().to(x.dtype) + torch.cat((-second, first), dim=-1) * angles.sin().to(x.dtype)
