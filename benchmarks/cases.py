"""The cases: a model, one batch for it, and the loss, the same for every contender."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import third_party
from benchmarks.models import GPT, Autocast, ResidualNetwork, VisionTransformer

LEARNING_RATE = 1e-4
SEED = 20_260_101


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to train.

    Attributes:
        describe: What it is, for the table.
        batch_size: Rows of the effective batch.
        model: Makes the model, from torch's random state.
        batch: Makes the batch on the host, ``{"inputs": (rows, ...), "labels": (rows, ...)}``, likewise.
        sizes: Microbatch sizes measured by default.
        all_sizes: Microbatch sizes of the thorough run, up to the full batch.
        couples_rows: Whether rows see one another, so that cutting the batch changes the gradient for everyone.
        lengths: Entry that tells which columns of a row are no padding, where rows are ragged.
        precision: Dtype of the matrix products.
    """

    describe: str
    batch_size: int
    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    sizes: tuple[int, ...] = ()
    all_sizes: tuple[int, ...] = ()
    couples_rows: bool = False
    lengths: str | None = None
    precision: torch.dtype = torch.float32

    @property
    def tolerance(self) -> float:
        """How far two gradients may be from one another, relative, that differ by rounding alone."""
        return 1e-4 if self.precision == torch.float32 else torch.finfo(self.precision).eps


IGNORED = -100  # label of padding


def loss_sum(model: nn.Module, piece: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy of some rows, summed over their labels: what everyone minimises, before dividing."""
    logits = model(piece["inputs"])
    labels = piece["labels"].flatten()
    return F.cross_entropy(logits.flatten(0, -2), labels, reduction="sum", ignore_index=IGNORED)


def trimmed(piece: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut off the columns that are padding in every row, as a careful collate function does."""
    used = max(1, int((piece["labels"] != IGNORED).sum(dim=1).max()))
    return {name: each[:, :used] for name, each in piece.items()}


def _text(rows: int, length: int, vocabulary: int) -> dict[str, Tensor]:
    tokens = torch.randint(vocabulary, (rows, length + 1))
    return {"inputs": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def _ragged_text(rows: int, *, mean: int, longest: int, vocabulary: int) -> dict[str, Tensor]:
    """Draw rows of log-normal lengths, padded to the longest: what a tokenizer makes of documents."""
    spread = 0.9
    drawn = torch.exp(torch.randn(rows) * spread + math.log(mean) - spread**2 / 2).long().clamp(8, longest)
    drawn[0] = longest
    batch = _text(rows, longest, vocabulary)
    mask = torch.arange(longest) < drawn.unsqueeze(1)
    return {"inputs": batch["inputs"] * mask, "labels": torch.where(mask, batch["labels"], IGNORED), "mask": mask}


def _images(rows: int, size: int, classes: int) -> dict[str, Tensor]:
    return {"inputs": torch.randn(rows, 3, size, size), "labels": torch.randint(classes, (rows,))}


_VOCABULARY = 50_257
_POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64)
_GPT = {"vocabulary": _VOCABULARY, "length": 128, "layers": 6, "heads": 6, "channels": 384}
_TINY = {"vocabulary": 64, "length": 8, "layers": 1, "heads": 2, "channels": 16}
_VIT = {"size": 32, "patch": 4, "layers": 6, "heads": 3, "channels": 192, "classes": 10}

CASES = {
    "gpt": Case(
        describe="GPT, 30M parameters, vocabulary 50,257, 128 tokens a row",
        batch_size=32,
        model=partial(GPT, **_GPT),
        batch=partial(_text, 32, 128, _VOCABULARY),
        sizes=(1,),
        all_sizes=_POWERS_OF_TWO[:6],
    ),
    "gpt-bf16": Case(
        describe="the same under bfloat16 autocast",
        batch_size=32,
        model=lambda: Autocast(GPT(**_GPT), torch.bfloat16),
        batch=partial(_text, 32, 128, _VOCABULARY),
        sizes=(1, 4),
        all_sizes=(1, 4, 32),
        precision=torch.bfloat16,
    ),
    "ragged": Case(
        describe="the same GPT on rows of log-normal lengths, mean about 120 tokens, longest 512",
        batch_size=64,
        model=partial(GPT, **(_GPT | {"length": 512})),
        batch=partial(_ragged_text, 64, mean=120, longest=512, vocabulary=_VOCABULARY),
        sizes=(8,),
        all_sizes=(8,),
        lengths="mask",
    ),
    "residual": Case(
        describe="residual network, 2.8M parameters, GroupNorm, images of 32 x 32",
        batch_size=64,
        model=partial(ResidualNetwork, widths=(32, 64, 128, 256), classes=10, norm="group"),
        batch=partial(_images, 64, 32, 10),
        sizes=(1, 8),
        all_sizes=_POWERS_OF_TWO,
    ),
    "batchnorm": Case(
        describe="the same with BatchNorm, whose statistics are each microbatch's own",
        batch_size=64,
        model=partial(ResidualNetwork, widths=(32, 64, 128, 256), classes=10, norm="batch"),
        batch=partial(_images, 64, 32, 10),
        sizes=(8,),
        all_sizes=_POWERS_OF_TWO[1:],
        couples_rows=True,
    ),
    "vit": Case(
        describe="vision transformer, 2.7M parameters, images of 32 x 32 in 64 patches",
        batch_size=64,
        model=partial(VisionTransformer, **_VIT),
        batch=partial(_images, 64, 32, 10),
        sizes=(1, 8),
        all_sizes=_POWERS_OF_TWO,
    ),
    "perceptron": Case(
        describe="a perceptron of 709 weights: only what a step costs in Python",
        batch_size=32,
        model=lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)),
        batch=lambda: {"inputs": torch.randn(32, 16), "labels": torch.randint(5, (32,))},
        sizes=(8,),
        all_sizes=(1, 8),
    ),
    # For the harness's own test, and to see that a machine can run all contenders.
    "tiny": Case(
        describe="a transformer that takes no time, so that only overhead is left",
        batch_size=4,
        model=partial(GPT, **_TINY),
        batch=partial(_text, 4, 8, 64),
        sizes=(1,),
        all_sizes=(1, 2, 4),
    ),
}


