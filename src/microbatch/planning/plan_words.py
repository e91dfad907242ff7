"""A plan in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from microbatch.memory.budget import format_bytes
from microbatch.planning.plan import CHECKPOINTED, KEPT, Plan, Way

_TIGHT = 0.95
"""Of the budget, above which a smaller microbatch is the safer one."""
_FEW = 8
"""Rows below which the statistics of a microbatch are noisy (Wu and He 2018, arXiv:1803.08494, figure 1)."""

_HEAP = (
    "call mb.keep_heap() once, before the first step: otherwise the memory of large gradients goes back to the system "
    "in every step, and is cleared page by page when it is needed again"
)


def words_for(
    plan: Plan, *, asked: int | None, batch_norms: Sequence[str], blocks: int, heap: bool = False
) -> list[str]:
    """Say in sentences what follows from a plan.

    Args:
        plan: It; its own words are not looked at.
        asked: Microbatch size that the user has now; `None` if none.
        batch_norms: Names of the modules that take statistics of their microbatch.
        blocks: Blocks that the model repeats.
        heap: Whether to name `keep_heap`.

    Returns:
        Sentences, without a full stop.
    """
    return [
        *_size(plan),
        *_asked(plan, asked),
        *_memory(plan),
        *_larger(plan),
        *_statistics(plan, batch_norms),
        *_activations(plan, blocks),
        *([_HEAP] if heap else []),
    ]


def _size(plan: Plan) -> Iterator[str]:
    if plan.microbatches == 1:
        yield "the whole batch fits and is fastest: do not accumulate" if plan.decided else "the whole batch fits"
    elif plan.microbatch_tokens is not None:
        yield (
            f"microbatches of {plan.microbatch_tokens:,} tokens, padding included "
            f"(Lengths(microbatch_tokens={plan.microbatch_tokens})), or {plan.microbatch_size} of the longest rows: "
            f"{plan.why}"
        )
    else:
        yield f"microbatches of {plan.microbatch_size} rows, {plan.microbatches} of them: {plan.why}"


def _asked(plan: Plan, asked: int | None) -> Iterator[str]:
    """Compare with the size that the user has now, if that was timed."""
    now = next((each for each in plan.candidates if each.microbatch_size == asked), None)
    if now is None or not now.seconds or not plan.seconds or not plan.decided or asked == plan.microbatch_size:
        return
    faster, peak = now.seconds / plan.seconds, now.measured_bytes or now.predicted_bytes
    if faster < 1.05:
        yield f"the {asked} asked for is as fast"
        return
    share = f"memory is at {peak / plan.budget:.0%} of the budget" if peak and plan.budget else f"{asked} was asked for"
    yield f"{share} with microbatches of {asked}: {plan.microbatch_size} would be {faster:.1f} times as fast"


def _memory(plan: Plan) -> Iterator[str]:
    if plan.peak_bytes is None or not plan.budget:
        return
    share = plan.peak_bytes / plan.budget
    at = f"memory is at {share:.0%} of the budget of {format_bytes(plan.budget)}"
    yield f"{at}: one more step down is safer" if share > _TIGHT and plan.microbatch_size > 1 else at


def _larger(plan: Plan) -> Iterator[str]:
    larger = [each for each in plan.candidates if each.microbatch_size > plan.microbatch_size and each.seconds]
    if larger and plan.seconds and plan.decided:
        slow = larger[-1]
        yield (
            f"a microbatch of {slow.microbatch_size} fits too and is slower: "
            f"{(slow.seconds or 0) / plan.seconds:.2f} times the time of a step"
        )


def _statistics(plan: Plan, batch_norms: Sequence[str]) -> Iterator[str]:
    if batch_norms and plan.microbatch_size < _FEW and plan.microbatches > 1:
        yield (
            f"BatchNorm ({batch_norms[0]}{' and others' if len(batch_norms) > 1 else ''}) takes statistics of "
            f"microbatches of {plan.microbatch_size} rows: under {_FEW} they are noisy"
        )


def _activations(plan: Plan, blocks: int) -> Iterator[str]:
    """Say of each way that was tried whether it pays."""
    kept = next((each for each in plan.ways if each.name == KEPT), None)
    for each in plan.ways:
        if each.name != KEPT:
            yield f"{_name(each, blocks)}: {_verdict(plan, each, kept)}"
    if not blocks:
        yield "no repeated blocks were found, so activation checkpoints are not compared"


def _name(way: Way, blocks: int) -> str:
    if way.name != CHECKPOINTED:
        return 'offload="activations"'
    many = "all" if len(way.blocks) == blocks else f"{len(way.blocks)} of"
    return f"activation checkpoints of {many} {blocks} blocks"


def _verdict(plan: Plan, way: Way, kept: Way | None) -> str:
    size, chosen = way.microbatch_size, way.name == plan.way
    if kept is None:
        lets = f"without, not even one row fits; with them, microbatches of {size} rows do"
        return lets if chosen else f"{lets}, and take longer"
    if not way.seconds or not kept.seconds:
        return "not compared"
    ratio = way.seconds / kept.seconds
    if size > kept.microbatch_size:
        lets = f"microbatches of {size} rows fit instead of {kept.microbatch_size}"
        return f"{lets}, {1 / ratio:.2f} times as fast" if chosen else f"{lets}, in {ratio:.2f} times the time: no gain"
    less = (
        "" if not way.peak_bytes or not kept.peak_bytes else f"{way.peak_bytes / kept.peak_bytes:.0%} of the memory, "
    )
    return f"{less}{ratio:.2f} times the time of a step; memory is not what limits, so there is nothing to gain"
