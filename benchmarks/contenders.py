"""The contenders that need no other library: the full batch, the hand-written loop, `microbatch`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import microbatch as mb
from benchmarks.cases import BUDGET_CASES, CASES, IGNORED, LEARNING_RATE, SEED, loss_sum, trimmed

# One window: from the first microbatch to the optimizer step and the zeroed gradients, inside the given context.
Window: TypeAlias = Callable[[AbstractContextManager[object]], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """What a contender trains.

    Attributes:
        model: On the device, at its first weights.
        optimizer: Fresh.
        batch: The whole effective batch, on the host.
        microbatch_size: Rows that go through at once; divides the batch.
        lengths: Entry of a ragged batch that tells which columns are no padding.
    """

    model: nn.Module
    optimizer: Optimizer
    batch: dict[str, Tensor]
    microbatch_size: int
    lengths: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def rows(self) -> int:
        """Rows of the effective batch."""
        return len(self.batch["labels"])

    @property
    def count(self) -> int:
        """Labels of the effective batch, which the loss is a mean over."""
        return int((self.batch["labels"] != IGNORED).sum())

    def pieces(self) -> list[dict[str, Tensor]]:
        """Cut the batch the way everyone writes it: slices of the host's tensors."""
        starts = range(0, self.rows, self.microbatch_size)
        return [{name: each[s : s + self.microbatch_size] for name, each in self.batch.items()} for s in starts]

    def send(self, piece: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move one microbatch to the device."""
        device = self.device
        return {name: each.to(device, non_blocking=True) for name, each in piece.items()}


def make_subject(case_name: str, microbatch_size: int, *, device: str) -> Subject:
    """Make the same model, optimizer and batch every time.

    Args:
        case_name: A key of `CASES` or of `BUDGET_CASES`.
        microbatch_size: Rows that go through at once.
        device: Where the model goes.

    Returns:
        The subject.
    """
    case = (BUDGET_CASES | CASES)[case_name]
    torch.manual_seed(SEED)
    batch = case.batch()
    model = case.model().to(device)
    return Subject(model, AdamW(model.parameters(), lr=LEARNING_RATE), batch, microbatch_size, case.lengths)


def full(subject: Subject) -> Window:
    """Put the whole batch through at once."""
    whole = Subject(subject.model, subject.optimizer, subject.batch, subject.rows)
    return loop(whole)


def loop(subject: Subject, prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict) -> Window:
    """Accumulate by hand, and rightly: sums, divided by the whole batch's count."""
    model, optimizer = subject.model, subject.optimizer

    def window(around: AbstractContextManager[object]) -> None:
        with around:
            for piece in subject.pieces():
                loss = loss_sum(model, subject.send(prepare(piece))) / subject.count
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return window


def trimmed_loop(subject: Subject) -> Window:
    """Accumulate by hand, and trim each microbatch of ragged rows, in the order given, to its own longest."""
    return loop(subject, prepare=trimmed)


def microbatch(subject: Subject) -> Window:
    """Let `microbatch` do it."""
    accumulator = mb.Accumulator(
        subject.model,
        subject.optimizer,
        microbatch_size=subject.microbatch_size,
        lengths=subject.lengths,
        batch_norm="microbatch",
    )

    def loss_fn(model: nn.Module, piece: dict[str, Tensor]) -> mb.Loss:
        labels = piece["labels"]
        count = labels.numel() if subject.lengths is None else (labels != IGNORED).sum()
        return mb.Loss(sum=loss_sum(model, piece), count=count)

    def window(around: AbstractContextManager[object]) -> None:
        with around:
            accumulator.step(subject.batch, loss_fn)

    return window
