"""The record of one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Step:
    """The results and costs of one window: loss, counts, gradient norm, microbatches, time, memory, communication.

    The loss, its counts, its metrics and the gradient norm are those of the effective batch over all ranks. All tensors
    have shape ``()`` and stay on the device, so that creating the record does not synchronise.

    Attributes:
        index: Index of the window, from 0.
        loss: Mean loss of the effective batch, however it was cut. With several terms, the sum of their means.
        terms: The mean of each named term; empty if the loss function returned a single loss.
        grad_norm: Norm of the finished gradient, before clipping. NaN with ``Sums(buffer="none")``, which keeps no
            separate gradient.
        count: The number of samples or targets that the loss is a mean over; with several terms, that of the first.
        counts: The count of each named term; empty if the loss function returned a single loss.
        samples: Rows of the effective batch.
        microbatches: Number of microbatches on this rank.
        microbatch_size: Rows of the largest microbatch on this rank; 0 without a microbatch.
        applied: Whether the optimizer stepped. False for `Accumulator.gradient`, and for a dropped window.
        seconds: Wall-clock time from opening the window to launching the optimizer step, all attempts included.
        metrics: Sum of each metric of `Loss`, by name.
        fused: Number of weights whose gradients were added inside the matrix product; see `Accumulator.fusion`.
        retries: How often the window ran again because memory ran out.
        peak_bytes: Peak memory of the window on the device, in bytes, from the device's allocator, or from the meter on
            the CPU. `None` if the window was not measured; see ``docs/out-of-memory.md``.
        spilled_bytes: Bytes offloaded under ``offload=`` or ``batch_norm="exact"``.
        comm_bytes: Bytes that this rank sent to other data-parallel ranks in the last attempt. An all-reduce of ``n``
            bytes over ``r`` ranks counts ``2 n (r - 1) / r``, as in a ring; a gather or scatter counts half of that.
        comm_calls: Number of collectives for these bytes.
        sync: When the gradients of a fully sharded model were reduced: ``"lean"`` after every microbatch, ``"fast"``
            once. `None` for other models.
        noise_scale: The gradient noise scale, in samples, with ``Accumulator(noise_scale=...)``: the latest estimate,
            also in windows that are not measured. `None` until it is known, and while noise hides the gradient.
        noise_interval: Its 95 % confidence interval, in samples; the upper bound may be infinite. `None` where the
            scale is, and for fewer than 4 measured windows.
        noise_scale_by_group: The noise scale of each parameter group, with ``NoiseScale(by_group=True)``.
    """

    index: int
    loss: Tensor
    terms: Mapping[str, Tensor]
    grad_norm: Tensor
    count: float
    counts: Mapping[str, float]
    samples: int | float
    microbatches: int
    microbatch_size: int | float
    applied: bool
    seconds: float
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    fused: int = 0
    retries: int = 0
    peak_bytes: int | None = None
    spilled_bytes: int = 0
    comm_bytes: int = 0
    comm_calls: int = 0
    sync: str | None = None
    noise_scale: float | None = None
    noise_interval: tuple[float, float] | None = None
    noise_scale_by_group: Mapping[str, float | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain numbers, for loggers.

        Returns:
            Numbers, texts, booleans and `None`, by name; a term, count or metric has a name such as ``"terms/name"``.

        Cost:
            Reads the loss, the norm and the metrics: a host synchronisation on an accelerator.

        Example:
            >>> import torch
            >>> from microbatch.step.accumulator import Accumulator
            >>> model = torch.nn.Linear(1, 1)
            >>> accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
            >>> step = accumulator.step(torch.ones(4, 1), lambda model, x: model(x).mean())
            >>> step.as_dict()["samples"], step.as_dict()["applied"]
            (4, True)
        """
        found: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Mapping):
                found |= {f"{each.name}/{name}": _plain(number) for name, number in value.items()}
            elif each.name == "noise_interval":
                found["noise_interval/lower"], found["noise_interval/upper"] = value or (None, None)
            else:
                found[each.name] = _plain(value)
        return found

    def __repr__(self) -> str:
        """Return one line with loss, norm, sizes and time; it reads the loss from the device."""
        size = f"{self.samples:g} samples in {self.microbatches} microbatches of {self.microbatch_size:g}"
        retries = f", {self.retries} retries" if self.retries else ""
        state = "" if self.applied else ", not applied"
        loss, norm = _plain(self.loss), _plain(self.grad_norm)
        return f"Step({self.index}: loss {loss:.6g}, norm {norm:.6g}, {size}, {self.seconds:.3g} s{retries}{state})"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
