"""Make all ranks take an optimizer step that may run out of memory, or none of them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor, nn

from microbatch.errors import RankError
from microbatch.ranks.process_group import RankGroup
from microbatch.ranks.same_setup import ranks_named
from microbatch.step.optimizer_step import Versions
from microbatch.step.part import OpenWindow


@contextmanager
def all_or_none(ranks: RankGroup, window: OpenWindow) -> Generator[None]:
    """Take the optimizers' steps inside the block on all ranks, or on none.

    All ranks hold replicas. So a rank that fails before it writes to any weight still has the old weights of all ranks.
    The ranks that took the step copy these weights, and remove the state that their optimizers created. No copy is
    needed in advance.

    Args:
        ranks: The process group; every rank enters the block.
        window: The window, whose optimizers step in the block.

    Yields:
        Once.

    Raises:
        RankError: The step failed on another rank; the message tells whether it was undone.

    Cost:
        One all-reduce of 24 bytes for each rank, and a host synchronisation.

    Source:
        Laws B4, R7.
    """
    optimizers = window.options.optimizers
    before = [Versions(optimizer) for optimizer in optimizers]
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the other ranks are notified first, and it is raised below
        failure = error
    written = [] if failure is None else [each for each in before if not each.put_back()]
    untouched = failure is not None and not written
    # No other rank holds a shard, and the old values of existing state are lost after a step.
    replicas = all(type(each) in {Tensor, nn.Parameter} for versions in before for each in versions.parameters)
    replicas = replicas and all(each.stateless for each in before)
    told = ranks.share([failure is not None, untouched, replicas])
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
        window.undo.versions = []  # the weights are as before the window again
    words = _outcome(taken_back=taken_back, nobody=len(failed) == ranks.size)
    members = [ranks.members[index] for index in failed]
    if failure is not None:
        failure.add_note(f"microbatch: {words}")
        raise failure
    raise RankError(
        f"{len(failed)} of {ranks.size} ranks failed inside the optimizer's step ({ranks_named(members)}"
        f"{'' if ranks.beats is None else f' in step {ranks.beats.own.step}'}; see the error there): {words}"
    )


def _outcome(*, taken_back: bool, nobody: bool) -> str:
    if taken_back:
        return "weights and optimizer state are as before the window on every rank"
    if nobody:
        return "no rank took the step; where weights may be partly updated, go on from a checkpoint"
    return "the other ranks took the step, so the ranks' weights differ: go on from a checkpoint"
