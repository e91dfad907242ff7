"""MB301 and MB304 by units: what counts microbatches is compared with what counts optimizer steps.

A length of a loader counts microbatches; divided by N it counts steps. A number of steps times N counts microbatches
again. Rows divided by the rows of a microbatch count microbatches. A counter counts what its `+= 1` stands in. Where
all that a name is given has one unit, the name has it.
"""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import TypeGuard

from microbatch.linting.faults import Fault
from microbatch.linting.guesses import LOADER_WORDS
from microbatch.linting.module import Module
from microbatch.linting.schedule_units import MICROBATCHES, WINDOWS, lengths_of, place_of_count, schedules
from microbatch.linting.syntax import FunctionNode, dotted, last_name, pairs, text_of

__all__ = ["loaders_give_windows", "mixed_units", "units_of_lengths"]

_SAME = frozenset({"int", "float", "ceil", "floor", "round", "max", "min", "abs"})
_WORDS = {MICROBATCHES: "microbatches", WINDOWS: "optimizer steps"}
_RESUMES = re.compile(r"resum|skip|restor|trained|start|first|begin", re.IGNORECASE)
_WARMS = re.compile(r"warm", re.IGNORECASE)
_ENDS = re.compile(r"max|total|t_total|num_train|limit", re.IGNORECASE)


def mixed_units(module: Module) -> list[Fault]:
    """Find the first comparison or division of a number of microbatches and a number of steps.

    Args:
        module: The file.

    Returns:
        The fault, where it decides what a resumed run skips, where a warmup ends or where training ends.
    """
    try:
        return list(_mixed(module))
    except RecursionError:  # made of itself over very many names
        return []


def units_of_lengths(module: Module) -> str:
    """What the lengths of all schedules of a file count, where functions of the file hand them on.

    Args:
        module: The file.

    Returns:
        "microbatches" or "windows"; empty where the file does not show it, or has both.
    """
    units = _Units(module)
    try:
        found = {units.of(length) for call in schedules(module) for length in lengths_of(call)} - {""}
    except RecursionError:
        return ""
    return found.pop() if len(found) == 1 else ""


def loaders_give_windows(module: Module) -> bool:
    """Whether a loop of the file takes a whole window from a loader, and cuts it: the loader's length counts steps.

    Args:
        module: The file.

    Returns:
        Whether there is one, and no loop takes single microbatches from a loader.
    """
    loops = [node for node in module.nodes if isinstance(node, ast.For) and LOADER_WORDS.search(text_of(node.iter))]
    loops = [node for node in loops if not text_of(node.iter).startswith(("range(", "trange("))]
    trains = [node for node in loops if module.contains_backward(node, module.owner_of(node))]
    return bool(trains) and not any(module.is_microbatch_loop(node, module.owner_of(node)) for node in trains)


def _mixed(module: Module) -> Iterator[Fault]:
    units = _Units(module)
    for node in module.nodes:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = node.left, node.comparators[0]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod):
            left, right = node.left, node.right
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
            left, right = node.target, node.value
        else:
            continue
        mine, other = units.of(left), units.of(right)
        if not mine or not other or mine == other:
            continue
        statement = module.statement_of(node) or node
        made = [text_of(target) for target in statement.targets] if isinstance(statement, ast.Assign) else []
        resumes = _RESUMES.search(" ".join([text_of(left), text_of(right), *made])) is not None
        ends = isinstance(node, ast.Compare) and mine == MICROBATCHES and _ENDS.search(text_of(right)) is not None
        if isinstance(node, ast.Compare) and _WARMS.search(text_of(right)):
            much = "it takes N times its steps" if mine == WINDOWS else "it ends after 1/N of its steps"
            message = (
                f"the length of the warmup, `{text_of(right)}`, counts {_WORDS[other]}, and `{text_of(left)}` counts "
                f"{_WORDS[mine]}: {much}"
            )
            yield Fault("MB301", statement, message)
            return
        if resumes or ends:
            what = "a resumed run begins at another place" if resumes else "training ends after 1/N of its steps"
            message = f"`{text_of(left)}` counts {_WORDS[mine]} and `{text_of(right)}` {_WORDS[other]}: {what}"
            yield Fault("MB304", statement, message)
            return


