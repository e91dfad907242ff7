"""The windows of a run as text: which microbatches enter which step, and with which weight."""

from fractions import Fraction

from microbatch.linting.faults import fraction
from microbatch.linting.runs import Outcome

__all__ = ["draw"]

STEPS = 6  # steps that are drawn


def draw(outcome: Outcome) -> str:
    """The windows of one run.

    Each line is one step; `4*1/4` is microbatch 4 with the weight 1/4. The last line is what the full batch would have.

    Args:
        outcome: The run.

    Returns:
        The lines; empty where no step took a gradient.
    """
    trace, n = outcome.trace, outcome.run.microbatches
    steps = [step for step in trace.steps if step.since]
    if not steps:
        return ""
    count = {
        m: index
        for index, m in enumerate(sorted({m for b in trace.backwards for m in (b.tick, *b.loss.weights)}), start=1)
    }
    lines = [f"N = {n}" + (f", {outcome.run.length} microbatches an epoch" if trace.last_ticks else "")]
    for number, step in enumerate(steps[:STEPS], start=1):
        parts = []
        for m in step.since:
            weight = step.weights.get(m)
            parts.append(f"{count[m]}*{fraction(weight)}" if weight is not None else f"({count[m]} cleared)")
        older = [m for m in step.weights if m not in step.since and step.weights[m]]
        stale = f"  and again {', '.join(str(count[m]) for m in older[:6])}" if older else ""
        end = "   end of epoch" if step.tick in trace.last_ticks else ""
        lines.append(f"step {number} (line {getattr(step.node, 'lineno', 0)}): {'  '.join(parts)}{stale}{end}")
    if len(steps) > STEPS:
        lines.append(f"... and {len(steps) - STEPS} more steps")
    last = steps[-1].tick
    left = sorted({b.tick for b in trace.backwards if b.tick > last})
    if left:
        lines.append(f"never in a step: {', '.join(str(count[m]) for m in left[:8])}")
    lines.append(f"full batch: {n} microbatches * {fraction(Fraction(1, n))} each")
    return "\n".join(lines)
