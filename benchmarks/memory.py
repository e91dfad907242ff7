"""Peak memory of one window, outside the timing: what torch allocated, and what the process held as a cross-check."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from benchmarks.contenders import Subject


class Peak:
    """Measure the most bytes that torch held at once inside the block, everything that was there before included.

    On the CPU the profiler reports every allocation and release, so workspaces inside an operator count too; what was
    allocated before the block is the model, the optimizer's state and the batch. On CUDA the allocator knows.

    Args:
        subject: What is trained.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._profile: Any = None
        self.bytes = 0

    def __enter__(self) -> Self:
        """Begin."""
        if self._subject.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return self
        self.bytes = _held(self._subject)
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End, and add up."""
        if self._subject.device.type == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated()
            return
        self._profile.__exit__(kind, error, traceback)
        self.bytes += _most(self._profile)


def allocated_peak(run: Callable[[], object]) -> int:
    """Run something once on the CPU and return the most bytes that it held beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    return _most(recorded)


def _most(recorded: Any) -> int:
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    events.sort(key=lambda each: each.start_ns())
    return max(accumulate((each.nbytes() for each in events), initial=0))


def warm_up_profiler() -> None:
    """Start the profiler once on the main thread, which it wants, and without its own chatter."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True):
        torch.zeros(1)


def resident_bytes() -> int | None:
    """Return the memory of this process that is in RAM now, or `None` where the system does not say."""
    return _status("VmRSS")


class ResidentPeak:
    """Measure the most memory that this process had in RAM at once inside the block, where Linux says so."""

    def __init__(self) -> None:
        self.bytes: int | None = None

    def __enter__(self) -> Self:
        """Begin, from what is resident now."""
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self._works = False
        else:
            self._works = True
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        if self._works:
            self.bytes = _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def _held(subject: Subject) -> int:
    parameters = list(subject.model.parameters())
    things: list[Any] = [parameters, [parameter.grad for parameter in parameters], list(subject.model.buffers())]
    things += [list(subject.optimizer.state.values()), list(subject.batch.values())]
    storages = {each.untyped_storage().data_ptr(): each for each in tree_leaves(things) if isinstance(each, Tensor)}
    return sum(each.untyped_storage().nbytes() for each in storages.values())
