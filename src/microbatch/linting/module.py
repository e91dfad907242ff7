"""What the doctor knows of a file before it runs it; here: the words for N, the number of microbatches of a window."""

import ast
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from microbatch.linting.guesses import names_window
from microbatch.linting.reach import Reach
from microbatch.linting.syntax import FunctionNode, dotted, is_gradient, last_name, pairs, steps_inside, text_of

__all__ = ["Module"]

_LIBRARY = re.compile(r"(torch|numpy|math|einops)(\.|$)")


class Module(Reach):
    """One parsed file.

    Args:
        tree: Its syntax tree.
    """

    def is_window(self, node: ast.AST) -> bool:
        """Whether a name is one of N."""
        text = dotted(node)
        found = text in self.windows[0] or names_window(last_name(node))
        return found and text not in self.counters

    @cached_property
    def understood(self) -> set[ast.AST]:
        """The divisions by N that a run saw divide a loss, a logged number or gradients."""
        return set()

    @cached_property
    def hints_at_accumulation(self) -> ast.AST | None:
        """A name for the number of microbatches, where no loop of it is in the file but a step may be."""
        if "Accumulator" in self.names_text or not any(self.touches_gradients(each, None) for each in self.tree.body):
            return None
        for node in self.nodes:
            if (
                isinstance(node, (ast.Name, ast.Attribute))
                and names_window(last_name(node))
                and dotted(node) not in self.counters
            ):
                return node
        return None

    @cached_property
    def counters(self) -> set[str]:
        """Names that count: added to, or set back to a small number inside of a loop."""
        found: set[str] = set()
        for node in self.nodes:
            if isinstance(node, ast.AugAssign) and isinstance(node.op, (ast.Add, ast.Sub)):
                found.add(dotted(node.target))
            elif isinstance(node, ast.Assign):
                for target, value in pairs(node):
                    is_count = (
                        isinstance(value, ast.BinOp)
                        and isinstance(value.op, ast.Add)
                        and dotted(value.left) == dotted(target)
                    )
                    is_reset = isinstance(value, ast.Constant) and type(value.value) is int and value.value == 0
                    if is_count or is_reset:
                        found.add(dotted(target))
            elif isinstance(node, ast.For):
                found.update(dotted(name) for name in ast.walk(node.target) if isinstance(name, ast.Name))
        found.discard("")
        return found

    @cached_property
    def handles_gradients(self) -> bool:
        """Whether the file reads or writes `.grad` itself, so that a gradient may be put back after it was cleared."""
        return any(isinstance(node, ast.Attribute) and is_gradient(node) for node in self.nodes)

    def has_other_window(self, value: int) -> bool:
        """Whether the file gives N a number, and never this one."""
        return bool(self._window_values) and value not in self._window_values

    @cached_property
    def _window_values(self) -> set[int]:
        """The numbers that stand for N, and those that the file gives to the names of N."""
        names, literals = self.windows
        last = {name.rpartition(".")[2] for name in names}
        found = set(literals)
        for node in self.nodes:
            for name, value in _values_of_names(node):
                if (
                    isinstance(value, ast.Constant)
                    and type(value.value) is int
                    and (name in last or names_window(name))
                ):
                    found.add(value.value)
        return found

    @cached_property
    def batch_sizes(self) -> set[str]:
        """The expressions that loaders of the file are given as their batch size; of names, the last word."""
        given = [
            keyword.value
            for node in self.nodes
            if isinstance(node, ast.Call)
            for keyword in node.keywords
            if keyword.arg == "batch_size"
        ]
        return {last_name(value) or text_of(value) for value in given}

    @cached_property
    def resets(self) -> set[str]:
        """Counters that a loop sets back to 0."""
        return {
            dotted(node.targets[0])
            for node in self.nodes
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant)
            and node.value.value == 0
            and dotted(node.targets[0]) in self.counters
            and self.is_inside_loop(node)
        }

    @cached_property
    def library_names(self) -> dict[str, str]:
        """Names that stand for something of torch, numpy or einops, each with its full name there."""
        found: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found.update((a.asname, a.name) for a in node.names if a.asname and _LIBRARY.match(a.name))
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level and _LIBRARY.match(node.module):
                found.update((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)
        return found

    def full_name(self, text: str) -> str:
        """The full name of a part of a library that the file imports under a name of its own."""
        first, dot, rest = text.partition(".")
        return self.library_names.get(first, first) + dot + rest

    @cached_property
    def counted_attributes(self) -> set[str]:
        """The last words of attributes that count."""
        return {name.rpartition(".")[2] for name in self.counters if "." in name}

    @cached_property
    def window_lists(self) -> set[str]:
        """Names of lists that hold the microbatches of one window: `for x, y in waiting:` with the step after it."""
        found: set[str] = set()
        for node in self.nodes:
            name = _iterated(node.iter) if isinstance(node, ast.For) else ""
            if not name or not isinstance(node, ast.For) or not (above := self.loops_above(node)):
                continue
            owner = self.owner_of(node)
            bound = any(
                isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id == name for n in ast.walk(above[0])
            )
            inside = any(self.steps(s, owner) for s in node.body)
            after = any(self.steps(s, owner) for s in above[0].body)
            if bound and after and not inside and self.is_microbatch_loop(node, owner):
                found.add(name)
        return found

    @cached_property
    def windows(self) -> tuple[set[str], set[int]]:
        """Expressions and literal numbers that stand where N stands.

        That is the modulus in a guard of the step, or the range of an inner loop.
        """
        names: set[str] = set()
        literals: set[int] = set()

        def add(node: ast.AST) -> None:
            if isinstance(node, ast.Constant):
                if isinstance(node.value, int) and not isinstance(node.value, bool) and node.value > 1:
                    literals.add(node.value)
            elif (text := dotted(node)) and text not in self.counters:
                literal = None if names_window(last_name(node)) else self._literal_of(node)
                if literal is None:
                    names.add(text)
                else:
                    literals.add(literal)

        for node in self.nodes:
            if isinstance(node, (ast.If, ast.IfExp)) and self._guards_step(node):
                self._moduli_of_guard(node, add)
            elif isinstance(node, ast.Call | ast.Yield):
                self._counts_given(node, add)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
                turns = isinstance(node.value.op, ast.Mod) and dotted(node.targets[0])  # `k = (k + 1) % n`
                if turns and any(dotted(n) == turns for n in ast.walk(node.value.left)) and self.is_inside_loop(node):
                    add(node.value.right)
            elif isinstance(node, ast.Assign) and isinstance(
                node.value, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.IfExp
            ):
                target = last_name(node.targets[0]).lower()
                if any(word in target for word in ("step", "update", "accum", "sync", "last", "boundary")):
                    _moduli(node.value, add, self.counters)
            elif (
                isinstance(node, ast.For)
                and isinstance(node.iter, ast.Call)
                and last_name(node.iter.func) in ("range", "trange")
            ):
                inner = self.is_inside_loop(node) or self.step_follows(node)
                if inner and node.iter.args and self.is_microbatch_loop(node, self.owner_of(node)):
                    end = node.iter.args[0] if len(node.iter.args) == 1 else node.iter.args[1]
                    if not (isinstance(end, ast.Call) or "len(" in text_of(end)):
                        add(end)
        return names, literals

    def _counts_given(self, node: ast.Call | ast.Yield, add: Callable[[ast.AST], None]) -> None:
        """Find N in what is handed on: a condition of the step, in a call or with a batch; the steps of Accelerate."""
        if isinstance(node, ast.Yield):
            for part in ast.walk(node):
                if isinstance(part, ast.Compare):
                    _moduli(part, add, self.counters)
            return
        accelerates = last_name(node.func) == "Accelerator"
        for keyword in node.keywords:
            if accelerates and keyword.arg == "gradient_accumulation_steps":
                add(keyword.value)
            elif keyword.arg in ("update_grad", "need_update", "enabled"):
                _moduli(keyword.value, add, self.counters)

    def step_follows(self, loop: ast.For) -> bool:
        """Whether a step comes after a loop, in the same block of a function, and none is in it."""
        owner = self.owner_of(loop)
        if any(self.steps(s, owner) for s in loop.body):
            return False
        return self._steps_after(loop) or self.callers_step(loop)

    def _steps_after(self, statement: ast.stmt) -> bool:
        owner = self.owner_of(statement)
        siblings = getattr(self.parents[statement], "body", [])
        after = siblings[siblings.index(statement) + 1 :] if statement in siblings else []
        return any(self.steps(s, owner) for s in after)

    def _calls_by_name(self) -> dict[str, list[ast.Call]]:
        found: dict[str, list[ast.Call]] = {}
        for node in self.nodes:
            if isinstance(node, ast.Call):
                found.setdefault(last_name(node.func), []).append(node)
        return found

    def callers_step(self, loop: ast.For) -> bool:
        """Whether the loop is what its function does, and a step comes after each call of the function."""
        holder = self.parents[loop]
        if not isinstance(holder, FunctionNode):
            return False
        owner = self.owner_of(loop)
        calls = [
            self.statement_of(node)
            for node in self.once("calls by name", self._calls_by_name).get(holder.name, [])
            if (found := self.resolve(node.func, owner)) is not None and found.node is holder
        ]
        return bool(calls) and all(each is not None and self._steps_after(each) for each in calls)

    def _moduli_of_guard(self, node: ast.If | ast.IfExp, add: Callable[[ast.AST], None]) -> None:
        """Find what the condition of a step counts up to, also where it leaves out the step: `if k < n: continue`."""
        for expression in (node.test, *self._answers(node.test)):
            _moduli(expression, add, self.counters)
        test = node.test
        if (
            isinstance(node, ast.If)
            and isinstance(node.body[-1], ast.Continue)
            and isinstance(test, ast.Compare)
            and isinstance(test.ops[0], (ast.Lt, ast.NotEq))
            and dotted(test.left) in self.resets
        ):
            add(test.comparators[0])

    def _answers(self, test: ast.expr) -> Iterator[ast.expr]:
        """What the functions, properties and callable objects of the file return that a condition asks."""
        owner = self.owner_of(test)
        for node in ast.walk(test):
            if isinstance(node, ast.Call):
                asked = self.resolve(node.func, owner) or self.find_method(self._class_of(node.func), "__call__")
            elif isinstance(node, ast.Attribute):
                asked = next(iter(self.by_method.get(node.attr, [])), None)
            else:
                continue
            for statement in asked.node.body if asked is not None else ():
                value = statement.value if isinstance(statement, ast.Return) else None
                if isinstance(value, ast.Name) and asked is not None:
                    made = (s for s in asked.node.body if isinstance(s, ast.Assign))
                    value = next((s.value for s in made if dotted(s.targets[0]) == value.id), value)
                if value is not None:
                    yield value

    def _class_of(self, node: ast.AST) -> str | None:
        """The class of the file whose object a name holds, by where it is assigned."""
        name = dotted(node)
        return next((cls for target, cls, _ in self._made_objects if name and target == name), None)

    @cached_property
    def _made_objects(self) -> list[tuple[str, str, ast.Call]]:
        """Where the file makes objects of its own classes: the name, the class and the call."""
        return [
            (dotted(node.targets[0]), last_name(node.value.func), node.value)
            for node in self.nodes
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and last_name(node.value.func) in self.classes
        ]

    def _literal_of(self, node: ast.AST) -> int | None:
        """The number that every constructor gives to an attribute: 4 of `self.n` where all objects are `Window(4)`."""
        cls = self.owner_of(node)
        init = self.find_method(cls, "__init__")
        if init is None or not isinstance(node, ast.Attribute) or dotted(node.value) != "self":
            return None
        names = [arg.arg for arg in init.node.args.args[1:]]
        kept = (each for s in ast.walk(init.node) if isinstance(s, ast.Assign) for each in pairs(s))
        name = next((dotted(value) for target, value in kept if dotted(target) == dotted(node)), "")
        found: set[Any] = set()
        for call in (call for _, made, call in self._made_objects if made == cls and name in names):
            place = names.index(name)
            given = [k.value for k in call.keywords if k.arg == name] or call.args[place : place + 1]
            found.add(given[0].value if given and isinstance(given[0], ast.Constant) else None)
        literal = found.pop() if len(found) == 1 else None
        return literal if isinstance(literal, int) and literal > 1 else None

    def _guards_step(self, node: ast.If | ast.IfExp) -> bool:
        """Whether a condition decides about a step: inside of it, or after its `continue`."""
        if isinstance(node, ast.IfExp):
            return steps_inside([node])
        owner = self.owner_of(node)
        if any(self.touches_gradients(s, owner) for s in (*node.body, *node.orelse)):
            return True
        loop = next(iter(self.loops_above(node)), None)
        return (
            isinstance(node.body[-1], ast.Continue)
            and loop is not None
            and any(self.touches_gradients(s, owner) for s in loop.body)
        )


def _values_of_names(node: ast.AST) -> list[tuple[str, ast.AST | None]]:
    """What a node gives to names: an assignment, a field, an argument, a default, or an option of a parser."""
    if isinstance(node, ast.Assign):
        return [(last_name(target), value) for target, value in pairs(node)]
    if isinstance(node, ast.AnnAssign):
        return [(last_name(node.target), node.value)]
    if isinstance(node, ast.keyword):
        return [(node.arg or "", node.value)]
    if isinstance(node, ast.arguments):
        return [(arg.arg, value) for arg, value in zip(reversed(node.args), reversed(node.defaults), strict=False)]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        option = str(node.args[0].value).lstrip("-").replace("-", "_")
        return [(option, each.value) for each in node.keywords if each.arg == "default"]
    return []


def _iterated(node: ast.expr) -> str:
    """The name that a loop runs over, under `enumerate` and the like."""
    while isinstance(node, ast.Call) and last_name(node.func) in ("enumerate", "tqdm", "iter", "list") and node.args:
        node = node.args[0]
    return node.id if isinstance(node, ast.Name) else ""


def _moduli(test: ast.AST, add: Callable[[ast.AST], None], counters: set[str]) -> None:
    """Find the numbers that a condition counts up to: `n` of `(i + 1) % n == 0`, and of `count == n`."""
    parts = list(ast.walk(test))
    moduli = [node.right for node in parts if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod)]
    for end in moduli:
        add(end)
    for node in () if moduli else parts:  # beside a modulus, `step == last_step` asks for the end of the run
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], (ast.Eq, ast.GtE)):
            end = node.comparators[0]
            # A list that fills up counts too: `len(waiting) == n`.
            counts = dotted(node.left) in counters or (
                isinstance(node.left, ast.Call) and last_name(node.left.func) == "len"
            )
            if counts and isinstance(end, (ast.Constant, ast.Name, ast.Attribute)) and "len" not in last_name(end):
                add(end)
