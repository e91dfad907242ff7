"""What the guide trains: four small models, on real data that comes with Python or with scikit-learn.

Shapes are name suffixes: B rows, T tokens of a row, C channels, H height, W width, D numbers of a representation.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microbatch.errors import ConfigError
from microbatch.loss.loss import Loss
from microbatch.train.jobs.pictures import Pictures, read_digits
from microbatch.train.jobs.text import find_files, read_documents
from microbatch.train.jobs.transformer import Shape, Transformer
from microbatch.warned import MicrobatchWarning

IGNORED = -100
"""Label of a position that is padding."""

LENGTH = 64
"""Most bytes of a row of text."""

_FILES = 12
"""Modules of the standard library that are read: some thousand lines, in half a second."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Say what is trained, on what.

    Attributes:
        name: How it was asked for.
        model: The module, on the CPU, in float32.
        loss_fn: ``loss_fn(model, microbatch)`` returns a `Loss`. Where samples are coupled, the loss of the
            representations that ``encode`` returned, as ``accumulator.step(..., encode=encode)`` wants it.
        encode: ``encode(model, microbatch)`` for the loss that couples samples; `None` where none are.
        rows: ``rows(chosen)`` returns the batch of these samples.
        samples: How many samples there are.
        batch_size: Effective batch, in samples.
        seed: Draws weights and batches.
    """

    name: str
    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Loss]
    encode: Callable[[nn.Module, Any], Any] | None = None
    rows: Callable[[Tensor], dict[str, Tensor]]
    samples: int
    batch_size: int
    seed: int

    def batch(self, index: int) -> dict[str, Tensor]:
        """Draw the effective batch of a step.

        Args:
            index: Of the step, from 0.

        Returns:
            The same for the same seed and index; tensors of ``batch_size`` rows.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return self.rows(torch.randperm(self.samples, generator=generator)[: self.batch_size])

    def loss(self, model: nn.Module, microbatch: dict[str, Tensor]) -> Loss:
        """Compute the loss of some rows by themselves: where samples are coupled, coupled among these.

        Args:
            model: The lesson's model, or a copy of it in any precision.
            microbatch: Rows of what `batch` returned, or all of them.

        Returns:
            Sum and count.
        """
        return self.loss_fn(model, microbatch if self.encode is None else self.encode(model, microbatch))

    def mean_loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Compute the loss of a batch in one piece, by plain PyTorch: what every cut is held against.

        Args:
            model: The lesson's model, or a copy of it in any precision.
            batch: What `batch` returned.

        Returns:
            The mean that is minimised; shape ``()``.
        """
        loss = self.loss(model, batch)
        return loss.sum / loss.count


def lesson(name: str, *, batch_size: int = 32, seed: int = 0, norm: str = "group") -> Lesson:
    """Make a lesson.

    Args:
        name: One of `LESSONS`.
        batch_size: Effective batch in samples; at least 1.
        seed: Draws weights and batches; PyTorch's own random state is left as it was.
        norm: What the convolutional network normalises by: ``"group"`` or ``"batch"``.

    Returns:
        The lesson.

    Raises:
        ConfigError: There is no such lesson or normalisation.
        MissingDependencyError: scikit-learn is not installed, and the lesson is about its digits.
    """
    if name not in LESSONS:
        raise ConfigError(f"there is no lesson {name!r}; choose one of {', '.join(LESSONS)}")
    if norm not in ("group", "batch"):
        raise ConfigError(f'norm must be "group" or "batch", not {norm!r}')
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = LESSONS[name](norm)
    return dataclasses.replace(made, batch_size=batch_size, seed=seed)


# -- text -------------------------------------------------------------------------------------------------------------


def _transformer(_: str) -> Lesson:
    texts = python_texts()
    return Lesson(
        name="transformer",
        model=Transformer(Shape(vocabulary=256, length=LENGTH, layers=2, heads=4, channels=64)),
        loss_fn=next_byte_loss,
        rows=lambda chosen: padded([texts[index] for index in chosen.tolist()]),
        samples=len(texts),
        batch_size=32,
        seed=0,
    )


@cache
def python_texts() -> tuple[bytes, ...]:
    """Read the lines of Python's own standard library: ragged rows of bytes.

    Returns:
        The first bytes of each line, none twice, at least two and at most one more than a row has.
    """
    lines = [line.strip() for text in read_documents(find_files(None)[:_FILES]) for line in text.splitlines()]
    texts = dict.fromkeys(line.encode()[: LENGTH + 1] for line in lines)
    return tuple(text for text in texts if len(text) > 1)


def padded(texts: list[bytes]) -> dict[str, Tensor]:
    """Stack texts of different lengths into one batch, padded on the right.

    Args:
        texts: Rows of bytes, two or more each.

    Returns:
        ``"tokens"`` to read and ``"labels"`` to predict, the same moved by one; shape ``(B, T)``, int64.

    Example:
        >>> padded([b"ab", b"abc"])["labels"].tolist()
        [[98, -100], [98, 99]]
    """
    width = max(map(len, texts)) - 1
    tokens_BT = torch.zeros(len(texts), width, dtype=torch.long)
    labels_BT = torch.full((len(texts), width), IGNORED)
    for row, text in enumerate(texts):
        bytes_T = torch.tensor(list(text))
        tokens_BT[row, : len(text) - 1] = bytes_T[:-1]
        labels_BT[row, : len(text) - 1] = bytes_T[1:]
    return {"tokens": tokens_BT, "labels": labels_BT}


def next_byte_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Loss:
    """Sum the cross-entropy of every next byte.

    Args:
        model: Tokens ``(B, T)`` to logits ``(B, T, 256)``.
        microbatch: Rows of what `padded` returned.

    Returns:
        The sum in nats, and the number of bytes that were to be predicted.
    """
    labels_BT = microbatch["labels"]
    logits_BTV = model(microbatch["tokens"])
    total = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return Loss(sum=total, count=(labels_BT != IGNORED).sum())


# -- images -----------------------------------------------------------------------------------------------------------


@cache
def _digits() -> Pictures:
    return read_digits()


def _image_rows(chosen: Tensor) -> dict[str, Tensor]:
    digits = _digits()
    return {"images": digits.images[chosen] * 2 - 1, "labels": digits.labels[chosen]}


def class_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Loss:
    """Sum the cross-entropy of every image's class.

    Args:
        model: Images ``(B, 1, 8, 8)`` to logits ``(B, 10)``.
        microbatch: ``"images"`` and ``"labels"``.

    Returns:
        The sum in nats, and the number of images.
    """
    labels_B = microbatch["labels"]
    images_BCHW = microbatch["images"].to(next(model.parameters()).dtype)
    return Loss(sum=F.cross_entropy(model(images_BCHW), labels_B, reduction="sum"), count=labels_B.numel())


def _on_digits(name: str, model: nn.Module) -> Lesson:
    return Lesson(
        name=name,
        model=model,
        loss_fn=class_loss,
        rows=_image_rows,
        samples=len(_digits()),
        batch_size=32,
        seed=0,
    )


def _mlp(_: str) -> Lesson:
    layers = (nn.Flatten(), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10))
    return _on_digits("mlp", nn.Sequential(*layers))


def _conv(norm: str) -> Lesson:
    # Smooth all through: at the kink of a ReLU two roundings of one number can have different gradients.
    layers: list[nn.Module] = []
    for before, width, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        normed = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(4, width)
        layers += [nn.Conv2d(before, width, 3, padding=1, stride=stride, bias=False), normed, nn.SiLU()]
    return _on_digits("conv", nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)))


# -- pairs ------------------------------------------------------------------------------------------------------------


class PairEncoder(nn.Module):
    """Encode the left and the right half of a digit, so that halves of one digit point the same way."""

    def __init__(self) -> None:
        """Make two encoders and a temperature."""
        super().__init__()
        self.left = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.right = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
        self.scale = nn.Parameter(torch.tensor(2.3))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Encode both halves.

        Args:
            images_BCHW: Shape ``(B, 1, 8, 8)``.

        Returns:
            Two representations of length 1; shape ``(B, D)`` each.
        """
        left_BCHW, right_BCHW = images_BCHW.to(self.scale.dtype).split(4, dim=-1)
        return (
            F.normalize(self.left(left_BCHW.flatten(1)), dim=-1),
            F.normalize(self.right(right_BCHW.flatten(1)), dim=-1),
        )


