"""What a rule is made of."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["OFF", "PLAIN_LOOP", "Rule", "Severity"]

# How `Rule.how_much` begins where a run was compared with the full batch's; "SGD 92 %; AdamW 3 %." follows.
OFF = "After about 60 steps with N = 4, the weights are off by this share of the distance they travelled: "

# The right loop, for rules whose fault is a line more or a line less than this.
PLAIN_LOOP = """\
for step in range(steps):
    for k in range(N):
        x, y = next(batches)
        loss = criterion(model(x), y) / N
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""

Severity = Literal["error", "warning", "logging", "speed", "input"]


@dataclass(frozen=True)
class Rule:
    """One rule of the doctor.

    Attributes:
        code: Such as "MB105". It never changes its meaning.
        name: Such as "window-phase".
        severity: "error" changes the training badly, "warning" changes it somewhat, "logging" reports a wrong number,
            "speed" costs time or memory alone, "input" is about what the doctor could not read.
        summary: What the fault is, in one sentence.
        happens: What the optimizer sees because of it, in two to four sentences.
        how_much: What was measured, by optimizer.
        fix: What to write instead, in one or two sentences.
        wrong: The smallest loop that has the fault, as source. Empty for rules without a loop.
        right: The same loop without it. The doctor finds nothing in it.
        certain: What the file has to show before the finding is certain.
    """

    code: str
    name: str
    severity: Severity
    summary: str
    happens: str
    how_much: str
    fix: str
    wrong: str
    right: str
    certain: str
