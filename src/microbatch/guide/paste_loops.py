"""The loops that are there to try where a reader pastes one."""

from __future__ import annotations

from microbatch.linting.rules.clip_rules import CLIP_RULES
from microbatch.linting.rules.tail_rules import TAIL_RULES
from microbatch.linting.rules.weight_rules import WEIGHT_RULES

_RULES = {rule.code: rule for rule in (*WEIGHT_RULES, *TAIL_RULES, *CLIP_RULES)}

TWO_FAULTS = """\
import torch.nn.functional as F

for epoch in range(epochs):
    for i, (x, y) in enumerate(loader):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if i % N == 0:
            optimizer.step()
            optimizer.zero_grad()
"""

LOOPS = {
    "Two faults": TWO_FAULTS,
    "Cleared too early": _RULES["MB103"].wrong,
    "Clipped too often": _RULES["MB201"].wrong,
    "A short last window": _RULES["MB112"].wrong,
    "Without a fault": _RULES["MB105"].right,
}
"""Loops by what is on their buttons. The page begins with the first."""
