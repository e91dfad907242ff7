"""One small message a step by which the ranks agree: counts, sums, who failed, which gradients exist."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from microbatch.errors import LossError, RankAgainError, RankError
from microbatch.ranks.process_group import Ranks

MOST_TERMS = 16
NAME_BYTES = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one rank says, and what all of them say together.

    Attributes:
        names: Terms of the loss, in a fixed order; empty on a rank that had nothing to run.
        sums: The loss of each term, summed.
        counts: The count of each term.
        samples: Rows.
        double: Whether the loss is in float64.
        present: For each parameter, whether there is a gradient.
        steps: Steps that were taken together so far, the same on every rank.
    """

    names: Sequence[str]
    sums: Sequence[float]
    counts: Sequence[float]
    samples: float
    double: bool
    present: Sequence[bool]
    steps: int = 0


def agree(ranks: Ranks, message: Message | None, *, parameters: int, again: bool = False) -> Message:
    """Add up what the ranks say, in one all-reduce of a fixed length.

    The length depends on nothing that ranks could disagree about, so a rank that failed, or had nothing to run, can
    always answer: no rank waits for a message that never comes.

    Args:
        ranks: The ranks.
        message: What this rank says; `None` says that it failed.
        parameters: Number of trainable parameters, the same on every rank.
        again: Whether this rank, which failed, will run the same batch again, so that all of them have to.

    Returns:
        The sums over all ranks, with the names in the order of those ranks that have them.

    Raises:
        LossError: The loss has more than 16 terms, or a name of more than 48 bytes.
        RankError: A rank failed (where this one did: for good), or the ranks are at different steps, or have different
            terms.
        RankAgainError: Ranks failed, and all that did will run the batch again.

    Cost:
        One all-reduce of 8 bytes a parameter and about 6,500 more, and a host synchronisation.

    Source:
        Laws N3, N4, N9, R2.
    """
    vector = torch.tensor(_encode(message, parameters, again=again), dtype=torch.float64, device=ranks.device)
    ranks.sum_(vector)
    told_again, failed, steps, steps_squared, speaking, terms, fingerprints, squares, samples, double, *rest = (
        vector.tolist()
    )
    if message is None:
        if again and failed != told_again:
            raise RankError("another rank failed for good, so that there is nobody to run the batch again with")
    elif failed and failed == told_again:
        raise RankAgainError(
            f"{int(failed)} of {ranks.size} ranks ran out of memory in passes that all ranks make together, so the "
            "batch has to be run again on every rank; gradients, random state and buffers are as before the window"
        )
    elif failed:
        raise RankError(
            f"{int(failed)} of {ranks.size} ranks failed inside this window; its gradients are dropped here too "
            "(the failing rank's own error says why)"
        )
    # Equal numbers, and only they, have this; every rank sees it alike, also one that has no terms itself.
    if (ranks.size - failed) * steps_squared != steps**2:
        raise RankError(
            "the ranks are not at the same step: one went on after its own error inside the optimizer's step, which "
            "the others took, so that their weights differ; go on from a checkpoint, on all of them"
        )
    if speaking * squares != fingerprints**2:
        own = ", ".join(message.names) if message and message.names else "none"
        raise RankError(f"the ranks' losses have different terms; this rank has {own}")
    spoken = int(terms / speaking) if speaking else 0
    letters = rest[2 * MOST_TERMS : (2 + NAME_BYTES) * MOST_TERMS]
    return Message(
        names=[_decode(letters[slot * NAME_BYTES : (slot + 1) * NAME_BYTES], speaking) for slot in range(spoken)],
        sums=rest[0 : 2 * spoken : 2],
        counts=[rest[2 * slot + 1] for slot in range(spoken)],
        samples=samples,
        double=double > 0,
        present=[each > 0 for each in rest[(2 + NAME_BYTES) * MOST_TERMS :]],
    )


def message_bytes(parameters: int) -> int:
    """Say how long the message is that `agree` and `attend` add up.

    Args:
        parameters: Number of trainable parameters.

    Returns:
        Bytes.
    """
    return 8 * len(_encode(None, parameters, again=False))


def attend(ranks: Ranks, rows: float, *, parameters: int) -> float:
    """See to it that every rank is there, before they tell one another more.

    One that failed answers this, and not what follows.

    Args:
        ranks: The ranks.
        rows: This one's.
        parameters: Number of trainable parameters, the same on every rank.

    Returns:
        Rows of all ranks.

    Raises:
        RankError: A rank failed.

    Cost:
        As `agree`.
    """
    message = Message(names=[], sums=[], counts=[], samples=rows, double=False, present=[False] * parameters)
    return agree(ranks, message, parameters=parameters).samples


def tell(ranks: Ranks, told: Sequence[bool]) -> list[list[bool]]:
    """Let every rank know a few yes or no of every other.

    Args:
        ranks: The ranks.
        told: What this rank says; as many on every rank.

    Returns:
        What each rank said, in their order.

    Cost:
        One all-reduce of 8 bytes for each, and a host synchronisation.
    """
    said = torch.zeros(ranks.size, len(told), dtype=torch.float64)
    said[ranks.index] = torch.tensor(told, dtype=torch.float64)
    said = said.to(ranks.device)
    ranks.sum_(said)
    return [[each > 0 for each in row] for row in said.tolist()]


def _encode(message: Message | None, parameters: int, *, again: bool) -> list[float]:
    """Write a message as numbers that can be added up over the ranks."""
    if message is None:
        return [float(again), 1.0] + [0.0] * (8 + (2 + NAME_BYTES) * MOST_TERMS + parameters)
    names = sorted(message.names)
    if len(names) > MOST_TERMS or any(len(name.encode()) > NAME_BYTES for name in names):
        raise LossError(
            f"over several ranks a loss may have {MOST_TERMS} terms with names of {NAME_BYTES} bytes, not {names}"
        )
    # Of 16 bits, so that sums of squares over thousands of ranks are still exact.
    fingerprint = float(zlib.crc32("\n".join(names).encode()) & 0xFFFF) if names else 0.0
    said = dict(zip(message.names, zip(message.sums, message.counts, strict=True), strict=True))
    pairs = [number for name in names for number in said[name]]
    letters = [float(byte) for name in names for byte in name.encode().ljust(NAME_BYTES, b"\0")]
    return [
        0.0,
        0.0,
        float(message.steps),
        float(message.steps**2),
        float(bool(names)),
        float(len(names)),
        fingerprint,
        fingerprint**2,
        float(message.samples),
        float(message.double),
        *pairs,
        *[0.0] * (2 * (MOST_TERMS - len(names))),
        *letters,
        *[0.0] * (NAME_BYTES * (MOST_TERMS - len(names))),
        *[float(each) for each in message.present],
    ]


def _decode(letters: Sequence[float], speaking: float) -> str:
    return bytes(int(letter / speaking) for letter in letters).rstrip(b"\0").decode()
