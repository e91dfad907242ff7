"""Small models of many kinds, each with its loss, a batch and the blocks that are worth a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.models import GPT, ResidualNetwork, VisionTransformer

CLASSES, VOCABULARY = 100, 8192


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of model.

    Attributes:
        make: Makes the model.
        batch: Makes a batch of so many rows.
        loss_fn: As for `Accumulator.step`.
        blocks: Paths of the modules that are checkpointed, where that is asked for.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    blocks: Sequence[str]


class Checkpointed(nn.Module):
    """A module that computes its activations again in backward.

    Args:
        inner: The module.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module: torch's own transformer reads those of its layers."""
        return super().__getattr__(name) if name in {"inner", "training"} else getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        return checkpoint(self.inner, *args, use_reentrant=False, **kwargs)


def made(kind: Kind, *, checkpointed: bool) -> nn.Module:
    """Make a model, with its blocks checkpointed or not.

    Args:
        kind: Which.
        checkpointed: Whether to checkpoint its blocks.
    """
    torch.manual_seed(0)
    model = kind.make()
    for path in kind.blocks if checkpointed else ():
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        holder._modules[name] = Checkpointed(model.get_submodule(path))  # pyright: ignore[reportPrivateUsage]
    return model


# -- models -----------------------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """MobileNet's block: widen, a convolution of each channel alone, narrow."""

    def __init__(self, width: int, *, widen: int) -> None:
        super().__init__()
        inner = width * widen
        self.layers = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.Hardswish(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.Hardswish(),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined features."""
        return x + self.layers(x)


def mobilenet() -> nn.Module:
    """Make a small network of MobileNet's form."""
    stem = nn.Sequential(nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.Hardswish())
    blocks = nn.Sequential(*(InvertedResidual(24, widen=4) for _ in range(4)))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES))


class UNet(nn.Module):
    """Two steps down, two steps up, with what was on the way down beside what comes up."""

    def __init__(self) -> None:
        super().__init__()

        def double(before: int, width: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(before, width, 3, padding=1),
                nn.GroupNorm(4, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(4, width),
                nn.SiLU(),
            )

        self.down = nn.ModuleList([double(3, 16), double(16, 32)])
        self.middle = double(32, 64)
        self.raise_ = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, stride=2), nn.ConvTranspose2d(32, 16, 2, stride=2)])
        self.up = nn.ModuleList([double(64, 32), double(32, 16)])
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return an image of the same size."""
        kept: list[Tensor] = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for widen, block in zip(self.raise_, self.up, strict=True):
            x = block(torch.cat([widen(x), kept.pop()], dim=1))
        return self.out(x)


class Recurrent(nn.Module):
    """Embedding, two LSTM layers, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY // 8, 96)
        self.layers = nn.LSTM(96, 128, num_layers=2, batch_first=True)
        self.head = nn.Linear(128, VOCABULARY // 8)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of every next token."""
        return self.head(self.layers(self.tokens(ids))[0])


class Pair(nn.Module):
    """Two encoders whose outputs are compared, every row with every other."""

    def __init__(self) -> None:
        super().__init__()

        def encoder(width: int) -> nn.Module:
            return nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.LayerNorm(512), nn.Linear(512, 64))

        self.left, self.right = encoder(192), encoder(96)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the similarities, rows by rows."""
        return self.scale.exp() * F.normalize(self.left(left)) @ F.normalize(self.right(right)).T


def mlp() -> nn.Module:
    """Make a perceptron."""
    widths = [256, 1024, 1024, 512]
    layers = [nn.Sequential(nn.Linear(a, b), nn.GELU(), nn.Dropout(0.1)) for a, b in pairwise(widths)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def llama() -> nn.Module:
    """Make a small Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    """Make a small BERT."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY // 2,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    return BertForMaskedLM(config)


class Mix(nn.Module):
    """Mixer's block: a perceptron over the patches, then one over the channels."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(channels), nn.LayerNorm(channels)])
        self.across = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.along = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream with what both found added."""
        x = x + self.across(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norms[1](x))


class Mixer(nn.Module):
    """Perceptrons over the patches of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 128, 4, stride=4)
        self.blocks = nn.Sequential(*(Mix(64, 128) for _ in range(3)))
        self.head = nn.Linear(128, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of every class."""
        return self.head(self.blocks(self.patches(images).flatten(2).transpose(1, 2)).mean(dim=1))


def t5() -> nn.Module:
    """Make a small T5."""
    from transformers import T5Config, T5ForConditionalGeneration

    config: Any = T5Config(
        vocab_size=VOCABULARY,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        use_cache=False,
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def convnext() -> nn.Module:
    """Make a small ConvNeXt."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config: Any = ConvNextConfig(num_stages=2, depths=[2, 2], hidden_sizes=[32, 64], drop_path_rate=0.1, image_size=64)
    config.num_labels = CLASSES
    return ConvNextForImageClassification(config)


def mixtral() -> nn.Module:
    """Make a small Mixtral, whose tokens choose their experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
    )
    return MixtralForCausalLM(config)


# -- losses -----------------------------------------------------------------------------------------------------------


def next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of every next token."""
    out = model(batch["ids"][:, :-1])
    logits = getattr(out, "logits", out)
    return F.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 1:].flatten())


