"""Which samples make up which batch: a pure function of the seed and the position."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from microbatch.errors import DataError
from microbatch.kind_words import kind_of


@dataclass(frozen=True, slots=True)
class Position:
    """Say how far a run has read its data.

    Together with the seed this is all that a resumed run needs to go on with the very next sample.

    Attributes:
        epoch: Passes over the data that are complete; 0 or more.
        start: Samples of the current pass that have been read; below the number of samples.
    """

    epoch: int = 0
    start: int = 0


def mix_seed(seed: int, *purpose: object) -> int:
    """Derive an independent seed for one purpose, such as one epoch's order.

    Args:
        seed: The run's seed.
        purpose: What it is for; any values whose `repr` is stable.

    Returns:
        A number in ``[0, 2**63)``: a hash, so that neighbouring seeds and epochs share nothing.

    Example:
        >>> mix_seed(0, "order", 1) == mix_seed(1, "order", 0)
        False
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_order(samples: int, *, seed: int, epoch: int) -> Tensor:
    """Shuffle the samples of one epoch.

    Args:
        samples: Size of the training set; 0 or more.
        seed: The run's seed.
        epoch: Which pass, from 0.

    Returns:
        A permutation of ``range(samples)``; shape ``(samples,)``, int64. It depends on the arguments alone: not on
        the global random state, and not on how many ranks share the work.

    Example:
        >>> bool((sample_order(5, seed=1, epoch=2) == sample_order(5, seed=1, epoch=2)).all())
        True
    """
    generator = torch.Generator().manual_seed(mix_seed(seed, "order", epoch))
    return torch.randperm(samples, generator=generator)


class BatchOrder:
    """Name the samples of the batch at any position.

    A batch never crosses the end of an epoch: the last one of an epoch is short, and exact, because the accumulator
    divides by what is in it.
    """

    def __init__(self, samples: int, *, batch_size: int, seed: int) -> None:
        """Fix the size of the data and of the batch.

        Args:
            samples: Size of the training set.
            batch_size: Effective batch, in samples; at least 1.
            seed: The run's seed.

        Raises:
            DataError: There are no samples.
        """
        if samples < 1:
            raise DataError("the training data has 0 samples, so there is nothing to train on")
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps of one pass, the short last one among them."""
        return -(-self.samples // self.batch_size)

    def take(self, position: Position) -> tuple[list[int], Position]:
        """List the next batch's samples.

        Args:
            position: Where the run stands.

        Returns:
            Indices into the data, at most ``batch_size`` of them, and the position after them.

        Example:
            >>> order = BatchOrder(5, batch_size=3, seed=0)
            >>> first, position = order.take(Position())
            >>> second, position = order.take(position)
            >>> sorted(first + second), position
            ([0, 1, 2, 3, 4], Position(epoch=1, start=0))
        """
        if position.epoch != self._epoch:
            self._order = sample_order(self.samples, seed=self.seed, epoch=position.epoch)
            self._epoch = position.epoch
        stop = min(position.start + self.batch_size, self.samples)
        chosen: list[int] = self._order[position.start : stop].tolist()
        following = Position(position.epoch + 1, 0) if stop == self.samples else Position(position.epoch, stop)
        return chosen, following


def length_of(data: Any, *, role: str) -> int:
    """Count the samples of a map-style data set.

    Args:
        data: What the job calls its data.
        role: How to call it in an error, for example ``"data"``.

    Returns:
        The number of samples; at least 1.

    Raises:
        DataError: It has no length or no items, or it is empty.
    """
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise DataError(
            f"the job's {role} is {kind_of(data)}, which has no length or cannot be indexed. "
            "Pass a list or a map-style Dataset with __len__ and __getitem__, or, to train on, an IterableDataset or a "
            "DataLoader"
        )
    samples = len(data)
    if samples < 1:
        raise DataError(f"the job's {role} has 0 samples; check the path that it was read from")
    return samples


def fetch(data: Any, indices: list[int]) -> list[Any]:
    """Read samples from a map-style data set.

    Args:
        data: The data set; ``__getitems__`` is used where it has one, as PyTorch's loader does.
        indices: Which samples.

    Returns:
        The samples, in the order of ``indices``.
    """
    if hasattr(data, "__getitems__"):
        return cast("list[Any]", data.__getitems__(indices))
    return [data[index] for index in indices]


def in_order(samples: int, *, microbatch_size: int) -> Iterator[list[int]]:
    """Yield the indices of successive microbatches, unshuffled, for evaluation.

    Args:
        samples: Size of the data.
        microbatch_size: Samples at once; at least 1.

    Yields:
        Lists of at most ``microbatch_size`` indices that cover ``range(samples)`` once.
    """
    for start in range(0, samples, microbatch_size):
        yield list(range(start, min(start + microbatch_size, samples)))
