"""Write `docs/combinations.md` from the table that refuses options: ``python tests/house/combinations_page.py``."""

from pathlib import Path

from microbatch.step.combinations import CLASHES, FEATURES, USES, Clash

PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
HEAD = """# What goes with what

Every option of `mb.Accumulator` goes with every other one, and with every way to call it, unless this page says no. A
combination that cannot work is refused when the accumulator is made, or at the call, with the words below; nothing is
ignored in silence. The page is written from the table that refuses
(`src/microbatch/step/combinations.py`), and a test holds it to that table.

In the matrix, a number is the row of the list below that says why two things do not go together; a dot means that they
work together.
"""


def page() -> str:
    """Return the page."""
    names = [name for name in (*FEATURES, *USES) if any(name in {each.first, each.second} for each in CLASHES)]
    numbers = {frozenset((each.first, each.second)): number for number, each in enumerate(CLASHES, start=1)}
    columns = [name for name in names if sum(name in pair for pair in numbers) > 3]
    lines = [HEAD, "## The matrix\n", f"| | {' | '.join(f'`{name}`' for name in columns)} |"]
    lines.append(f"|---|{'---|' * len(columns)}")
    for row in names:
        cells = [str(numbers.get(frozenset((row, column)), "·")) if row != column else "" for column in columns]
        lines.append(f"| `{row}` | {' | '.join(cells)} |")
    lines.append("\nPairs of two things that are no columns stand in the list alone.\n\n## Why, and what to do\n")
    lines.append("| | what | with what | why, and what to do |\n|---|---|---|---|")
    lines += [
        f"| {number} | `{each.first}` | `{each.second}` | {told(each)} |" for number, each in enumerate(CLASHES, 1)
    ]
    return "\n".join(lines) + "\n"


def told(clash: Clash) -> str:
    """Return why two things do not go together, as a cell of a table."""
    return clash.why.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