def encode_pairs(model: nn.Module, microbatch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Encode a microbatch's images.

    Args:
        model: A `PairEncoder`.
        microbatch: ``"images"``.

    Returns:
        Left and right representations; shape ``(B, D)`` each.
    """
    return model(microbatch["images"])


def contrastive_loss(model: nn.Module, pairs: tuple[Tensor, Tensor]) -> Loss:
    """Sum what it costs to find every half's other half among all that are there, both ways.

    Args:
        model: A `PairEncoder`.
        pairs: What `encode_pairs` returned, of all rows that are to be told apart.

    Returns:
        The sum in nats, and the number of pairs.
    """
    left_BD, right_BD = pairs
    scores_BB = left_BD @ right_BD.T * model.get_parameter("scale").exp()
    own_B = torch.arange(len(scores_BB))
    both = F.cross_entropy(scores_BB, own_B, reduction="sum") + F.cross_entropy(scores_BB.T, own_B, reduction="sum")
    return Loss(sum=both / 2, count=len(scores_BB))


def _pairs(_: str) -> Lesson:
    # The page shows what a cut does to this loss, and says so itself.
    warnings.filterwarnings("ignore", message="the loss compares the samples", category=MicrobatchWarning)
    made = _on_digits("pairs", PairEncoder())
    return dataclasses.replace(made, loss_fn=contrastive_loss, encode=encode_pairs)


LESSONS: dict[str, Callable[[str], Lesson]] = {
    "transformer": _transformer,
    "conv": _conv,
    "mlp": _mlp,
    "pairs": _pairs,
}
"""The models that can be trained, by name: a fixed list, so that nothing of a page is ever run."""
