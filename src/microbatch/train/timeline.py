"""Where a step's time goes: data, each microbatch's forward and backward, the end of the window, the optimizer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from microbatch.train.job import Job

MOST = 64
"""Microbatches of a step whose times are kept; a line of metrics of a longer one would be long."""


class StepTimeline:
    """Note when things happen, on the host's clock: work that was handed to a device may still be running then.

    Between two microbatches that are done, everything up to the end of the last forward counts as forward, the rest as
    backward. So where all go forward before any goes backward, as with exact batch normalisation, the first has the
    time of all forwards.

    Args:
        optimizers: Whose steps are timed.

    Cost:
        Two looks at the clock a microbatch.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._optimizer_begins)
            optimizer.register_step_post_hook(self._optimizer_ends)
        self.begin(wait=0.0)

    def of(self, job: Job, *, plain: bool) -> Job:
        """Return a job whose forwards are timed.

        Args:
            job: Its model, loss and data stay what they are.
            plain: Whether samples are coupled within each microbatch alone.

        Returns:
            The job with another ``encode``, or with another ``loss_fn``.
        """
        if job.encode is None or plain:
            return dataclasses.replace(job, loss_fn=self._timed(job.batch_loss), encode=None)
        return dataclasses.replace(job, encode=self._timed(job.encode))

    def begin(self, *, wait: float) -> None:
        """Forget what was noted: a step begins, or begins again.

        Args:
            wait: Seconds that its batch took to be there.
        """
        self._wait = wait
        self._times: list[tuple[float, float]] = []
        self._last: float | None = None
        self._forward = self._finish = self._optimizer = 0.0

    def start_over(self) -> None:
        """Forget the microbatches of an attempt that ran out of memory."""
        self.begin(wait=self._wait)

    def microbatch_done(self) -> None:
        """Note that a microbatch has gone backward."""
        if self._last is not None:
            now, ended = time.perf_counter(), max(self._forward, self._last)
            self._times.append((ended - self._last, now - ended))
            self._last = now

    def _timed(self, function: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
        def forward(model: nn.Module, microbatch: Any) -> Any:
            if self._last is None:
                self._last = time.perf_counter()
            found = function(model, microbatch)
            self._forward = time.perf_counter()
            return found

        return forward

    def record(self) -> dict[str, Any] | None:
        """Return what was noted.

        Returns:
            Seconds: ``"wait"``, ``"forward"`` and ``"backward"`` of each microbatch, ``"finish"`` (reduce, normalise,
            clip) and ``"optimizer"``; `None` for a step of no microbatches or more than `MOST`.
        """
        if not 0 < len(self._times) <= MOST:
            return None
        return {
            "wait": round(self._wait, 6),
            "forward": [round(forward, 6) for forward, _ in self._times],
            "backward": [round(backward, 6) for _, backward in self._times],
            "finish": round(self._finish, 6),
            "optimizer": round(self._optimizer, 6),
        }

    def _optimizer_begins(self, *_: object) -> None:
        now = time.perf_counter()
        if not self._finish and self._last is not None:  # of several optimizers, the first
            self._finish = now - self._last
        self._began = now

    def _optimizer_ends(self, *_: object) -> None:
        self._optimizer += time.perf_counter() - self._began
