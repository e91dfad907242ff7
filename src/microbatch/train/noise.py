"""The gradient noise scale: beyond about so many samples, a larger batch hardly makes a better step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from microbatch.step.record import Step

_KEPT = 0.9
"""Part of the smoothed estimates that a new one leaves."""


class NoiseScale:
    """Estimate the noise scale from how much the microbatches of a window differ.

    With mean gradients ``g_i`` of ``A`` microbatches of ``n_i`` rows, ``g`` that of all ``N`` rows, the trace of the
    gradient's covariance over rows is ``S = (sum n_i |g_i|^2 - N |g|^2) / (A - 1)``, and the true gradient's square
    norm is ``|g|^2 - S / N``, both without bias. The two are smoothed by themselves and divided last: the quotient of
    two noisy numbers is not their means' quotient.

    Args:
        model: Whose gradients add up in their parameters' own `.grad`.

    Cost:
        In a window that is measured: one copy of the gradients, and a pass over them each microbatch.

    Source:
        McCandlish et al. 2018 (arXiv:1812.06162), appendix A.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._noise = self._signal = 0.0
        self.begin(due=False)

    def begin(self, *, due: bool) -> None:
        """Begin a window.

        Args:
            due: Whether to measure it.
        """
        self._due = due
        self._before: list[Tensor] | None = None
        self._changes: list[Tensor] = []
        self._rows: list[float] = []

    def start_over(self) -> None:
        """Forget the microbatches of an attempt that ran out of memory."""
        self.begin(due=self._due)

    def microbatch_done(self, rows: float | None) -> None:
        """Look at what a microbatch has added.

        Args:
            rows: Its samples; `None` if nobody said, and then nothing can be told.
        """
        if not self._due:
            return
        now = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        fits = self._before is None or len(self._before) == len(now)
        if not rows or not fits or len(now) == 0 or any(each.is_sparse for each in now):
            self._due = False  # such as gradients that add up elsewhere, or that come only with some microbatches
            return
        if self._before is None:
            self._changes.append(_square(now))
            self._before = [each.detach().clone() for each in now]
        else:
            torch._foreach_sub_(self._before, [each.detach() for each in now])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            self._changes.append(_square(self._before))
            torch._foreach_copy_(self._before, [each.detach() for each in now])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        self._rows.append(float(rows))

    def end(self, step: Step) -> float | None:
        """End a window.

        Args:
            step: Its record.

        Returns:
            The smoothed estimate so far, in samples; `None` in windows that were not measured, with fewer than two
            microbatches, or as long as noise hides the gradient.
        """
        before, changes, rows = self._before, self._changes, self._rows
        measured = self._due and step.applied and len(changes) > 1 and before is not None
        self.begin(due=False)
        if not measured or before is None:
            return None
        total, whole = float(_square(before)), float(step.grad_norm) ** 2
        if total == 0 or sum(rows) != step.samples:
            return None  # nothing was learnt, or other ranks had rows as well
        # What was added is in the window's own unit until its end; the finished gradient's norm says which.
        samples, unit = sum(rows), whole / total
        parts = sum(float(change) / count for change, count in zip(changes, rows, strict=True))
        noise = (samples**2 * unit * parts - samples * whole) / (len(rows) - 1)
        self._noise = _KEPT * self._noise + (1 - _KEPT) * noise
        self._signal = _KEPT * self._signal + (1 - _KEPT) * (whole - noise / samples)
        return self._noise / self._signal if self._signal > 0 and self._noise > 0 else None


def _square(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.double().square().sum() for each in tensors]).sum()
