"""A rule as text: what it finds, what the fault does, and the smallest loops with and without it."""

from __future__ import annotations

from textwrap import fill, indent

from microbatch.linting.rules.rule import Rule

__all__ = ["explain_form"]


def explain_form(rule: Rule) -> str:
    """Write what `microbatch doctor --explain` prints.

    Args:
        rule: The rule.

    Returns:
        Paragraphs of at most 100 characters a line, and code.
    """
    parts = [f"{rule.code} {rule.name} ({rule.severity})", fill(rule.summary, 100)]
    texts = (
        ("What happens", rule.happens),
        ("How much", rule.how_much),
        ("Fix", rule.fix),
        ("Certain only if", rule.certain),
    )
    parts += [fill(f"{title}: {text}", 100) for title, text in texts if text]
    parts += [
        f"{title}:\n{indent(code, '    ')}" for title, code in (("Wrong", rule.wrong), ("Right", rule.right)) if code
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
