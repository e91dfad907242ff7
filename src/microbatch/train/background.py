"""Who writes a run's checkpoints: at once, or beside the steps that follow."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from microbatch.ranks.process_group import RankGroup
from microbatch.train.checkpoint import store
from microbatch.train.checkpoint_copy import copied


class CheckpointWriter:
    """Write checkpoints, one after the other.

    In the background, what is to be written is copied first, and training goes on with the originals. A checkpoint
    that is being written when the process dies has not been one yet; the one before it is still there.

    Args:
        folder: Where the run keeps its checkpoints.
        keep: Newest ones that stay.
        ranks: The ranks, which all do the same; `None` for a single process.
        background: Whether steps go on meanwhile.
        patience: Seconds that a rank waits for the others.
        written: Called with the step and the folder of each that is safe, by the thread that trains.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        ranks: RankGroup | None,
        background: bool,
        patience: float,
        written: Callable[[int, Path], object],
    ) -> None:
        self._folder, self._keep, self._ranks, self._written = folder, keep, ranks, written
        self._pending: tuple[int, Future[Path]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        if background and ranks is not None:
            # Messages of its own: those of a step that goes on meanwhile must not come in between.
            group = dist.new_group(backend="gloo", timeout=dt.timedelta(seconds=patience))
            self._ranks = RankGroup(group, torch.device("cpu"))

    def save(
        self, *, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any], best: int | None = None
    ) -> None:
        """Write a checkpoint, or begin to.

        Args:
            step: Optimizer steps taken.
            weights: Parameters and buffers by name.
            state: Everything else.
            best: The step whose checkpoint stays, however old; `None` for none.

        Raises:
            CheckpointError: The state cannot be stored, or the disk refused this one or the one before.

        Cost:
            A copy to the host; in the background, a wait for the checkpoint before it.
        """
        self.wait()
        what = copied(step=step, weights=weights, state=state)
        if self._thread is None:
            self._written(step, store(self._folder, what, keep=self._keep, best=best, ranks=self._ranks))
            return
        write = partial(store, self._folder, what, keep=self._keep, best=best, ranks=self._ranks)
        self._pending = step, self._thread.submit(write)

    def look(self) -> None:
        """Tell of the one that is being written, if it is safe by now."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait until the one that is being written is safe.

        Raises:
            CheckpointError: The disk refused.
        """
        if self._pending is not None:
            (step, future), self._pending = self._pending, None
            self._written(step, future.result())
