"""Runs that are worth seeing, by name: each shows one thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings with a name: one stop of the playground's tour.

    Attributes:
        title: A few words.
        text: What to watch; one or two sentences.
        settings: What differs from the defaults.
        exact: Whether the run ends with the whole batch's gradient; `None` where memory ends it.
    """

    title: str
    text: str
    settings: Mapping[str, Any]
    exact: bool | None


TOUR: Mapping[str, Mapping[str, Preset]] = {
    "Memory": {
        "fits": Preset(
            "Fits",
            "Watch the tank: microbatches of eight stay below the rim, and the gradient is the whole batch’s.",
            {"microbatch": 8, "tank": 10, "steps": 20},
            exact=True,
        ),
        "overflows": Preset(
            "Overflows",
            "Watch the tank: the whole batch at once needs more than it holds. The library’s own error ends the run.",
            {"microbatch": 32, "tank": 10, "recover": "no", "steps": 20},
            exact=None,
        ),
        "recovers": Preset(
            "Recovers",
            "Watch the loop: memory ends, everything is put back, and the same batch starts again in halves.",
            {"microbatch": 32, "tank": 10, "recover": "yes", "steps": 20},
            exact=True,
        ),
    },
    "Mistakes": {
        "undivided": Preset(
            "Forgot to divide",
            "Watch the loss: four microbatches and no division make every gradient four times too large. "
            "The whole batch’s loss falls; this run’s explodes.",
            {"model": "mlp", "microbatch": 8, "divide": "none", "lr": 0.2, "compare": "yes"},
            exact=False,
        ),
        "ragged": Preset(
            "Ragged text, naive",
            "Watch the gradient: a mean of means gives the tokens of short microbatches too much weight.",
            {"microbatch": 2, "divide": "means", "compare": "yes"},
            exact=False,
        ),
        "sums": Preset(
            "bfloat16 sums",
            "Watch the gradient: one row at a time, added in bfloat16. Small gradients do not move a large sum.",
            {"model": "mlp", "microbatch": 1, "batch": 128, "precision": "bfloat16-sums"},
            exact=False,
        ),
    },
    "Not the same": {
        "drift": Preset(
            "BatchNorm drifts",
            "Watch the gradient: statistics of four rows are not those of the batch. No denominator mends this.",
            {"model": "conv", "norm": "batch", "microbatch": 4, "compare": "yes"},
            exact=False,
        ),
        "exact": Preset(
            "BatchNorm, exact",
            "Watch the loop: all microbatches go forward before any goes backward, and share their statistics.",
            {"model": "conv", "norm": "exact", "microbatch": 4, "compare": "yes"},
            exact=True,
        ),
        "pairs": Preset(
            "Contrastive, plainly cut",
            "Watch the gradient: each row is compared with its own microbatch only, so this is another loss.",
            {"model": "pairs", "batch": 64, "microbatch": 8, "compare": "yes"},
            exact=False,
        ),
        "coupled": Preset(
            "Contrastive, coupled",
            "Watch the loop: every microbatch is encoded first, then all rows are compared. The whole batch’s loss.",
            {"model": "pairs", "batch": 64, "microbatch": 8, "coupling": "coupled", "compare": "yes"},
            exact=True,
        ),
    },
}
"""The stops of the tour, by group, in their order."""

PRESETS: Mapping[str, Preset] = {name: preset for group in TOUR.values() for name, preset in group.items()}
"""All of them, by name."""
