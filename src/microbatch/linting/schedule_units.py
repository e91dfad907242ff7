"""What the length of a schedule counts, where a setting gives it: microbatches or optimizer steps.

A setting counts what the counter counts that the loop compares with it: `if step >= args.max_steps: break`.
"""

import ast
import re
from collections.abc import Iterator

from microbatch.linting.guesses import kind_of_constructor, kind_of_name, names_window
from microbatch.linting.module import Module
from microbatch.linting.syntax import FunctionNode, Loop, dotted, last_name, text_of

__all__ = [
    "MICROBATCHES",
    "WINDOWS",
    "chosen_by",
    "counts",
    "lengths_of",
    "made_in_rows",
    "place_of_count",
    "schedule_units",
    "schedules",
]

MICROBATCHES, WINDOWS = "microbatches", "windows"
_EPOCHS = re.compile(r"epoch", re.IGNORECASE)
LENGTHS = frozenset({"num_training_steps", "t_total", "total_steps", "T_max"})
_OF_ROWS = re.compile(r"(data|lines|samples|examples|queries|rows|pairs|texts|sentences|records)$", re.IGNORECASE)
_LENGTHS = re.compile(r"step|iter|update|total|batches|_len|t_max|horizon|schedule", re.IGNORECASE)


def schedule_units(module: Module) -> str:
    """What the lengths of all schedules of a file count.

    Returns:
        "microbatches" or "windows"; empty where the file does not show it, or has both.
    """
    counted = dict(_settings(module))
    found = {_unit(module, call, counted) for call in schedules(module)} - {""}
    return found.pop() if len(found) == 1 else ""


def chosen_by(module: Module) -> str:
    """The condition that chooses a schedule with such a length, or one for which the file shows no unit; or nothing."""
    counted, made = dict(_settings(module)), list(schedules(module))
    known = [call for call in made if _unit(module, call, counted)]
    for call in known:
        for around in module.above(call):
            if isinstance(around, ast.If):
                sides = [{n for s in side for n in ast.walk(s)} for side in (around.body, around.orelse)]
                other = sides[call in sides[0]]
                if any(each in other for each in made) and not any(each in other for each in known):
                    return text_of(around.test)
    return ""


def made_in_rows(module: Module) -> ast.Call | None:
    """Where a schedule is made whose length is a number of rows, which nothing divides: `len(lines) * epochs`."""
    for call in schedules(module):
        holder = next((p for p in module.around(call) if isinstance(p, FunctionNode)), module.tree)
        for length in lengths_of(call):
            made = [
                s.value
                for s in ast.walk(holder)
                if isinstance(s, ast.Assign) and isinstance(length, ast.Name) and dotted(s.targets[0]) == length.id
            ]
            value = made[0] if len(made) == 1 else length
            parts = list(ast.walk(value))
            counted = [p.args[0] for p in parts if isinstance(p, ast.Call) and dotted(p.func) == "len" and p.args]
            divided = any(isinstance(p, (ast.Div, ast.FloorDiv, ast.Mod)) for p in parts)
            if counted and not divided and all(_OF_ROWS.search(last_name(each)) for each in counted):
                return call
    return None


def schedules(module: Module) -> Iterator[ast.Call]:
    """The calls that make a schedule."""
    for node in module.nodes:
        if isinstance(node, ast.Call) and kind_of_constructor(dotted(node.func)) == "scheduler":
            if any(isinstance(arg, ast.expr) for arg in node.args) and module.resolve(node.func, None) is None:
                yield node
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and not dotted(node.value.func)
            and kind_of_name(dotted(node.targets[0])) == "scheduler"
        ):
            yield node.value


def lengths_of(call: ast.Call) -> list[ast.expr]:
    """What a call that makes a schedule gives as its length."""
    return [k.value for k in call.keywords if k.arg in LENGTHS] or call.args[2:3]


