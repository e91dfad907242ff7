"""Runs that are worth seeing, by name: each shows one thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings with a name.

    Attributes:
        title: A few words.
        text: What to look at; one or two sentences.
        settings: What differs from the defaults.
    """

    title: str
    text: str
    settings: Mapping[str, Any]


PRESETS: Mapping[str, Preset] = {
    "fits": Preset(
        "Fits",
        "Microbatches of eight stay below the rim, and the gradient is the full batch’s.",
        {"microbatch": 8, "tank": 10, "steps": 20},
    ),
    "overflows": Preset(
        "Overflows",
        "The whole batch at once passes the budget: a real error of the library’s, at the operator that asked.",
        {"microbatch": 32, "tank": 10, "recover": "no", "steps": 20},
    ),
    "recovers": Preset(
        "Recovers",
        "The same batch, allowed to recover: everything is put back, and it starts again in halves until it fits.",
        {"microbatch": 32, "tank": 10, "recover": "yes", "steps": 20},
    ),
    "undivided": Preset(
        "Forgot to divide",
        "Four microbatches and no division: every gradient is four times too large. The whole batch learns; this run's "
        "loss explodes.",
        {"model": "mlp", "microbatch": 8, "divide": "none", "lr": 0.2, "compare": "yes"},
    ),
    "ragged": Preset(
        "Ragged text, naive",
        "A mean of means weighs the tokens of short microbatches too much.",
        {"microbatch": 2, "divide": "means", "compare": "yes"},
    ),
    "drift": Preset(
        "BatchNorm drifts",
        "Statistics of four rows are not those of the batch: no denominator mends this.",
        {"model": "conv", "norm": "batch", "microbatch": 4, "compare": "yes"},
    ),
    "exact": Preset(
        "BatchNorm, exact",
        "The same cut with the whole batch’s statistics: the microbatches meet at every BatchNorm.",
        {"model": "conv", "norm": "exact", "microbatch": 4, "compare": "yes"},
    ),
    "sums": Preset(
        "bfloat16 sums",
        "One row at a time, added up in bfloat16: small gradients no longer move a large sum.",
        {"model": "mlp", "microbatch": 1, "batch": 128, "precision": "bfloat16-sums"},
    ),
    "pairs": Preset(
        "Contrastive, plainly cut",
        "Each half is told apart from the halves of its own microbatch only, so this is another loss.",
        {"model": "pairs", "batch": 64, "microbatch": 8, "compare": "yes"},
    ),
    "coupled": Preset(
        "Contrastive, coupled",
        "Encoded microbatch by microbatch, told apart among all: the whole batch’s loss and its gradient.",
        {"model": "pairs", "batch": 64, "microbatch": 8, "coupling": "coupled", "compare": "yes"},
    ),
}
"""In the order in which they are offered."""
