"""Sentences about a range test: what was found, how sure it is, and what to do where nothing was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from microbatch.tuning.learning_rate import LearningRate
from microbatch.tuning.range_curve import FALLS_AT_ONCE, FALLS_TO_THE_END, FLAT, Reading

_APART = 10.0
"""A factor between the rules, or between the runs, above which the suggestion is called unsure."""


def words_for(
    result: LearningRate, reading: Reading, *, alone: Sequence[float | None], diverged: int
) -> tuple[str, ...]:
    """Word a range test.

    Args:
        result: Its result.
        reading: What its curve says.
        alone: What each run by itself suggests.
        diverged: Number of runs that diverged.

    Returns:
        Sentences.
    """
    if result.suggested is None:
        return tuple(_nothing(result, reading))
    return tuple(_found(result, reading, alone=alone, diverged=diverged))


def _found(result: LearningRate, reading: Reading, *, alone: Sequence[float | None], diverged: int) -> Iterator[str]:
    yield f"Use a learning rate of {result.suggested:.2g} for batches of {result.batch_size}."
    yield (
        f"It is halfway, by factors, between {reading.fastest:.2g}, where the loss falls fastest, and "
        f"{reading.lowest:.2g}, where it is lowest."
    )
    sure = f", {reading.fall / reading.error:,.0f} times the standard error" if reading.error else ""
    yield f"The loss falls from {reading.level:.4g} to {reading.best:.4g}{sure}."
    found = [each for each in alone if each is not None]
    if len(alone) > 1:
        yield _alone(found, runs=len(alone))
    if reading.lowest / reading.fastest > _APART**2:
        yield "These two are far apart, so compare a few real runs around the suggestion."
    if result.diverged_at is None:
        yield "No run diverged, so the curve does not show the largest rate that works."
    else:
        yield f"From {result.diverged_at:.2g} on, the loss grows without end in {diverged} of {len(alone)} runs."
    if result.given:
        yield f"The optimizer's own rate is {result.given:.2g}."


def _alone(found: Sequence[float], *, runs: int) -> str:
    if len(found) < runs:
        return (
            f"By itself, only {len(found)} of {runs} runs shows a clear descent and a rise: the suggestion is unsure."
        )
    if max(found) / min(found) > _APART:
        return (
            f"By itself, each run gives between {min(found):.2g} and {max(found):.2g}: the suggestion is unsure, so "
            "take more seeds."
        )
    return f"By itself, each of {runs} runs gives between {min(found):.2g} and {max(found):.2g}."


def _nothing(result: LearningRate, reading: Reading) -> Iterator[str]:
    rates = result.curve.rates
    low, high = (rates[0], rates[-1]) if rates else (reading.minimum, reading.minimum)
    if reading.verdict == FLAT:
        yield f"There is no suggestion: between {low:.2g} and {high:.2g} the loss moves by no more than its noise."
        yield (
            "Check that the optimizer holds the parameters that the loss depends on. A larger batch or more seeds "
            "makes the curve less noisy."
        )
    elif reading.verdict == FALLS_AT_ONCE:
        yield f"There is no suggestion: the loss falls from the first rate on, {low:.2g}. Begin at a lower rate."
    elif reading.verdict == FALLS_TO_THE_END:
        yield f"There is no suggestion: up to the last rate, {high:.2g}, the loss never rises. End at a higher rate."
    else:
        yield f"There is no suggestion: from {low:.2g} on, the loss never falls by more than its noise, and it rises."
        yield "Either the first rate is too high already, or the job is trained so far that no step of this test helps."
