"""A job: model, optimizer, loss and data; what every command takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import default_collate

from microbatch.batch.lengths import Lengths
from microbatch.errors import DataError
from microbatch.train.data import fetch, length_of
from microbatch.train.streams import Stream, is_stream, joined, rows_taken


@dataclass(frozen=True, kw_only=True)
class Job:
    """Model, optimizer, loss and data: what is trained, on what, and with which effective batch.

    Only the first five fields are needed; the others are defaults that the command line and a configuration file can
    override, and what the training loop needs to validate and to report.

    Attributes:
        model: The module to train, already on its device.
        optimizer: Optimizer over the model's parameters, or several of them.
        loss_fn: ``loss_fn(model, microbatch)`` returns a 0-d mean, a `Loss`, or a dict of `Loss`; with ``encode``,
            ``loss_fn(model, representations)`` of the whole batch does.
        data: Training set. Usually a map-style one: ``len(data)`` samples, ``data[i]`` is one of them. Or an
            `IterableDataset`, or a `DataLoader` whose batches are collated already; a resumed run goes on where it
            stood, by the data's own ``state_dict``, or else by reading again what was read.
        batch_size: Effective batch in samples, over all ranks; at least 1.
        encode: For losses that couple samples: ``encode(model, microbatch)`` returns the representations of its rows.
        batch_norm: What batch normalisation normalises by, as for `Accumulator`.
        buffers: What happens to other buffers that every microbatch moves, as for `Accumulator`.
        dropout: ``"by_row"`` to draw the same masks whatever the cut and the number of ranks, as for `Accumulator`.
        scheduler: Learning-rate scheduler, stepped once per optimizer step; `None` lets the training loop make one.
        collate: Turns a list of samples into one batch (nested tensors whose leading dimension is the rows).
        lengths: For ragged rows: the name of the batch's mask or lengths, or a `Lengths`; rows of like length then go
            through together, trimmed to the longest of them. `None` cuts rows as they come.
        counts: For losses of several terms: the denominators of a batch, by term.
        microbatch_size: Samples that go through the model at once; `None` finds it in the first steps.
        validation: Map-style held-out set; `None` for no validation.
        evaluate: ``evaluate(model, microbatch)`` returns named `Loss` records (sum and count) to be pooled over the
            validation set, for example the loss and the accuracy; with ``encode`` it is given the representations of
            the whole set at once. `None` takes ``loss_fn``.
        steps: Optimizer steps of a default run; `None` trains for ``epochs``.
        epochs: Passes over the data of a default run, used when ``steps`` is `None`.
        warmup_steps: Optimizer steps of linear warm-up of the scheduler that the loop makes.
        max_grad_norm: Clip the finished gradient to this norm; `None` does not clip.
        autocast: Precision of the forward pass, or `None` for the parameters' own.
        memory_budget: Bytes, or a text such as ``"1 GiB"``, that one step may use; `None` for what there is.
        unit: What the loss counts, in the plural, for throughput figures: ``"samples"``, ``"tokens"``, ``"images"``.
        facts: Named numbers worth printing beside the result, such as the unigram entropy of the data.
        show: ``show(model)`` returns text printed at the end, such as a generated sample.
        files: Names and texts stored in the run directory, such as a tokenizer's vocabulary.
    """

    model: nn.Module
    optimizer: Optimizer | Sequence[Optimizer]
    loss_fn: Callable[[nn.Module, Any], Any]
    data: Any
    batch_size: int
    encode: Callable[[nn.Module, Any], Any] | None = None
    batch_norm: str | None = None
    buffers: str | None = None
    dropout: str | None = None
    scheduler: LRScheduler | None = None
    collate: Callable[[list[Any]], Any] = default_collate
    lengths: Lengths | str | None = None
    counts: Callable[[Any], Mapping[str, Any]] | None = None
    microbatch_size: int | None = None
    validation: Sequence[Any] | torch.utils.data.Dataset[Any] | None = None
    evaluate: Callable[[nn.Module, Any], Mapping[str, Any]] | None = None
    steps: int | None = None
    epochs: float | None = None
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    autocast: torch.dtype | None = None
    memory_budget: int | str | None = None
    unit: str = "samples"
    facts: Mapping[str, float] = field(default_factory=dict[str, float])
    show: Callable[[nn.Module], str] | None = None
    files: Mapping[str, str] = field(default_factory=dict[str, str])

    def first_batch(self, rows: int | None = None) -> Any:
        """Collate the first rows of the data, unshuffled unless the data shuffles itself.

        Args:
            rows: At most this many; `None` for the effective batch.

        Returns:
            A batch, on the host.

        Raises:
            DataError: The data is empty, or cannot be indexed.
        """
        rows = self.batch_size if rows is None else rows
        if not is_stream(self.data):
            return self.collate(fetch(self.data, list(range(min(rows, length_of(self.data, role="data"))))))
        items, found, _ = Stream(self.data, rows=rows).take(0)
        if not found:
            raise DataError("the job's data has 0 samples; check the path that it was read from")
        return joined(rows_taken(self, items, range(found)))

    def batch_loss(self, model: nn.Module, batch: Any) -> Any:
        """Return the loss of rows that go through the model at once, whatever the loss couples.

        Args:
            model: The job's, or a copy.
            batch: The rows.

        Returns:
            What ``loss_fn`` does.
        """
        return self.loss_fn(model, batch if self.encode is None else self.encode(model, batch))
