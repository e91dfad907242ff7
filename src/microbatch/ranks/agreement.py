"""One small all-reduce a step, in which the ranks agree on counts, sums, failures and which gradients exist."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from microbatch.errors import LossError, RankAgainError, RankError
from microbatch.ranks.process_group import RUN_AGAIN, RankGroup, failure_words
from microbatch.ranks.same_setup import differences

_SPARSE = 2.0**20  # of a sparse gradient; more than there are ranks, so that sums of both kinds can be told apart
MOST_TERMS = 16
NAME_BYTES = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one rank contributes to an agreement, or the sum of all ranks' contributions.

    Attributes:
        names: Names of the loss's terms, in a fixed order; empty on a rank without microbatches.
        sums: Summed loss of each term.
        counts: Count of each term.
        samples: Number of rows.
        double: Whether the loss is float64.
        present: For each parameter, whether it has a gradient.
        sparse: For each parameter, whether its gradient is sparse; of all ranks together only if no rank's is dense.
            Empty if none is.
        steps: Steps taken so far, which must be the same on every rank.
        metrics: Number of metrics beside the loss; another message carries their values.
        trained: A hash of the window's parameters, below ``2**16``, which must be the same on every rank.
        describe: Returns texts by name that describe the window's parameters, for an error message.
    """

    names: Sequence[str] = ()
    sums: Sequence[float] = ()
    counts: Sequence[float] = ()
    samples: float = 0.0
    double: bool = False
    present: Sequence[bool] = ()
    sparse: Sequence[bool] = ()
    steps: int = 0
    metrics: int = 0
    trained: int = 0
    describe: Callable[[], Mapping[str, str]] | None = None


def agree(ranks: RankGroup, message: Message | None, *, parameters: int, again: bool = False) -> Message:
    """Sum the messages of all ranks in one all-reduce of a fixed length.

    The length depends on nothing that ranks could disagree about. So a rank that failed, or that has no microbatches,
    can always take part, and no rank hangs in the all-reduce.

    Args:
        ranks: The data-parallel ranks.
        message: This rank's message; `None` if this rank failed.
        parameters: Number of parameters that the message has room for, the same on every rank; the others than this
            window's are frozen.
        again: Whether this rank failed and will run the same batch again, so that every rank has to.

    Returns:
        The sums over all ranks, with the term names of the ranks that have a loss.

    Raises:
        LossError: The loss has more than 16 terms, or a name of more than 48 bytes.
        RankError: Another rank failed and will not retry; or the ranks are at different steps, train different
            parameters, or their losses have different terms.
        RankAgainError: Ranks failed, and all of them will run the batch again.

    Cost:
        One all-reduce of 8 bytes a parameter plus about 6,500 bytes, and one host synchronisation.

    Source:
        Laws N3, N4, N9, R2.
    """
    own = ranks.failure_flags(failed=message is None) + _encode(message, parameters, again=again)
    vector = torch.tensor(own, dtype=torch.float64, device=ranks.device)
    ranks.sum_(vector)
    found = vector.tolist()
    flags = found[: failure_words(ranks.size)]
    retrying, failed, steps, steps_squared, trained, trained_squared, speaking, *rest = found[len(flags) :]
    terms, fingerprints, squares, samples, double, metrics, *rest = rest
    if message is None:
        if again and failed != retrying:
            raise RankError(
                "another rank failed and will not run the batch again, so this rank cannot either; read the other "
                "rank's own error"
            )
    elif failed and failed == retrying:
        raise RankAgainError(
            f"{int(failed)} of {ranks.size} ranks ran out of memory in passes that all ranks run together, {RUN_AGAIN}"
        )
    elif failed:
        raise ranks.failed_error(ranks.failed(flags))
    # n * sum(x^2) == sum(x)^2 only if all n numbers are equal. Every rank gets the same answer, even one without terms.
    if (ranks.size - failed) * steps_squared != steps**2:
        raise RankError(
            "the ranks are not at the same step: one rank went on after an error inside its optimizer's step, which "
            "the other ranks finished, so their weights differ. Restart all ranks from a checkpoint"
        )
    if (ranks.size - failed) * trained_squared != trained**2:
        texts = ranks.tell({} if message is None or message.describe is None else dict(message.describe()))
        raise RankError(
            "since the first window, requires_grad or the optimizers' parameters have changed on some ranks only: "
            + differences(dict(zip(ranks.members, texts, strict=True)))
        )
    if speaking * squares != fingerprints**2:
        own = ", ".join(message.names) if message and message.names else "none"
        raise RankError(
            f"the ranks' losses have different terms; this rank has {own}: return the same terms on every rank"
        )
    shared = int(terms / speaking) if speaking else 0
    kinds = rest[(2 + NAME_BYTES) * MOST_TERMS :][: 0 if message is None else len(message.present)]
    letters = rest[2 * MOST_TERMS : (2 + NAME_BYTES) * MOST_TERMS]
    return Message(
        names=[_decode(letters[slot * NAME_BYTES : (slot + 1) * NAME_BYTES], speaking) for slot in range(shared)],
        sums=rest[0 : 2 * shared : 2],
        counts=[rest[2 * slot + 1] for slot in range(shared)],
        samples=samples,
        double=double > 0,
        present=[each > 0 for each in kinds],
        sparse=[each > 0 and each % _SPARSE == 0 for each in kinds],
        metrics=int(metrics),
    )


