"""The place where a reader pastes a loop, and the loops that are there to try."""

from __future__ import annotations

from html import escape
from pathlib import Path

from microbatch.guide.paste_check import MOST_SOURCE
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


def paste_html(*, recorded: bool) -> str:
    """Write the place where a loop is pasted.

    Args:
        recorded: Whether there is no server to send it to.

    Returns:
        A text area with its buttons, and the places where findings are shown; or the command that reads a file.
    """
    room = Path(__file__).parent
    if recorded:
        return (room / "paste_recorded.html").read_text(encoding="utf-8")
    buttons = "".join(
        f'<li><button type="button" data-loop="{escape(source)}" aria-pressed="{str(source is TWO_FAULTS).lower()}">'
        f"{escape(title)}</button></li>"
        for title, source in LOOPS.items()
    )
    text = (room / "paste.html").read_text(encoding="utf-8")
    places = {"loops": buttons, "first": escape(TWO_FAULTS), "most": str(MOST_SOURCE)}
    for name, piece in places.items():
        text = text.replace("[[" + name + "]]", piece)
    return text
