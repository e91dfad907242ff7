"""What runs, in order of worth, and how long each item may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, TypeAlias

from benchmarks.gpu.outcome import Numbers

Function: TypeAlias = Callable[..., Numbers | None]


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that is proven or measured.

    Attributes:
        part: Heading of the page that it stands under.
        name: Its name.
        where: Module, of this package unless it has a dot, and function: ``function(here, say, **given)``, where
            ``say(**fields)`` reports a row.
        seconds: How long it may take.
        given: Further arguments of the function.
    """

    part: str
    name: str
    where: str
    seconds: float
    given: Mapping[str, Any] = field(default_factory=dict[str, Any])


MACHINE, PROOFS, TESTS, SPEED = "Machine", "Proofs", "Tests marked `cuda`", "Speed"

# A proof takes one to ten seconds. What comes first is what the others are worth nothing without.
ITEMS = (
    Item(MACHINE, "machine", "machine_facts:facts", 30),
    Item(PROOFS, "the gradient is the full batch's", "exact_proofs:laws", 30),
    Item(PROOFS, "out of memory in forward", "memory_proofs:recovery", 30, {"where": "forward"}),
    Item(PROOFS, "out of memory in backward", "memory_proofs:recovery", 30, {"where": "backward"}),
    Item(PROOFS, "out of memory in the optimizer", "memory_proofs:optimizer", 30),
    Item(PROOFS, "no host synchronisation in a window", "stream_proofs:synchronisation", 30),
    Item(PROOFS, "fused bf16 products, fp32 sums", "exact_proofs:fused", 30),
    Item(SPEED, "GPT 124M", "speed:gpt", 90, {"form": "124M", "sizes": (1, 4, 8, 32, 2, 16)}),
    Item(PROOFS, "predicted peak against the allocator", "memory_proofs:prediction", 45),
    Item(PROOFS, "exact BatchNorm", "exact_proofs:batch_norm", 30),
    Item(PROOFS, "losses that couple samples", "exact_proofs:coupled", 30),
    Item(PROOFS, "prefetch overlaps", "stream_proofs:prefetch", 30),
    Item(PROOFS, "spill to pinned host memory", "memory_proofs:spill", 30),
    Item(PROOFS, "two processes on one device, gloo", "rank_proofs:gloo", 45),
    Item(PROOFS, "two devices, NCCL", "rank_proofs:nccl", 45),
    Item(PROOFS, 'CUDA graphs, compile="reduce-overhead"', "stream_proofs:graphs", 90),
    Item(TESTS, "tests", "marked_tests:marked", 120),
    Item(SPEED, "GPT 1B", "speed:gpt", 75, {"form": "1B", "sizes": (1, 8, 4, 32, 2, 16)}),
    Item(SPEED, 'cost of microbatch_size="auto"', "speed_extras:auto", 40),
    Item(SPEED, "contrastive", "speed_extras:contrastive", 30),
    Item(SPEED, "BatchNorm", "speed_extras:batch_norm", 40),
    Item(SPEED, "GPT 124M, bf16 weights", "speed:gpt", 30, {"form": "124M", "sizes": (1, 8), "weights": "bfloat16"}),
    Item(SPEED, "GPT 124M compiled", "speed:compiled", 120, {"form": "124M", "sizes": (1, 8)}),
)


def function_of(item: Item) -> Function:
    """Return the function of an item, with its further arguments."""
    module, name = item.where.split(":")
    function = getattr(import_module(module if "." in module else f"benchmarks.gpu.{module}"), name)
    return partial(function, **item.given)