def message_bytes(parameters: int, *, ranks: int) -> int:
    """Return the length of the all-reduce in `agree` and `attend`."""
    return 8 * (failure_words(ranks) + len(_encode(None, parameters, again=False)))


def attend(ranks: RankGroup, rows: float, *, parameters: int) -> float:
    """Check that no rank has failed, before the ranks run further collectives, and sum their rows.

    A rank that failed takes part in this all-reduce, but not in the collectives that follow.

    Args:
        ranks: The data-parallel ranks.
        rows: Number of rows on this rank.
        parameters: As for `agree`.

    Returns:
        Number of rows on all ranks together.

    Raises:
        RankError: A rank failed.

    Cost:
        As for `agree`.
    """
    return agree(ranks, Message(samples=rows), parameters=parameters).samples


def _encode(message: Message | None, parameters: int, *, again: bool) -> list[float]:
    """Encode a message as numbers whose sums over the ranks can be decoded."""
    if message is None:
        return [float(again), 1.0] + [0.0] * (11 + (2 + NAME_BYTES) * MOST_TERMS + parameters)
    names = sorted(message.names)
    if len(names) > MOST_TERMS or any(len(name.encode()) > NAME_BYTES for name in names):
        raise LossError(
            f"over several ranks a loss may have at most {MOST_TERMS} terms, with names of at most {NAME_BYTES} bytes; "
            f"this loss has {len(names)}: {names}"
        )
    # 16 bits, so that float64 holds sums of squares over thousands of ranks exactly.
    fingerprint = float(zlib.crc32("\n".join(names).encode()) & 0xFFFF) if names else 0.0
    by_name = dict(zip(message.names, zip(message.sums, message.counts, strict=True), strict=True))
    pairs = [number for name in names for number in by_name[name]]
    letters = [float(byte) for name in names for byte in name.encode().ljust(NAME_BYTES, b"\0")]
    kinds = [float(each) for each in message.present]
    for index, sparse in enumerate(message.sparse):
        kinds[index] *= _SPARSE if sparse else 1.0
    return [
        0.0,
        0.0,
        float(message.steps),
        float(message.steps**2),
        float(message.trained),
        float(message.trained**2),
        float(bool(names)),
        float(len(names)),
        fingerprint,
        fingerprint**2,
        float(message.samples),
        float(message.double),
        float(message.metrics),
        *pairs,
        *[0.0] * (2 * (MOST_TERMS - len(names))),
        *letters,
        *[0.0] * (NAME_BYTES * (MOST_TERMS - len(names))),
        *kinds,
        *[0.0] * (parameters - len(kinds)),
    ]


def _decode(letters: Sequence[float], speaking: float) -> str:
    return bytes(int(letter / speaking) for letter in letters).rstrip(b"\0").decode()
