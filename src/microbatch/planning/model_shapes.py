"""Build models of the usual shapes from a configuration alone, on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microbatch.errors import ConfigError
from microbatch.kind_words import with_article
from microbatch.loss.loss import LossLike
from microbatch.planning.transformer_layers import Block, Embedding, Head, Patches, Shape, Transformer
from microbatch.planning.unet import UNet

# Decoders with RMS norms, rotary positions and a gated hidden layer.
_GATED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2")
MODEL_TYPES = (*_GATED, "gpt2", "vit", "unet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Hold a model, an example batch and a loss function to plan for; the values of the tensors are never read.

    Attributes:
        name: Name of the model, for the printed plan.
        model: The model, on any device; on ``"meta"`` it takes no memory.
        batch: An example batch, on any device; its rows are repeated as needed.
        loss_fn: As for `Accumulator.step`.
    """

    name: str
    model: nn.Module
    batch: Any
    loss_fn: Callable[[nn.Module, Any], LossLike]


def case_from_config(config: Mapping[str, Any], *, sequence_length: int | None = None, name: str = "") -> Case:
    """Build the model that a configuration describes, on the meta device.

    Args:
        config: The keys of a Transformers configuration; `MODEL_TYPES` lists the supported types. For a U-Net:
            ``{"model_type": "unet", "image_size": 1024, "widths": [64, 128, ...]}``.
        sequence_length: Tokens of a row; by default the model's longest input.
        name: Name of the model; by default its type.

    Returns:
        The case, with one row as its batch.

    Raises:
        ConfigError: The model type is not known, or a key is missing.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ConfigError(f"model_type must be one of {', '.join(MODEL_TYPES)}, not {kind!r}; or pass a model")
    build = {"gpt2": _gpt2, "vit": _vit, "unet": _unet}.get(kind, _gated)
    try:
        with torch.device("meta"):
            model, batch, loss_fn = build(config, sequence_length)
    except KeyError as error:
        raise ConfigError(f"{with_article(kind)} configuration needs the key {error.args[0]!r}") from error
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
    """Compute the mean cross-entropy of the next tokens, in float32.

    Args:
        model: Maps tokens to logits.
        microbatch: ``"tokens"`` of shape ``(B, T)``.

    Returns:
        The mean, in nats.
    """
    tokens = microbatch["tokens"]
    return F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(-1, dims=1).flatten())


def label_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
    """Compute the mean cross-entropy of the images' labels, in float32.

    Args:
        model: Maps images to the scores of every patch.
        microbatch: ``"images"`` and ``"labels"``.

    Returns:
        The mean, in nats.
    """
    return F.cross_entropy(model(microbatch["images"]).mean(1).float(), microbatch["labels"])


def image_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
    """Compute the mean squared error of the images, in float32.

    Args:
        model: Maps images to images.
        microbatch: ``"images"`` and ``"wanted"``.

    Returns:
        The mean.
    """
    return (model(microbatch["images"]).float() - microbatch["wanted"]).square().mean()