def _third_party(make: Callable[[], nn.Module], describe: str, batch: Callable[[], dict[str, Tensor]]) -> Case:
    has_norm = make in {third_party.resnet, third_party.segformer}  # batch normalisation
    return Case(describe=describe, batch_size=16, model=make, batch=batch, sizes=(4,), couples_rows=has_norm)


def _small_text() -> dict[str, Tensor]:
    return _text(16, third_party.LENGTH, third_party.VOCABULARY)


def _small_images() -> dict[str, Tensor]:
    return _images(16, third_party.PIXELS, third_party.CLASSES)


def _small_maps() -> dict[str, Tensor]:
    labels = torch.randint(third_party.CLASSES, (16, third_party.PIXELS // 4, third_party.PIXELS // 4))
    return _small_images() | {"labels": labels}


def _small_sounds() -> dict[str, Tensor]:
    return _small_text() | {"inputs": torch.randn(16, 80, third_party.FRAMES)}


THIRD_PARTY = {
    "bert": _third_party(third_party.bert, "BERT, 3.1M parameters", _small_text),
    "gemma": _third_party(third_party.gemma, "Gemma, 3.2M parameters", _small_text),
    "mixtral": _third_party(third_party.mixtral, "Mixtral, 8.3M parameters", _small_text),
    "t5": _third_party(third_party.t5, "T5, 4.1M parameters", _small_text),
    "whisper": _third_party(third_party.whisper, "Whisper, 4.3M parameters", _small_sounds),
    "swin": _third_party(third_party.swin, "Swin transformer, 2.2M parameters", _small_images),
    "hf-vit": _third_party(third_party.vit, "vision transformer, 1.5M parameters", _small_images),
    "convnext": _third_party(third_party.convnext, "ConvNeXt, 1.5M parameters", _small_images),
    "segformer": _third_party(third_party.segformer, "SegFormer, 3.7M parameters", _small_maps),
    "resnet18": _third_party(third_party.resnet, "residual network of 18 layers, 11M parameters", _small_images),
}
"""Models of the Transformers package: ``--case third-party`` of `benchmarks.run` measures all of them."""

CASES.update(THIRD_PARTY)

# For runs under a memory budget: weights small enough that an eighth of the full batch's peak still holds them, and
# windows of about a second. Microbatch sizes are not listed, because every one of them is tried.
_SMALL_GPT = {"vocabulary": 4096, "length": 128, "layers": 4, "heads": 4, "channels": 192}
_SMALL_WIDTHS = (32, 64, 96, 128)

BUDGET_CASES = {
    "gpt-small": Case(
        describe="GPT, 2.6M parameters, vocabulary 4,096, 128 tokens a row",
        batch_size=48,
        model=partial(GPT, **_SMALL_GPT),
        batch=partial(_text, 48, 128, 4096),
    ),
    "vit-small": Case(
        describe="vision transformer, 1.2M parameters, images of 32 x 32 in 64 patches",
        batch_size=96,
        model=partial(VisionTransformer, **(_VIT | {"heads": 4, "channels": 128})),
        batch=partial(_images, 96, 32, 10),
    ),
    "residual-small": Case(
        describe="residual network, 1.0M parameters, GroupNorm, images of 32 x 32",
        batch_size=128,
        model=partial(ResidualNetwork, widths=_SMALL_WIDTHS, classes=10, norm="group"),
        batch=partial(_images, 128, 32, 10),
    ),
    "batchnorm-small": Case(
        describe="the same with BatchNorm, whose statistics are each microbatch's own",
        batch_size=128,
        model=partial(ResidualNetwork, widths=_SMALL_WIDTHS, classes=10, norm="batch"),
        batch=partial(_images, 128, 32, 10),
        couples_rows=True,
    ),
    "ragged-small": Case(
        describe="the small GPT on rows of log-normal lengths, mean about 60 tokens, longest 256",
        batch_size=48,
        model=partial(GPT, **(_SMALL_GPT | {"length": 256})),
        batch=partial(_ragged_text, 48, mean=60, longest=256, vocabulary=4096),
        lengths="mask",
    ),
    "tiny": CASES["tiny"],
}
"""Cases of `benchmarks.budget`."""
