"""One small message a step by which the ranks agree: counts, sums, who failed, which gradients exist."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from microbatch.errors import LossError, RankError
from microbatch.ranks.group import Ranks

MOST_TERMS = 16


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank says, and what all of them say together.

    Attributes:
        names: Terms of the loss, in a fixed order; empty on a rank that had nothing to run.
        sums: The loss of each term, summed.
        counts: The count of each term.
        samples: Rows.
        present: For each parameter, whether there is a gradient.
    """

    names: Sequence[str]
    sums: Sequence[float]
    counts: Sequence[float]
    samples: float
    present: Sequence[bool]


def agree(ranks: Ranks, message: Message | None, *, parameters: int) -> Message:
    """Add up what the ranks say, in one all-reduce of a fixed length.

    The length depends on nothing that ranks could disagree about, so a rank that failed, or had nothing to run, can
    always answer: no rank waits for a message that never comes.

    Args:
        ranks: The ranks.
        message: What this rank says; `None` says that it failed.
        parameters: Number of trainable parameters, the same on every rank.

    Returns:
        The sums over all ranks, with the names in the order of those ranks that have them.

    Raises:
        LossError: The loss has more than 16 terms.
        RankError: A rank failed, or the ranks have different terms.

    Cost:
        One all-reduce of 8 bytes a parameter and about 300 more, and a host synchronisation.

    Source:
        Laws N3, N4, N9, R2.
    """
    names = sorted(message.names) if message else []
    if len(names) > MOST_TERMS:
        raise LossError(f"the loss has {len(names)} terms; over several ranks at most {MOST_TERMS} can be agreed upon")
    fingerprint = zlib.crc32("\n".join(names).encode())
    pairs = [0.0] * (2 * MOST_TERMS)
    if message is not None:
        said = dict(zip(message.names, zip(message.sums, message.counts, strict=True), strict=True))
        pairs[: 2 * len(names)] = [number for name in names for number in said[name]]
    head = [
        float(message is None),
        float(bool(names)),
        float(len(names)),
        float(fingerprint if names else 0),
        message.samples if message else 0.0,
    ]
    present = [float(each) for each in message.present] if message else [0.0] * parameters
    vector = torch.tensor([*head, *pairs, *present], dtype=torch.float64, device=ranks.device)
    ranks.sum_(vector)
    failed, speaking, terms, fingerprints, samples, *rest = vector.tolist()
    if failed and message is not None:
        raise RankError(
            f"{int(failed)} of {ranks.size} ranks failed inside this window; its gradients are dropped here too "
            "(the failing rank's own error says why)"
        )
    if names and fingerprints != speaking * fingerprint:
        raise RankError(f"the ranks' losses have different terms; this rank has {', '.join(names)}")
    spoken = int(terms / speaking) if speaking else 0
    if not names:
        names = ["loss"] if spoken == 1 else [f"term {slot}" for slot in range(spoken)]
    return Message(
        names=names,
        sums=rest[0 : 2 * spoken : 2],
        counts=rest[1 : 2 * spoken : 2],
        samples=samples,
        present=[each > 0 for each in rest[2 * MOST_TERMS :]],
    )
