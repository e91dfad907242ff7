"""What a rule's fault changes, for the optimizer that a file uses."""

from microbatch.linting.rules.rule import OFF, Rule

__all__ = ["how_much_for"]


def how_much_for(rule: Rule, optimizer: str = "", *, clipped: bool | None = None) -> str:
    """Return what was measured for a rule, without the optimizers that a file does not use.

    Args:
        rule: The rule.
        optimizer: The name of the optimizer's class, such as "Adam8bit"; empty where it is not known. Names that
            contain "SGD" or "Adam" have their own numbers; for other ones everything is returned.
        clipped: Whether gradients are clipped; `None` where that is not known.

    Returns:
        `Rule.how_much`, or the part of it that is about this optimizer.

    Example:
        >>> from microbatch.linting.rules.table import RULES
        >>> how_much_for(RULES["MB102"], "Adam").removeprefix(OFF)
        "AdamW nothing that can be seen (1e-6). The gradient is a quarter of the full batch's."
    """
    measured, end, rest = rule.how_much.removeprefix(OFF).partition(". ")
    family = next((each for each in ("SGD", "Adam") if each in optimizer), None)
    if not rule.how_much.startswith(OFF) or family is None:
        return rule.how_much
    lines = [each for each in measured.split("; ") if each.startswith(family)]
    asked = [each for each in lines if clipped is None or (" with clipping" in each) is clipped]
    return OFF + "; ".join(asked or lines) + end + rest
