"""MB104 where the file has an option for N, and its loop steps after every microbatch without asking for it."""

import ast
import re

from microbatch.linting.faults import Fault
from microbatch.linting.guesses import kind_of_constructor, kind_of_name
from microbatch.linting.module import Module
from microbatch.linting.runs import Outcome, Root
from microbatch.linting.schedule_units import LENGTHS
from microbatch.linting.syntax import FunctionNode, dotted, last_name, pairs

__all__ = ["ignored_option"]

_OPTION = re.compile(r"accum|(^|_)(grad|ga)_?acc", re.IGNORECASE)
# What only counts: steps, epochs, the rows of a whole batch.
_COUNTS = re.compile(
    r"total|steps?$|updates|iter|epochs?$|warmup|batch_size|batches|^t_|num_|^(base_)?(lr|learning_rate)$",
    re.IGNORECASE,
)
_SHOWS = re.compile(r"^_?(print\w*|log\w*|info|debug|warning|write|format|str)$")


def ignored_option(module: Module, roots: list[Root]) -> list[tuple[Fault, Outcome]]:
    """Find an option for N that nothing but counts and messages read, beside a loop that steps in every microbatch.

    A schedule whose length is multiplied by it is then N times too long.

    Args:
        module: The file.
        roots: All its runs.

    Returns:
        The faults with a run that shows them; none where N may have an effect.
    """
    outcomes = [outcome for root in roots for outcome in root.outcomes]
    if not outcomes or not all(root.complete for root in roots) or not all(map(_steps_each_time, outcomes)):
        return []
    option = next((node for node in module.nodes if _is_option(module, node)), None)
    setting = next((node for node in module.nodes if _is_setting(module, node)), None)
    if option is None and setting is None:
        return []
    plain = (pair for node in module.nodes if isinstance(node, ast.Assign) for pair in pairs(node))
    others = {last_name(target) for target, value in plain if _OPTION.search(last_name(value))}  # other names for N
    if not all(_only_counts(module, node) for node in module.nodes if _reads(module, node, others)):
        return []
    name = _name_of(option) if option is not None else last_name(setting) if setting is not None else ""
    step = next(step for step in outcomes[0].trace.steps if step.since)
    message = (
        f"`{name}` is an option here, and the optimizer steps after every microbatch: the option accumulates nothing"
    )
    certain, needs = option is not None, (f"what else reads `{name}`",)
    found = [(Fault("MB104", step.node, message, certain=certain, needs=() if certain else needs), outcomes[0])]
    schedule = next((node for node in module.nodes if isinstance(node, ast.Call) and _is_stretched(module, node)), None)
    if schedule is not None:
        message = (
            f"the schedule's length is multiplied by `{name}` and it advances with every step: only 1/N of it is walked"
        )
        found.append((Fault("MB301", schedule, message, data={"kind": "length"}), outcomes[0]))
    return found


def _is_stretched(module: Module, call: ast.Call) -> bool:
    """Whether a call makes a schedule that is given a length times N."""
    if kind_of_constructor(dotted(call.func)) != "scheduler":
        return False
    lengths = [each.value for each in call.keywords if each.arg in LENGTHS] or call.args[2:3]
    return any(
        isinstance(each, ast.BinOp)
        and isinstance(each.op, ast.Mult)
        and any(map(module.is_window, (each.left, each.right)))
        for each in lengths
    )


def _steps_each_time(outcome: Outcome) -> bool:
    """Whether one run shows a loop that steps after each microbatch, and nothing on the way was opaque."""
    trace = outcome.trace
    steps = [step for step in trace.steps if step.since]
    ticks = {b.tick for b in trace.backwards}
    managed = bool(trace.frameworks - {"ddp", "sync switch"})
    if trace.opaque or managed or "assumed" in trace.settings or len(ticks) < 2:
        return False
    return all(len(step.since) == 1 for step in steps) and {step.tick for step in steps} >= ticks


def _is_option(module: Module, node: ast.AST) -> bool:
    """Whether a node gives N a place in the command line, or in the parameters of the function with the loop."""
    name = _name_of(node)
    if not name or not _OPTION.search(name) or not module.is_window(ast.Name(name, ast.Load())):
        return False
    if isinstance(node, ast.Call):
        return last_name(node.func) in ("add_argument", "option", "add_arg")
    holder = next((each for each in module.around(node) if isinstance(each, FunctionNode)), None)
    return holder is not None and any(module.contains_backward(each, module.owner_of(holder)) for each in holder.body)


def _is_setting(module: Module, node: ast.AST) -> bool:
    """Whether a node reads N from settings."""
    return isinstance(node, ast.Attribute) and _OPTION.search(node.attr) is not None and module.is_window(node)


def _name_of(node: ast.AST) -> str:
    if isinstance(node, ast.arg):
        return node.arg
    if isinstance(node, ast.Call):
        texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        long = next((text for text in texts if text.startswith("--")), "")
        return long.removeprefix("--").replace("-", "_")
    return ""


def _reads(module: Module, node: ast.AST, others: set[str]) -> bool:
    if not isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) or not isinstance(node.ctx, ast.Load):
        return False
    name = last_name(node)
    return name in others or (_OPTION.search(name) is not None and module.is_window(node))


def _only_counts(module: Module, node: ast.AST) -> bool:
    """Whether N is read here for a number of steps or rows, for a message, or to be refused."""
    inside = node
    while (parent := module.parents.get(inside)) is not None and not isinstance(parent, ast.stmt):
        if (
            isinstance(parent, ast.keyword)
            and _COUNTS.search(parent.arg or "")
            and not _OPTION.search(parent.arg or "")
        ):
            return True
        if isinstance(parent, ast.JoinedStr):
            return True
        if isinstance(parent, ast.Call) and inside is not parent.func:
            name = dotted(parent.func) or last_name(parent.func)
            if _SHOWS.match(last_name(parent.func)) or kind_of_name(name) == "log":
                return True
            if kind_of_constructor(name) == "scheduler":
                return True
            if name not in ("int", "float", "max", "min", "math.ceil", "ceil", "round", "math.floor", "len", "range"):
                return False
        inside = parent
    if isinstance(parent, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
        plain = parent.value is node  # another name for N, whose uses are looked at too
        return plain or all(_COUNTS.search(last_name(target)) is not None for target in targets)
    if isinstance(parent, ast.If):
        return bool(parent.body) and isinstance(parent.body[-1], ast.Raise)
    return isinstance(parent, ast.Assert)
