"""A step that may need more memory than any before it, over several ranks: all of them take it, or none."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer

from microbatch.errors import RankError
from microbatch.ranks.agreement import tell
from microbatch.ranks.process_group import Ranks
from microbatch.step.optimizer_step import Versions


@contextmanager
def together(ranks: Ranks, optimizers: Sequence[Optimizer]) -> Generator[None]:
    """Take the optimizers' steps inside the block on all ranks, or on none.

    A rank that fails before it has written to any weight still has what all ranks had, since they hold replicas: those
    that took the step are given its weights, and let go of the state that they made. So nothing is copied for the case
    that it is needed.

    Args:
        ranks: The ranks; every one of them enters the block.
        optimizers: Whose steps are taken in it.

    Yields:
        Once.

    Raises:
        RankError: The step failed on another rank; the message says whether it was taken back.

    Cost:
        One all-reduce of 24 bytes a rank, and a host synchronisation.

    Source:
        Laws B4, R7.
    """
    before = [Versions(optimizer) for optimizer in optimizers]
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks are told, and it is raised below
        failure = error
    written = [] if failure is None else [each for each in before if not each.put_back()]
    untouched = failure is not None and not written
    # Shards are nobody else's; and of state that was there before, whoever took the step has no copy.
    replicas = all(type(each) in {Tensor, nn.Parameter} for versions in before for each in versions.parameters)
    replicas = replicas and all(each.stateless for each in before)
    told = tell(ranks, [failure is not None, untouched, replicas])
    failed = [index for index, (each, _, _) in enumerate(told) if each]
    if not failed:
        return
    source = next((index for index, (_, each, _) in enumerate(told) if each), None)
    if failure is not None and all(each for _, each, _ in told):
        raise failure
    taken_back = source is not None and all(each for _, _, each in told)
    if source is not None and taken_back:
        for optimizer, versions in zip(optimizers, before, strict=True):
            optimizer.state.clear()
            ranks.copy_(versions.parameters, source=source)
    words = _words(taken_back=taken_back, nobody=len(failed) == ranks.size)
    if failure is not None:
        failure.add_note(f"microbatch: {words}")
        raise failure
    raise RankError(
        f"{len(failed)} of {ranks.size} ranks failed inside the optimizer's step ({_listed(failed)}; the error there "
        f"says why): {words}"
    )


def _words(*, taken_back: bool, nobody: bool) -> str:
    if taken_back:
        return "weights and optimizer state are as before the window on every rank"
    if nobody:
        return "no rank took the step; where weights may be partly updated, go on from a checkpoint"
    return "it was taken on the others, so that the ranks' weights differ: go on from a checkpoint"


def _listed(failed: Sequence[int]) -> str:
    return f"rank{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed))}"
