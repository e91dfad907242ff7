"""Models of the usual shapes, built from a configuration alone, without memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microbatch.errors import ConfigError
from microbatch.loss.loss import LossLike

# Decoders with root mean square norms, rotated positions and a gated hidden layer.
_GATED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2")
MODEL_TYPES = (*_GATED, "gpt2", "vit", "unet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is to be trained, of which no number is ever read.

    Attributes:
        name: What to call it.
        model: On any device; ``"meta"`` takes no memory.
        batch: An example batch, of which the rows are repeated as needed; on any device.
        loss_fn: As for `Accumulator.step`.
    """

    name: str
    model: nn.Module
    batch: Any
    loss_fn: Callable[[nn.Module, Any], LossLike]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a transformer.

    Attributes:
        width: Features of a token.
        layers: Blocks.
        heads: Heads of queries.
        shared_heads: Heads of keys and values.
        head_width: Features of a head.
        hidden: Features inside a block's second half.
        gated: Whether it is gated, with root mean square norms and rotated positions; else as in GPT-2.
        bias: Whether queries, keys and values have biases.
        causal: Whether a token sees only those before it.
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
    """Divide by the root mean square, in float32, as decoders in low precision do.

    Args:
        width: Features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise.

        Args:
            x: Shape ``(..., width)``.

        Returns:
            The same shape and dtype.
        """
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled.to(x.dtype)


class Block(nn.Module):
    """Attention, then a hidden layer, each beside a residual path.

    Args:
        shape: The sizes.
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
    """Normalise, then one linear layer.

    Args:
        shape: The sizes.
        outputs: Words or classes.
    """

    def __init__(self, shape: Shape, outputs: int) -> None:
        super().__init__()
        self.norm = Norm(shape.width) if shape.gated else nn.LayerNorm(shape.width)
        self.linear = nn.Linear(shape.width, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Score.

        Args:
            x: Shape ``(..., width)``.

        Returns:
            Shape ``(..., outputs)``.
        """
        return self.linear(self.norm(x))


class Embedding(nn.Module):
    """Turn tokens into features, with learned positions where none are rotated in.

    Args:
        shape: The sizes.
        vocabulary: Words.
        length: Learned positions; 0 for none.
    """

    def __init__(self, shape: Shape, *, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, shape.width)
        self.positions = nn.Embedding(length, shape.width) if length else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up.

        Args:
            tokens: Shape ``(B, T)``, int64.

        Returns:
            Shape ``(B, T, width)``.
        """
        x = self.tokens(tokens)
        return x if self.positions is None else x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))


class Patches(nn.Module):
    """Cut an image into patches with learned positions.

    Args:
        width: Features of a patch.
        channels: Of the image.
        patch: Pixels on a side.
        count: Patches of an image.
    """

    def __init__(self, width: int, *, channels: int, patch: int, count: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros(count, width))

    def forward(self, images: Tensor) -> Tensor:
        """Embed.

        Args:
            images: Shape ``(B, C, H, W)``.

        Returns:
            Shape ``(B, count, width)``.
        """
        return self.project(images.to(self.positions.dtype)).flatten(2).transpose(1, 2) + self.positions


class Transformer(nn.Module):
    """What embeds, blocks, and a head.

    Args:
        embed: Turns the input into features.
        blocks: The blocks.
        head: Scores.
    """

    def __init__(self, embed: nn.Module, *, blocks: list[Block], head: Head) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = embed, nn.ModuleList(blocks), head

    def forward(self, given: Tensor) -> Tensor:
        """Run the model.

        Args:
            given: Tokens ``(B, T)`` or images ``(B, C, H, W)``.

        Returns:
            Scores for every token or patch.
        """
        x = self.embed(given)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Convolved(nn.Sequential):
    """Two 3 x 3 convolutions, each normalised over groups of channels.

    Args:
        before: Channels in.
        after: Channels out.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        for channels in (before, after):
            self.append(nn.Conv2d(channels, after, 3, padding=1))
            self.append(nn.GroupNorm(min(32, after), after))
            self.append(nn.SiLU())


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. 2015 (arXiv:1505.04597), with group norms; an image in, an image out.

    Args:
        channels: Of the image.
        widths: Channels at every resolution, each half the one before.
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


