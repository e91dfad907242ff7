"""Write the pages of the doctor from its rules: ``python tests/house/doctor_pages.py``."""

from pathlib import Path

from microbatch.linting.rules.rule import Rule
from microbatch.linting.rules.table import FAMILIES, RULES

DOCS = Path(__file__).parents[2] / "docs"
FOLDER, OVERVIEW = DOCS / "doctor", DOCS / "doctor.md"
BEGIN, END = "<!-- rules: written by tests/house/doctor_pages.py -->\n", "<!-- end of rules -->\n"


def page(rule: Rule) -> str:
    """Return the page of one rule."""
    parts = [
        f"# {rule.code}: {rule.name}",
        f"**{rule.summary}** Severity: {rule.severity}.",
        f"## What happens\n\n{rule.happens}",
    ]
    if rule.how_much:
        parts.append(f"## How much\n\n{rule.how_much}\n\nHow this was measured: [the doctor](../doctor.md#how-much).")
    parts += [
        f"## What to write\n\n{rule.fix}",
        f"## A loop that has it\n\n{code(rule, rule.wrong)}",
        f"## The same loop without it\n\n{code(rule, rule.right)}",
        f"## When it is certain\n\n{rule.certain}",
    ]
    if rule.code != "MB000":
        parts.append(
            "## If it is meant\n\n"
            f"Write `# microbatch: ignore[{rule.code}] reason` at the end of the line, or put `{rule.code}` under "
            "`ignore` in [pyproject.toml](../doctor.md#settings)."
        )
    parts.append("[All rules, and the names that the loops use](../doctor.md)")
    return "\n\n".join(parts) + "\n"


def code(rule: Rule, source: str) -> str:
    """Return source as a fenced block; the one that is not Python is text."""
    language = "text" if (rule.code, source) == ("MB000", rule.wrong) else "python"
    return f"```{language}\n{source}```"


def table() -> str:
    """Return the table of all rules, one for each family."""
    parts: list[str] = []
    for family, title in FAMILIES.items():
        rows = [
            f"| [{rule.code}](doctor/{rule.code}.md) | `{rule.name}` | {rule.severity} | {rule.summary} |"
            for rule in RULES.values()
            if rule.code.startswith(family)
        ]
        parts.append(
            "\n".join([f"### {title}\n", "| code | name | severity | what it finds |", "|---|---|---|---|", *rows])
        )
    return "\n" + "\n\n".join(parts) + "\n\n"


def overview(text: str) -> str:
    """Return the page of the doctor with the table put in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def pages() -> dict[Path, str]:
    """Return every page of the doctor, by its path."""
    written = {FOLDER / f"{rule.code}.md": page(rule) for rule in RULES.values()}
    return written | {OVERVIEW: overview(OVERVIEW.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