def translate(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the tokens again, from the first half the second."""
    half = batch["ids"].shape[1] // 2
    return model(input_ids=batch["ids"][:, :half], labels=batch["ids"][:, half:].contiguous()).loss


def classify(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of a class."""
    out = model(batch["x"])
    return F.cross_entropy(getattr(out, "logits", out), batch["label"])


def masked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of every token, with padding left out of the attention."""
    logits = model(batch["ids"], attention_mask=batch["mask"]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["ids"].flatten())


def restore(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean squared error of an image."""
    return F.mse_loss(model(batch["x"]), batch["x"])


def contrast(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy of each row's own partner, both ways."""
    likeness = model(batch["left"], batch["right"])
    own = torch.arange(len(likeness), device=likeness.device)
    return F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)


# -- batches ----------------------------------------------------------------------------------------------------------


def tokens(rows: int, *, length: int = 65, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Return token ids."""
    return {"ids": torch.randint(vocabulary, (rows, length))}


def padded(rows: int) -> dict[str, Tensor]:
    """Return token ids with a mask."""
    mask = torch.arange(64) < torch.randint(32, 65, (rows, 1))
    return {**tokens(rows, length=64, vocabulary=VOCABULARY // 2), "mask": mask.long()}


def images(rows: int, *, size: int = 32) -> dict[str, Tensor]:
    """Return images with their class."""
    return {"x": torch.randn(rows, 3, size, size), "label": torch.randint(CLASSES, (rows,))}


def vectors(rows: int) -> dict[str, Tensor]:
    """Return vectors with their class."""
    return {"x": torch.randn(rows, 256), "label": torch.randint(CLASSES, (rows,))}


def pairs(rows: int) -> dict[str, Tensor]:
    """Return pairs of vectors."""
    return {"left": torch.randn(rows, 192), "right": torch.randn(rows, 96)}


KINDS = {
    "GPT": Kind(
        lambda: GPT(vocabulary=VOCABULARY, length=64, layers=3, heads=4, channels=128),
        tokens,
        next_token,
        ["blocks.0", "blocks.1", "blocks.2"],
    ),
    "Llama": Kind(llama, tokens, next_token, [f"model.layers.{i}" for i in range(3)]),
    "BERT": Kind(bert, padded, masked, [f"bert.encoder.layer.{i}" for i in range(3)]),
    "ViT": Kind(
        lambda: VisionTransformer(size=32, patch=4, layers=3, heads=4, channels=128, classes=CLASSES),
        images,
        classify,
        ["blocks.0", "blocks.1", "blocks.2"],
    ),
    "ResNet": Kind(
        lambda: ResidualNetwork(widths=(32, 64, 128), classes=CLASSES, norm="batch"),
        images,
        classify,
        [f"blocks.{i}" for i in range(6)],
    ),
    "MobileNet": Kind(mobilenet, lambda rows: images(rows, size=64), classify, [f"1.{i}" for i in range(4)]),
    "U-Net": Kind(UNet, lambda rows: images(rows, size=48), restore, ["down.0", "down.1", "middle", "up.0", "up.1"]),
    "LSTM": Kind(Recurrent, lambda rows: tokens(rows, vocabulary=VOCABULARY // 8), next_token, ["layers"]),
    "contrastive pair": Kind(Pair, pairs, contrast, ["left", "right"]),
    "MLP": Kind(mlp, vectors, classify, ["0", "1", "2"]),
    "T5": Kind(t5, tokens, translate, [f"{part}.block.{i}" for part in ("encoder", "decoder") for i in range(2)]),
    "ConvNeXt": Kind(
        convnext, lambda rows: images(rows, size=64), classify, [f"convnext.encoder.stages.{i}" for i in range(2)]
    ),
    "Mixer": Kind(Mixer, images, classify, ["blocks.0", "blocks.1", "blocks.2"]),
    "Mixtral": Kind(mixtral, tokens, next_token, [f"model.layers.{i}" for i in range(2)]),
}

warnings.filterwarnings("ignore", module="transformers")