def case_from_config(config: Mapping[str, Any], *, sequence_length: int | None = None, name: str = "") -> Case:
    """Build what a configuration describes, on the meta device.

    Args:
        config: The keys of a Transformers configuration; `MODEL_TYPES` says of which types. For a U-Net
            ``{"model_type": "unet", "image_size": 1024, "widths": [64, 128, ...]}``.
        sequence_length: Tokens of a row; by default what the model can read.
        name: What to call it; by default its type.

    Returns:
        The case, with one row as its batch.

    Raises:
        ConfigError: A type that is not known, or a key that is missing.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ConfigError(f"model_type must be one of {', '.join(MODEL_TYPES)}, not {kind!r}; or pass a model")
    build = {"gpt2": _gpt2, "vit": _vit, "unet": _unet}.get(kind, _gated)
    try:
        with torch.device("meta"):
            model, batch, loss_fn = build(config, sequence_length)
    except KeyError as error:
        raise ConfigError(f"a {kind} configuration needs the key {error.args[0]!r}") from error
    return Case(name=name or kind, model=model, batch=batch, loss_fn=loss_fn)


_Built = tuple[nn.Module, dict[str, Tensor], Callable[[nn.Module, Any], LossLike]]


def _gated(config: Mapping[str, Any], length: int | None) -> _Built:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    shape = Shape(
        width=width,
        layers=config["num_hidden_layers"],
        heads=heads,
        shared_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or width // heads,
        hidden=config["intermediate_size"],
        gated=True,
        bias=config["model_type"] == "qwen2" or bool(config.get("attention_bias")),
        causal=True,
    )
    tokens = length or config["max_position_embeddings"]
    embed = Embedding(shape, vocabulary=config["vocab_size"], length=0)
    return _decoder(shape, embed, tied=bool(config.get("tie_word_embeddings", False)), tokens=tokens)


def _gpt2(config: Mapping[str, Any], length: int | None) -> _Built:
    width = config["n_embd"]
    shape = Shape(
        width=width,
        layers=config["n_layer"],
        heads=config["n_head"],
        shared_heads=config["n_head"],
        head_width=width // config["n_head"],
        hidden=config.get("n_inner") or 4 * width,
        gated=False,
        bias=True,
        causal=True,
    )
    positions = config.get("n_positions", 1024)
    embed = Embedding(shape, vocabulary=config["vocab_size"], length=max(positions, length or 0))
    return _decoder(shape, embed, tied=config.get("tie_word_embeddings", True), tokens=length or positions)


def _decoder(shape: Shape, embed: Embedding, *, tied: bool, tokens: int) -> _Built:
    head = Head(shape, embed.tokens.num_embeddings)
    if tied:
        head.linear.weight = embed.tokens.weight
    model = Transformer(embed, blocks=[Block(shape) for _ in range(shape.layers)], head=head)
    return model, {"tokens": torch.zeros(1, tokens, dtype=torch.int64)}, next_token_loss


def _vit(config: Mapping[str, Any], length: int | None) -> _Built:
    del length
    width, heads = config["hidden_size"], config["num_attention_heads"]
    shape = Shape(
        width=width,
        layers=config["num_hidden_layers"],
        heads=heads,
        shared_heads=heads,
        head_width=width // heads,
        hidden=config["intermediate_size"],
        gated=False,
        bias=True,
        causal=False,
    )
    side, channels = config["image_size"], config.get("num_channels", 3)
    count = (side // config["patch_size"]) ** 2
    embed = Patches(width, channels=channels, patch=config["patch_size"], count=count)
    head = Head(shape, config.get("num_labels", 1000))
    model = Transformer(embed, blocks=[Block(shape) for _ in range(shape.layers)], head=head)
    batch = {"images": torch.zeros(1, channels, side, side), "labels": torch.zeros(1, dtype=torch.int64)}
    return model, batch, label_loss


def _unet(config: Mapping[str, Any], length: int | None) -> _Built:
    del length
    channels, side = config.get("num_channels", 3), config["image_size"]
    images = torch.zeros(1, channels, side, side)
    return UNet(channels, list(config["widths"])), {"images": images, "wanted": images.clone()}, image_loss


def next_token_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
    """Average the cross-entropy of the next tokens, in float32.

    Args:
        model: Tokens to logits.
        microbatch: ``"tokens"`` of shape ``(B, T)``.

    Returns:
        The mean, in nats.
    """
    tokens = microbatch["tokens"]
    return F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(-1, dims=1).flatten())


def label_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
    """Average the cross-entropy of an image's label.

    Args:
        model: Images to scores of every patch.
        microbatch: ``"images"`` and ``"labels"``.

    Returns:
        The mean, in nats.
    """
    return F.cross_entropy(model(microbatch["images"]).mean(1).float(), microbatch["labels"])


def image_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
    """Average the squared error of an image.

    Args:
        model: Images to images.
        microbatch: ``"images"`` and ``"wanted"``.

    Returns:
        The mean.
    """
    return (model(microbatch["images"]).float() - microbatch["wanted"]).square().mean()


def _rotate(x: Tensor) -> Tensor:
    """Rotate pairs of features by an angle that grows with the position."""
    length, width = x.shape[-2:]
    rates = 10_000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.outer(torch.arange(length, device=x.device), rates).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos().to(x.dtype) + torch.cat((-second, first), dim=-1) * angles.sin().to(x.dtype)