def _unit(module: Module, call: ast.Call, counted: dict[str, str]) -> str:
    """What one schedule counts, by the names in its arguments and in what these were made of."""
    found: set[str] = set()
    for arg in [*call.args[1:], *(keyword.value for keyword in call.keywords)]:
        names = _names(module, arg)
        if any(names_window(name) for name in names):
            return ""  # divided or multiplied by N: the simulation knows
        found |= {counted[name] for name in names if name in counted}
    return found.pop() if len(found) == 1 else ""


def _names(module: Module, node: ast.AST) -> set[str]:
    """The names in an expression, and those in what its names were assigned, in the same function."""
    holder = next((p for p in module.around(node) if isinstance(p, FunctionNode)), module.tree)
    found: set[str] = set()
    waiting = [last_name(n) for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute | ast.Subscript)]
    while waiting:
        name = waiting.pop()
        if not name or name in found or len(found) > 40:
            continue
        found.add(name)
        if not _LENGTHS.search(name):
            continue
        for other in ast.walk(holder):
            if isinstance(other, ast.Assign) and any(last_name(target) == name for target in other.targets):
                waiting += [last_name(n) for n in ast.walk(other.value) if isinstance(n, ast.Name | ast.Attribute)]
    return found


def _settings(module: Module) -> Iterator[tuple[str, str]]:
    """The names of settings that a loop counts up to, each with what it counts."""
    for node in module.nodes:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = _counter(node.left), node.comparators[0]
            for counter, other in ((left, right), (_counter(right), node.left)):
                setting = last_name(other.left) if isinstance(other, ast.BinOp) else last_name(other)
                if counter and setting and _LENGTHS.search(setting) and not _EPOCHS.search(setting):
                    unit = counts(module, counter)
                    if unit:
                        yield setting, unit
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call) and node.iter.args:
            setting = last_name(node.iter.args[-1])
            owner = module.owner_of(node)
            is_length = _LENGTHS.search(setting) and not _EPOCHS.search(setting) and not names_window(setting)
            ranges = last_name(node.iter.func) in ("range", "trange")
            if is_length and ranges and module.contains_backward(node, owner):
                holds = any(isinstance(n, ast.For) and module.is_microbatch_loop(n, owner) for n in ast.walk(node))
                yield setting, WINDOWS if holds and not module.is_microbatch_loop(node, owner) else MICROBATCHES


def _counter(node: ast.expr) -> str:
    """The name of a counter, under `+ 1`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        node = node.left
    return dotted(node)


def counts(module: Module, counter: str) -> str:
    """What a counter counts, by where one is added to it."""
    found: set[str] = set()
    for node in module.nodes:
        if (
            isinstance(node, ast.AugAssign)
            and isinstance(node.op, ast.Add)
            and dotted(node.target) == counter
            and isinstance(node.value, ast.Constant)
            and node.value.value == 1
        ):
            found.add(place_of_count(module, node))
    return found.pop() if len(found) == 1 else ""


def place_of_count(module: Module, node: ast.AST) -> str:
    """Whether a statement runs once a microbatch, or once for each step."""
    owner = module.owner_of(node)
    for around in module.above(node):
        if isinstance(around, ast.If):
            branch = around.body if node in {n for s in around.body for n in ast.walk(s)} else around.orelse
            is_synced = branch is around.body and "sync_gradients" in text_of(around.test)
            if is_synced or any(module.steps(s, owner) for s in branch):
                return WINDOWS
            if not module.contains_backward(around, owner):
                return ""  # now and then
        elif isinstance(around, Loop):
            if not module.contains_backward(around, owner):
                return ""
            if not module.is_microbatch_loop(around, owner):
                return WINDOWS if _window_inside(module, around, owner) else ""
            return MICROBATCHES
    return ""


def _window_inside(module: Module, loop: ast.AST, owner: str | None) -> bool:
    """Whether the microbatch loops inside of a loop are windows: the step stands after them."""
    inner = [n for n in ast.walk(loop) if isinstance(n, Loop) and n is not loop and module.is_microbatch_loop(n, owner)]
    return bool(inner) and not any(module.steps(s, owner) for each in inner for s in each.body)
