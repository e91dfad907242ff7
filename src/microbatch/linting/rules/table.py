"""All rules by their codes, and how they are selected."""

from microbatch.errors import LintError
from microbatch.linting.rules.clip_rules import CLIP_RULES
from microbatch.linting.rules.input_rules import INPUT_RULES
from microbatch.linting.rules.log_rules import LOG_RULES
from microbatch.linting.rules.loss_rules import LOSS_RULES
from microbatch.linting.rules.rule import Rule
from microbatch.linting.rules.schedule_rules import SCHEDULE_RULES
from microbatch.linting.rules.speed_rules import SPEED_RULES
from microbatch.linting.rules.tail_rules import TAIL_RULES
from microbatch.linting.rules.weight_rules import WEIGHT_RULES

__all__ = ["BY_NAME", "FAMILIES", "RULES", "chosen", "rule_of", "select"]

# What each family is about, by the beginning of its codes.
FAMILIES: dict[str, str] = {
    "MB0": "What could not be judged",
    "MB10": "The weights of microbatches",
    "MB11": "The last window, and windows that lose a microbatch",
    "MB2": "Clipping and scaling",
    "MB3": "Schedules and counters",
    "MB4": "The loss",
    "MB5": "Reductions over ranks",
    "MB6": "Time and memory",
    "MB7": "What is logged",
}

RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        *INPUT_RULES,
        *WEIGHT_RULES,
        *TAIL_RULES,
        *CLIP_RULES,
        *SCHEDULE_RULES,
        *LOSS_RULES,
        *SPEED_RULES,
        *LOG_RULES,
    )
}
BY_NAME = {rule.name: rule for rule in RULES.values()}


def rule_of(code_or_name: str) -> Rule:
    """Return the rule with a code such as "MB105", or with a name such as "window-phase".

    Raises:
        LintError: There is no such rule.
    """
    found = RULES.get(code_or_name.upper()) or BY_NAME.get(code_or_name.lower())
    if found is None:
        raise LintError(f"no rule has the code or name {code_or_name!r}; {known()}")
    return found


def select(*choices: str) -> tuple[Rule, ...]:
    """Return every rule that a choice names, in the order of their codes.

    Args:
        choices: Codes, beginnings of codes ("MB1" selects MB101 to MB114), names of rules, or "ALL".

    Returns:
        The rules, each of them once; none without a choice.

    Raises:
        LintError: A choice names no rule.

    Example:
        >>> [rule.code for rule in select("MB7", "window-phase")]
        ['MB105', 'MB701', 'MB702']
    """
    codes = {code for choice in choices for code in chosen(choice)}
    return tuple(rule for code, rule in RULES.items() if code in codes)


def chosen(choice: str) -> set[str]:
    """Return the codes that one choice names.

    Raises:
        LintError: It names no rule.
    """
    if choice.upper() == "ALL":
        return set(RULES)
    if choice.lower() in BY_NAME:
        return {BY_NAME[choice.lower()].code}
    found = {code for code in RULES if choice and code.startswith(choice.upper())}
    if not found:
        raise LintError(f"{choice!r} selects no rule; {known()}")
    return found


def known() -> str:
    """Return what may be named, for an error."""
    return f'there are {", ".join(RULES)}, their names, their beginnings such as "MB1", and "ALL"'