class _Units:
    """What the numbers of a file count."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.known: dict[tuple[ast.AST | None, str], str] = {}
        self.given: dict[str, list[tuple[ast.AST, ast.AST]]] = {}
        self.calls: dict[str, list[ast.Call]] = {}
        self.of_windows: set[str] = set()  # loaders that give a whole window at a time
        self.rows: dict[str, str] = {}  # the rows of a microbatch, and those of all N, where N is made of both
        self.written: list[tuple[str, ast.expr]] = []  # what stands in formatted texts, with the text before it
        for node in module.nodes:
            if isinstance(node, ast.JoinedStr):
                for before, each in pairwise(node.values):
                    if isinstance(before, ast.Constant) and isinstance(each, ast.FormattedValue):
                        self.written.append((str(before.value), each.value))
            elif isinstance(node, ast.Assign):
                for target, value in pairs(node):
                    self.given.setdefault(dotted(target), []).append((node, value))
                    quotient = value.args[0] if isinstance(value, ast.Call) and value.args else value
                    if module.is_window(target) and _is_quotient(quotient) and "batch" in last_name(quotient.right):
                        self.rows[dotted(quotient.right)] = dotted(quotient.left)
            elif isinstance(node, ast.AugAssign):
                self.given.setdefault(dotted(node.target), []).append((node, node))
            elif isinstance(node, ast.For):
                self._count_of_loop(node)
            elif isinstance(node, ast.Call):
                self.calls.setdefault(last_name(node.func), []).append(node)

    def _count_of_loop(self, node: ast.For) -> None:
        """`for step, batch in enumerate(loader)`: the first name counts microbatches, if each batch is one."""
        owner = self.module.owner_of(node)
        if self.module.contains_backward(node, owner) and not self.module.is_microbatch_loop(node, owner):
            self.of_windows.update(dotted(part) for part in ast.walk(node.iter) if isinstance(part, ast.expr))
        if not (isinstance(node.target, ast.Tuple) and isinstance(node.iter, ast.Call)):
            return
        counts = any(isinstance(n, ast.Call) and last_name(n.func) == "enumerate" for n in ast.walk(node.iter))
        if counts and self.module.is_microbatch_loop(node, self.module.owner_of(node)):
            self.given.setdefault(dotted(node.target.elts[0]), []).append((node, node))

    def of(self, node: ast.AST) -> str:
        """What an expression counts: "microbatches", "windows", or nothing that the file shows."""
        if isinstance(node, ast.Call):
            if dotted(node.func) == "len" and node.args and _is_loader(node.args[0]):
                return "" if dotted(node.args[0]) in self.of_windows else MICROBATCHES
            if last_name(node.func) in _SAME:
                return self._one(node.args) or self._of_file_name(node)
            return ""
        if isinstance(node, ast.BinOp):
            return self._of_operation(node)
        return self._of_name(node) if dotted(node) else ""

    def _of_file_name(self, node: ast.Call) -> str:
        """What a number counts that is read out of the name of a checkpoint: what the file writes into such names."""
        words = {
            each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)
        }
        words = {word for word in words if re.search(r"[a-z]+[-_]?$", word)}
        return self._one([value for before, value in self.written if any(before.endswith(word) for word in words)])

    def _of_operation(self, node: ast.BinOp) -> str:
        if isinstance(node.op, ast.Mult):
            if self.module.is_window(node.right) or self.module.is_window(node.left):
                other = node.left if self.module.is_window(node.right) else node.right
                return "" if self.of(other) == MICROBATCHES else MICROBATCHES
            return self._one([node.left, node.right])
        left = self.of(node.left)
        if isinstance(node.op, ast.Div | ast.FloorDiv):
            if self.module.is_window(node.right):
                return WINDOWS if left == MICROBATCHES else ""
            whole = self.rows.get(dotted(node.right))
            if whole is not None:
                return MICROBATCHES if dotted(node.left) != whole else ""
            return left if re.search(r"process|world|rank|gpu|device", text_of(node.right)) else ""
        if isinstance(node.op, ast.Mod):
            return left or self.of(node.right)
        return self._one([node.left, node.right]) if isinstance(node.op, ast.Add | ast.Sub) else ""

    def _one(self, nodes: list[ast.expr]) -> str:
        found = {self.of(node) for node in nodes} - {""}
        return found.pop() if len(found) == 1 else ""

    def _of_name(self, node: ast.AST) -> str:
        name = dotted(node)
        if self.module.is_window(node):
            return ""
        holder = (
            None if "." in name else next((p for p in self.module.around(node) if isinstance(p, FunctionNode)), None)
        )
        key = holder, name
        if key not in self.known:
            self.known[key] = ""  # a name that is made of itself
            given = [
                (statement, value)
                for statement, value in self.given.get(name, [])
                if holder is None or holder in self.module.around(statement)
            ]
            found = {self._of_given(statement, value) for statement, value in given} - {""}
            if holder is not None and not given:
                handed = list(self._handed_over(holder, name))
                found = {self.of(value) for value in handed} - {""}
                if not handed and name not in {arg.arg for arg in ast.walk(holder.args) if isinstance(arg, ast.arg)}:
                    found = {self._of_given(*each) for each in self._of_file(name)} - {""}
            self.known[key] = found.pop() if len(found) == 1 else ""
        return self.known[key]

    def _of_file(self, name: str) -> list[tuple[ast.AST, ast.AST]]:
        """What the file itself, outside of functions, gives to a name."""
        given = self.given.get(name, [])
        return [each for each in given if not any(isinstance(p, FunctionNode) for p in self.module.around(each[0]))]

    def _handed_over(self, holder: FunctionNode, name: str) -> Iterator[ast.expr]:
        """What the calls of a function in this file give to one of its parameters."""
        names = [arg.arg for arg in holder.args.args if arg.arg not in ("self", "cls")]
        for node in self.calls.get(holder.name, []) if name in names else ():
            yield from (k.value for k in node.keywords if k.arg == name)
            yield from node.args[names.index(name) : names.index(name) + 1]

    def _of_given(self, statement: ast.AST, value: ast.AST) -> str:
        if isinstance(statement, ast.For):
            return MICROBATCHES
        if not isinstance(statement, ast.AugAssign):
            return self.of(value)
        if isinstance(statement.op, ast.Add) and isinstance(statement.value, ast.Constant):
            return place_of_count(self.module, statement) if statement.value.value == 1 else ""
        return ""


def _is_quotient(node: ast.AST) -> TypeGuard[ast.BinOp]:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div | ast.FloorDiv)


def _is_loader(node: ast.expr) -> bool:
    name = last_name(node) or (last_name(node.value) if isinstance(node, ast.Subscript) else "")
    return LOADER_WORDS.search(name) is not None and not name.endswith(("set", "data"))
