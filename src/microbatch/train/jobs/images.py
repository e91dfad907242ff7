"""The job `images`: a small residual network learns to tell classes of images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microbatch.loss.loss import Loss
from microbatch.train.job import Job
from microbatch.train.jobs.pictures import Pictures, hold_out, read_digits, read_folder
from microbatch.train.jobs.residual import ResidualNetwork


def images(
    *,
    data: Path | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_size: int | None = None,
) -> Job:
    """Make a job that trains a small residual network on handwritten digits, or on images of the user's.

    Args:
        data: Folder that holds one folder of images for each class; `None` for scikit-learn's digits.
        seed: Draws the first weights and the held-out fifth; PyTorch's own random state is left as it was.
        device: Where the model is trained.
        batch_size: Effective batch in images; `None` for 128.

    Returns:
        The job. Validation reports the loss in nats per image, and the accuracy.

    Raises:
        DataError: The folder cannot be read as images in classes.
        MissingDependencyError: scikit-learn, or for a folder Pillow, is not installed.
    """
    return _job(data, seed=seed, device=device, batch_size=batch_size, norm="group")


def images_batchnorm(
    *,
    data: Path | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_size: int | None = None,
) -> Job:
    """Make the job `images` with batch normalisation, over the effective batch: exact, whatever the microbatch size.

    Args:
        data: As for `images`.
        seed: As for `images`.
        device: Where the model is trained.
        batch_size: Effective batch in images; `None` for 128.

    Returns:
        The job, in microbatches of 4, which alone are too few for statistics.

    Raises:
        DataError: The folder cannot be read as images in classes.
        MissingDependencyError: scikit-learn, or for a folder Pillow, is not installed.
    """
    return _job(data, seed=seed, device=device, batch_size=batch_size, norm="batch")


def _job(
    data: Path | None,
    *,
    seed: int,
    device: str | torch.device,
    batch_size: int | None,
    norm: Literal["group", "batch"],
) -> Job:
    train, validation = hold_out(read_digits() if data is None else read_folder(data), share=0.2, seed=seed)
    train, validation = _standardise(train, validation)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ResidualNetwork(channels=train.images.shape[1], classes=len(train.classes), norm=norm)
        model.to(device)
    return Job(
        model=model,
        optimizer=_optimizer(model),
        loss_fn=class_loss,
        data=train,
        batch_size=128 if batch_size is None else batch_size,
        microbatch_size=16 if norm == "group" else 4,
        batch_norm=None if norm == "group" else "exact",
        validation=validation,
        evaluate=class_scores,
        epochs=12,
        warmup_steps=10,
        max_grad_norm=1.0,
        unit="images",
        files={"classes.txt": "".join(f"{name}\n" for name in train.classes)},
    )


def class_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Loss:
    """Sum the cross-entropy of every image's class.

    Args:
        model: Images ``(B, C, H, W)`` to logits ``(B, K)``.
        microbatch: ``"images"`` and ``"labels"``.

    Returns:
        The sum in nats, and the number of images.
    """
    labels_B = microbatch["labels"]
    total = F.cross_entropy(model(microbatch["images"]), labels_B, reduction="sum")
    return Loss(sum=total, count=labels_B.numel())


def class_scores(model: nn.Module, microbatch: dict[str, Tensor]) -> dict[str, Loss]:
    """Sum the cross-entropy, and count the images whose class was told.

    Args:
        model: Images ``(B, C, H, W)`` to logits ``(B, K)``.
        microbatch: ``"images"`` and ``"labels"``.

    Returns:
        ``"loss"`` in nats and ``"accuracy"``, each over the number of images.
    """
    labels_B = microbatch["labels"]
    logits_BK = model(microbatch["images"])
    rows = labels_B.numel()
    right = (logits_BK.argmax(dim=-1) == labels_B).sum(dtype=torch.float32)
    return {
        "loss": Loss(sum=F.cross_entropy(logits_BK, labels_B, reduction="sum"), count=rows),
        "accuracy": Loss(sum=right, count=rows),
    }


def _standardise(train: Pictures, validation: Pictures) -> tuple[Pictures, Pictures]:
    """Move levels to mean 0 and scale 1 in every colour, by what is known of the images learnt from."""
    mean_C11 = train.images.mean(dim=(0, 2, 3)).reshape(-1, 1, 1)
    scale_C11 = train.images.std(dim=(0, 2, 3)).clamp_min(1e-3).reshape(-1, 1, 1)
    first, second = (
        Pictures(images=(part.images - mean_C11) / scale_C11, labels=part.labels, classes=part.classes)
        for part in (train, validation)
    )
    return first, second


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Decay the kernels and leave the vectors alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": 0.05},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99), fused=True)
