"""Write a sweep's table, and the sentences that say what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from microbatch.planning.text_table import aligned, fitting
from microbatch.planning.time_words import format_time
from microbatch.tuning.sweep_fit import CriticalBatch, harmless_size
from microbatch.tuning.sweep_records import BatchResult

_HEAD = ["batch", "microbatch", "learning rate", "best loss", "steps", "samples", "spread", "time", "noise scale"]


def table(batches: Sequence[BatchResult], *, width: int | None = None) -> str:
    """Write one line for each batch size.

    Args:
        batches: The results.
        width: Columns that there are; `None` for no limit. Columns that do not fit are left out.

    Returns:
        Several lines, the first of them the headings. Steps, samples and time are those to the target.
    """
    rows = [_HEAD, *(list(_row(each)) for each in batches)]
    spare = ("microbatch", "spread", "noise scale", "learning rate", "best loss")
    return aligned(fitting(rows, spare, width))


def target_line(target: float | None, *, given: bool, measure: str) -> str:
    """Write what steps, samples and time are counted to.

    Args:
        target: The loss; `None` if no run ended well.
        given: Whether the caller set it.
        measure: What the curves show.

    Returns:
        One line.
    """
    if target is None:
        return "no target: no run ended well"
    origin = "as asked" if given else "the worst of the runs' best losses, which all of them reached"
    return f"steps, samples and time to a {measure} of {target:.4g} ({origin})"


def reading(advice: str, critical: CriticalBatch | None, noise: float | None) -> Iterator[str]:
    """Yield the sentences that follow from the table.

    Args:
        advice: What `advise` returned.
        critical: The fit; `None` where there is none.
        noise: The noise scale, in samples; `None` where it was not measured.

    Yields:
        The advice, the fit, and the comparison with the noise scale.
    """
    yield advice
    if critical is not None:
        yield critical_line(critical)
        yield from _against_noise(critical, noise)


def advise(batches: Sequence[BatchResult], critical: CriticalBatch | None) -> str:
    """Write what follows for the choice of the batch size.

    Args:
        batches: The results, smallest batch first.
        critical: The fit; `None` where there is none.

    Returns:
        One or two sentences.
    """
    reached = [each for each in batches if each.samples is not None]
    if len(reached) < 2:
        if len(batches) < 2:
            return "One batch size alone cannot be compared with anything: give at least two."
        return "Fewer than two batch sizes reached the target with every seed, so the data show no difference."
    first, last = reached[0], reached[-1]
    text = (
        f"{last.batch_size:,} takes {_ratio(last.steps, first.steps)} of the steps and "
        f"{_ratio(last.samples, first.samples)} of the samples of {first.batch_size:,}"
    )
    if critical is not None and _within_scatter(first, last, critical):
        text += " (within the spread of the seeds, it may be the same number)"
    return f"{text}. {_cap(_harmless(reached, critical))}.{_fastest(reached)}"


def critical_line(critical: CriticalBatch) -> str:
    """Write the fit.

    Args:
        critical: The fit.

    Returns:
        One sentence or two.
    """
    least = f"at least {critical.steps:,.3g} steps and {critical.samples:,.3g} samples"
    check = (
        "two batch sizes cannot check the law"
        if critical.sizes == 2
        else f"the samples lie {critical.misfit:.1%} off the law"
    )
    if not critical.lawful:
        return (
            f"Critical batch size: the law does not hold here ({check}), perhaps because some batch has a bad rate. "
            f"So {critical.batch_size:,.3g} is a rough place only."
        )
    if critical.seeds < 2 and critical.inside:
        return (
            f"Critical batch size: about {critical.batch_size:,.3g}, with {least}; {check}. "
            "One seed gives no uncertainty."
        )
    if critical.found:
        ends = f"{critical.low:,.3g} to {critical.high:,.3g}"
        return f"Critical batch size: {critical.batch_size:,.3g} ({ends}), with {least}; {check}."
    if critical.low is not None:
        return f"Critical batch size: above {critical.low:,.3g}; these runs do not show how far above. {_cap(check)}."
    if critical.high is not None:
        return f"Critical batch size: below {critical.high:,.3g}; these runs do not show how far below. {_cap(check)}."
    return "Critical batch size: not known from these runs; use more seeds, more samples, or sizes further apart."


def _against_noise(critical: CriticalBatch, noise: float | None) -> Iterator[str]:
    if noise is None:
        yield "Noise scale: not measured on the way, so there is nothing to compare the critical batch size with."
        return
    low, high = critical.low or 0.0, critical.high or math.inf
    if not critical.lawful or critical.seeds < 2 or critical.low is critical.high is None:
        yield f"Noise scale: {noise:,.3g} on the way; the fit is too uncertain to compare."
    elif low <= noise <= high:
        yield f"Noise scale: {noise:,.3g} on the way, within the interval of the critical batch size."
    else:
        factor = noise / critical.batch_size
        word = f"{factor:.2g} times" if factor >= 1 else f"1/{1 / factor:.2g} of"
        yield f"Noise scale: {noise:,.3g} on the way, {word} the critical batch size and outside its interval."


def _harmless(reached: Sequence[BatchResult], critical: CriticalBatch | None) -> str:
    smallest, largest = reached[0].batch_size, reached[-1].batch_size
    if critical is not None and not critical.lawful:
        return "the samples do not follow the law, so it does not show from which size on they are lost"
    untold = "the data do not show from which size on samples are lost"
    least = None if critical is None else critical.batch_size if critical.found else critical.low
    if critical is None or least is None:
        return untold
    harmless = harmless_size(least, smallest)
    if harmless >= largest:
        return f"up to {largest:,}, a larger batch takes at most a tenth more samples"
    if not critical.found:
        return untold
    return f"below {harmless:,.3g} you lose nothing (at most a tenth more samples than {smallest:,})"


def _fastest(reached: Sequence[BatchResult]) -> str:
    timed = [(each.seconds, each.batch_size) for each in reached if each.seconds is not None]
    if len(timed) < 2:
        return ""
    seconds, size = min(timed)
    return f" On this machine {size:,} is the fastest to the target: {format_time(seconds)}."


def _within_scatter(first: BatchResult, last: BatchResult, critical: CriticalBatch) -> bool:
    if critical.scatter is None or not first.samples or not last.samples:
        return False
    error = critical.scatter * math.sqrt(1 / first.seeds + 1 / last.seeds)
    return abs(math.log(last.samples / first.samples)) < 2 * error


def _ratio(one: float | None, other: float | None) -> str:
    return f"{(one or 0.0) / (other or 1.0):.2f}"


def _row(each: BatchResult) -> tuple[str, ...]:
    return (
        f"{each.batch_size:,}",
        f"{each.microbatch_size:,}",
        f"{each.learning_rate:.3g}",
        "-" if each.best_loss is None else f"{each.best_loss:.4g}",
        "-" if each.steps is None else f"{each.steps:,.0f}",
        "-" if each.samples is None else f"{each.samples:,.0f}",
        "-" if each.spread is None else f"{each.spread:.1%}",
        "-" if each.seconds is None else format_time(each.seconds),
        "-" if each.noise_scale is None else f"{each.noise_scale:,.3g}",
    )


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]
