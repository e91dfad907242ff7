"""Images to learn from: scikit-learn's digits, or a folder with one folder of images for each class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from microbatch.errors import DataError, MissingDependencyError

SIDE = 32
"""Height and width, in pixels, that images of a folder are brought to."""


@dataclass(frozen=True, kw_only=True)
class Pictures(Dataset[dict[str, Tensor]]):
    """Images and their classes, in memory; a map-style data set.

    Attributes:
        images: Shape ``(rows, C, H, W)``, float32.
        labels: Class of each, from 0; shape ``(rows,)``, int64.
        classes: Names of the classes, by number.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return self.labels.numel()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Take one image.

        Args:
            index: From 0; negative numbers count from the end.

        Returns:
            ``"images"`` of shape ``(C, H, W)`` and ``"labels"``, 0-d.
        """
        return {"images": self.images[index], "labels": self.labels[index]}

    def rows(self, chosen: Tensor) -> Pictures:
        """Take some of the images.

        Args:
            chosen: Their indices; 1-d, int64.

        Returns:
            These images in that order.
        """
        return Pictures(images=self.images[chosen], labels=self.labels[chosen], classes=self.classes)


def read_digits() -> Pictures:
    """Load scikit-learn's handwritten digits, which come with that package.

    Returns:
        1,797 images of 8 by 8 pixels, grey levels from 0 to 1, in 10 classes.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            'jobs on images need the package "scikit-learn"; install it with: pip install "microbatch[jobs]"'
        ) from error
    pixels, digits = load_digits(return_X_y=True)
    return Pictures(
        images=torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16,
        labels=torch.tensor(digits, dtype=torch.long),
        classes=tuple(str(digit) for digit in range(10)),
    )


def read_folder(folder: Path) -> Pictures:
    """Read images from folders named after their classes, brought to one size.

    They are grey if every one of them is, else in colour; transparency is left out.

    Args:
        folder: Holds at least two folders with images; hidden names, and files of other kinds, are left out.

    Returns:
        Images of `SIDE` by `SIDE` pixels, levels from 0 to 1, sorted by class and name.

    Raises:
        DataError: It is not a folder, holds fewer than two classes, or an image cannot be read (it is named).
        MissingDependencyError: Pillow is not installed.

    Cost:
        Everything is held in memory: 12 KiB an image in colour, 4 KiB in grey.
    """
    library = _pillow()
    if not folder.is_dir():
        found = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {found}; pass a folder that holds one folder of images for each class")
    endings = {ending for ending, kind in library.registered_extensions().items() if kind in library.OPEN}
    classes = {inside.name: _images_in(inside, endings) for inside in sorted(folder.iterdir()) if _is_class(inside)}
    classes = {name: files for name, files in classes.items() if files}
    if len(classes) < 2:
        raise DataError(
            f"{folder} holds {len(classes)} folders with images, and at least two classes are needed; "
            "put the images of each class into a folder named after it"
        )
    opened = [_open(file, library) for files in classes.values() for file in files]
    mode = "L" if all(image.mode in {"1", "L", "LA"} for image in opened) else "RGB"
    counts = torch.tensor([len(files) for files in classes.values()])
    return Pictures(
        images=torch.stack([_to_tensor(image.convert(mode)) for image in opened]),
        labels=torch.arange(len(classes)).repeat_interleave(counts),
        classes=tuple(classes),
    )


def hold_out(pictures: Pictures, *, share: float, seed: int) -> tuple[Pictures, Pictures]:
    """Divide images into those learnt from and those held out, the same share of every class.

    Args:
        pictures: All images.
        share: Part of each class that is held out, between 0 and 1; at least one image of each.
        seed: Draws them; PyTorch's own random state is left as it was.

    Returns:
        Those learnt from and those held out; no image is in both.

    Raises:
        DataError: A class has a single image, so it cannot be divided.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    held_out: list[Tensor] = []
    for number, name in enumerate(pictures.classes):
        rows = (pictures.labels == number).nonzero().flatten()
        if rows.numel() < 2:
            raise DataError(
                f"the class {name!r} has a single image, and one is held out of each; add more images to it"
            )
        rows = rows[torch.randperm(rows.numel(), generator=generator)]
        count = max(1, round(share * rows.numel()))
        held_out.append(rows[:count])
        kept.append(rows[count:])
    return pictures.rows(torch.cat(kept).sort().values), pictures.rows(torch.cat(held_out).sort().values)


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _images_in(folder: Path, endings: set[str]) -> list[Path]:
    """List a class's images in an order that depends on their names alone."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in endings and not path.name.startswith(".")]
    return sorted(path for path in files if path.is_file())


def _open(path: Path, library: Any) -> Any:
    """Read an image whole, in one of the modes that can be resized without loss of meaning."""
    try:
        with library.open(path) as image:
            mode = image.mode if image.mode in {"1", "L", "LA"} else "RGB"
            return image.convert("L" if mode == "1" else mode).resize((SIDE, SIDE), library.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, library.DecompressionBombError) as error:
        raise DataError(f"{path} is not an image that can be read ({error}); repair it, or leave it out") from error


def _to_tensor(image: Any) -> Tensor:
    """Turn an image into levels from 0 to 1, channels first."""
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return levels.reshape(SIDE, SIDE, -1).movedim(-1, 0).float() / 255


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            'images in folders need the package "pillow"; install it with: pip install "microbatch[jobs]"'
        ) from error
    Image.init()
    return Image
