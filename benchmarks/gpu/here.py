"""The device that everything runs on, and how time and memory are measured there."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.gpu.outcome import NotHereError
from benchmarks.memory import allocated_peak

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Here:
    """The device of this run.

    Attributes:
        device: Of type ``"cuda"``, or ``"cpu"`` in a dry run.
        tiny: Whether sizes are so small that only the code is tried.
        until: When an item with several rows begins no other one, on the monotonic clock.
    """

    device: torch.device
    tiny: bool
    until: float = math.inf

    @property
    def cuda(self) -> bool:
        """Whether this is no dry run."""
        return self.device.type == "cuda"

    @property
    def late(self) -> bool:
        """Whether an item with several rows should end."""
        return time.monotonic() > self.until

    def need_cuda(self, what: str) -> None:
        """Leave an item that is about CUDA alone.

        Args:
            what: What the item is about.

        Raises:
            NotHereError: The device is not CUDA.
        """
        if not self.cuda:
            raise NotHereError(f"{what}: CUDA only")

    def rest(self, what: str) -> None:
        """End an item that ran, and passed, without what is about CUDA.

        Args:
            what: What is missing.

        Raises:
            NotHereError: The device is not CUDA.
        """
        if not self.cuda:
            raise NotHereError(f"{what}: CUDA only; all else of it passed")

    def size(self, large: _T, tiny: _T) -> _T:
        """Return the size for this run."""
        return tiny if self.tiny else large

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def clean(self) -> None:
        """Free what nothing refers to, and the allocator's cache."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def held(self) -> int:
        """Return the bytes that tensors take on the device; 0 on the CPU, which does not count them."""
        return torch.cuda.memory_allocated(self.device) if self.cuda else 0

    def seconds(self, run: Callable[[], object]) -> float:
        """Run something, and return how long it took on the wall's clock, everything on the device included."""
        self.wait()
        started = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - started

    def peak(self, run: Callable[[], object]) -> int:
        """Run something, and return the most bytes that the allocator held beyond what was there before."""
        if not self.cuda:
            return allocated_peak(run)
        self.wait()
        before = self.held()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    @contextmanager
    def at_most(self, more: int, *, beside: int) -> Generator[dict[str, Any]]:
        """Limit memory to so many more bytes: the allocator's own limit on CUDA, a budget on the CPU.

        Args:
            more: Bytes beyond those in use.
            beside: Bytes of the model and the batch, which a budget on the CPU counts too.

        Yields:
            Options for the accumulator.
        """
        if not self.cuda:
            yield {"memory_budget": more + beside}
            return
        self.clean()
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved(self.device) + more) / total, self.device
        )
        try:
            yield {"memory_budget": "none"}
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Return the floating-point operations a second of large matrix products, here and now."""
        side, products = self.size(8192, 256), 8
        left, right = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)

        def run() -> None:
            for _ in range(products):
                torch.mm(left, right, out=out)

        run()
        return 2 * side**3 * products / min(self.seconds(run) for _ in range(3))


def nbytes(*things: nn.Module | Tensor) -> int:
    """Return the bytes of tensors, and of modules' parameters and buffers."""
    tensors = [
        t for each in things for t in ([each] if isinstance(each, Tensor) else [*each.parameters(), *each.buffers()])
    ]
    return sum(each.numel() * each.element_size() for each in tensors)


def relative_error(got: list[Tensor], reference: list[Tensor]) -> float:
    """Return ``|got - reference| / |reference|`` over all tensors, in float64."""
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, reference, strict=True))
    return (off / sum(float(b.double().square().sum()) for b in reference)) ** 0.5


def gradients(model: nn.Module) -> list[Tensor]:
    """Copy a model's gradients; zeros where there are none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in model.parameters()]
