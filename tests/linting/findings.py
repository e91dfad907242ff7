"""Findings that tests of the doctor's screens are given, and a reader that makes them from marks in the source."""

import re
from pathlib import Path

from microbatch.linting.finding import Confidence, Edit, Finding
from microbatch.linting.sources import Source

CONFIDENCE: dict[str, Confidence] = {"!": "certain", "?": "depends", ".": "note"}
MARK = re.compile(r"# (MB\d\d\d)([!?.])(~?)")


def judge(source: Source, folder: Path | None) -> list[Finding]:
    """Find what marks say: `# MB105!` is certain, `# MB110?` depends, and `~` has an edit that removes the mark."""
    found = list[Finding]()
    for number, line in enumerate(source.lines, 1):
        for mark in MARK.finditer(line):
            edit = Edit(number, number, line[: mark.start()].rstrip() + "\n")
            depends = mark[2] == "?"
            found.append(
                Finding(
                    rule=mark[1],
                    path=source.path,
                    line=number,
                    column=len(line) - len(line.lstrip()) + 1,
                    confidence=CONFIDENCE[mark[2]],
                    message=f"{mark[1]} of {line.strip().split('  ')[0]}",
                    happens="Step 1 takes microbatch 0 alone." if mark[1] == "MB105" else "",
                    how_much="19 % with SGD." if mark[1] == "MB105" else "",
                    fix="Count from 1." if mark[1] == "MB105" else "",
                    needs=("len(loader) % N",) if depends else (),
                    edits=(edit,) if mark[3] else (),
                    window="step 1: 0\nstep 2: 1 2 3 4" if mark[1] == "MB105" else "",
                    function="train",
                    microbatches=4,
                )
            )
    return found


LOOP = """\
def train(loader, N):
    for i, x in enumerate(loader):
        loss = f(x)  # MB601!
        loss.backward()  # MB501!
        print(loss.item())  # MB601!
        if i % N == 0:  # MB105!~
            optimizer.step()  # MB110?
"""
