"""The simulation: statements of a file run with numbers, data and objects in the place of tensors.

Only what decides the gradients is followed. A value that the file does not show is `Unknown`; a branch on it is taken as the run decides,
the same way each time.
"""

import ast
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

from microbatch.linting.expressions import Expressions
from microbatch.linting.guesses import LOADER_WORDS, kind_of_name
from microbatch.linting.module import FunctionNode, Loop, Module, dotted, last_name, text_of
from microbatch.linting.slices import Slice
from microbatch.linting.trace import Trace
from microbatch.linting.values import Data, Function, Num, Obj, Unknown, is_number, number

__all__ = ["Frame", "Machine", "Run", "TooLongError"]

_EVALUATES = re.compile(r"_?(eval|valid|test|val_|predict|infer|estimate_loss|validate)", re.IGNORECASE)
_PIECED = re.compile(r"\b(split|chunk|tensor_split|chunks|microbatches|micro_batches|mini_chunks)\b")
BREAK, CONTINUE = "break", "continue"
STATEMENTS = 60_000
DEPTH = 14


class TooLongError(Exception):
    """The run took more statements than it may."""


class Run:
    """One way to run: N, the length of the loader, and what unknown conditions come out as."""

    def __init__(self, microbatches: int, length: int, decisions: dict[str, bool] | None = None, *, skip: int = 0, epochs: int = 2) -> None:
        self.microbatches = microbatches
        self.length = length
        self.decisions = dict(decisions or {})
        self.asked: dict[str, ast.AST] = {}
        self.skip = skip  # the microbatch that is skipped where the loop may skip one; 0 for none
        self.epochs = epochs


class Frame:
    """The names of one call."""

    __slots__ = ("function", "locals", "owner", "parent")

    def __init__(self, function: str, owner: str | None, parent: "Frame | None" = None) -> None:
        self.locals: dict[str, Any] = {}
        self.function = function
        self.owner = owner
        self.parent = parent


class Machine(Expressions):
    """Runs one file once.

    Args:
        module: The file.
        run: How to run it.
        relevant: What matters in the file; `None` runs all.
    """

    def __init__(self, module: Module, run: Run, relevant: Slice | None = None) -> None:
        self.module = module
        self.run = run
        self.relevant = relevant.statements if relevant is not None else None
        self.deciding = relevant.deciding if relevant is not None else None
        self.trace = Trace()
        self.heap: dict[str, Any] = {}
        self.globals = Frame("", None)
        self.frame = self.globals
        self.depth = 0
        self.active: list[str] = []
        self.spent = 0
        self.sync_off = 0
        self.loop_depth = 0
        self.used_window = False
        self.at_last = False
        self.now_and_then = False
        self.made = 0
        self.range_end: Any = None
        self.moved: set[tuple[int, str]] = set()  # names for N that the loop itself sets
        self.window_names, self.window_literals = module.windows

    # ---- from the roots

    def start(self, root: str) -> Trace:
        """Run a root: the top level, or a function that nobody in the file calls."""
        try:
            if root != "":
                self._prepare_globals()
            if root == "":
                self.block(self.module.tree.body)
            else:
                self._start_function(self.module.facts[root], root)
        except TooLongError:
            self.trace.finished = False
        return self.trace

    def _prepare_globals(self) -> None:
        """Run the simple assignments of the top level, so that constants and objects are known."""
        for statement in self.module.tree.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and not self.module.contains_backward(statement, None):
                self.statement(statement)

    def _start_function(self, facts: Any, root: str) -> None:
        owner = facts.owner
        if owner and root != f"{owner}.__init__" and (init := self.module.find_method(owner, "__init__")):
            self.call_function(init, [], {}, guess=True, owner=owner)
        function = Function(facts.node.name, facts.node, owner)
        if facts.flat:
            self.drive(function, owner)
            return
        for _ in range(1 if self._has_epochs(facts.node, owner) else self.run.epochs):
            self.call_function(function, [], {}, guess=True, owner=owner)

    def drive(self, function: Function, owner: str | None) -> None:
        """Call a function once a microbatch: Lightning's training_step, an update function."""
        for _ in range(self.run.epochs):
            self.begin_epoch()
            for index in range(self.run.length):
                self.begin_microbatch(last=index == self.run.length - 1)
                self.call_function(function, [], {"__index__": index}, guess=True, owner=owner)

    def _has_epochs(self, node: ast.AST, owner: str | None) -> bool:
        """Whether a loop of the function holds the loop over microbatches."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.For | ast.While) and self.module.contains_backward(inner, owner):
                if not self.module.is_microbatch_loop(inner, owner):
                    return True
        return False

    def begin_epoch(self) -> None:
        self.trace.epoch += 1

    def begin_microbatch(self, *, last: bool = False) -> None:
        self.trace.tick += 1
        self.trace.epoch_of[self.trace.tick] = self.trace.epoch
        if last:
            self.trace.last_ticks.add(self.trace.tick)
        self.at_last = last

    # ---- statements

    def block(self, body: list[ast.stmt]) -> Any:
        for statement in body:
            if self.relevant is not None and statement not in self.relevant:
                continue
            signal = self.statement(statement)
            if signal is not None:
                return signal
        return None

    def statement(self, node: ast.stmt) -> Any:
        self.spent += 1
        if self.spent > STATEMENTS:
            raise TooLongError
        method = _STATEMENTS.get(type(node))
        return method(self, node) if method else None

    def _expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.evaluate(node.value)

    def _assign(self, node: ast.Assign) -> None:
        value = self.evaluate(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name) and is_number(value) and self.names_window(target) and self.module.is_inside_loop(node):
                self.moved.add((id(self.frame), target.id))
            self.store(target, value)

    def _ann_assign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.store(node.target, self.evaluate(node.value))

    def _aug_assign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Attribute) and node.target.attr == "grad" or last_name(node.target) == "grad":
            self.scale_gradients(node)
            return
        left = self.evaluate(ast.copy_location(_load(node.target), node.target))
        right = self.evaluate(node.value)
        if isinstance(right, Data) and right.number and right.kind == "loss" and isinstance(node.op, ast.Add):
            self.trace.mark("sum", node, dotted(node.target), right)
        self.store(node.target, self.operate(left, node.op, right, node, target=dotted(node.target)))

    def store(self, target: ast.AST, value: Any) -> None:
        """Bind a target of an assignment."""
        if isinstance(value, Unknown) and not value.data and isinstance(target, ast.Name | ast.Attribute):
            guessed = self.guess(dotted(target))
            if guessed is not None and not self.trace.tick:
                self.made += 1  # set up once: an object of its own
                guessed.info["key"] = f"{guessed.name} {self.made}"
            value = guessed or value
        if isinstance(value, Obj) and "node" in value.info and "named" not in value.info and (name := last_name(target)):
            value.name, value.info["named"] = name, True
        if isinstance(target, ast.Name):
            if "loss" in target.id.lower() and self.trace.tick and not self.trace.evaluating:
                if isinstance(value, Data) and value.kind == "tensor" and not value.number:
                    value = self.as_loss(value)
                elif isinstance(value, Unknown) and target.id not in self.module.counters and not kind_of_name(target.id):
                    made = self.opaque_loss(value.key or target.id)
                    value = replace(made, opaque=(f"divided in `{value.key}`",)) if "n" in value.tags else made
            self.frame.locals[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            self._unpack(target.elts, value)
        elif isinstance(target, ast.Starred):
            self.store(target.value, Unknown(text_of(target)))
        elif isinstance(target, ast.Attribute):
            if target.attr == "require_backward_grad_sync":
                self.trace.frameworks.add("sync switch")
                self.sync_off = 0 if self.truth(value, target) else 1
            elif target.attr == "grad" and isinstance(value, Data):
                return
            self.heap[self.heap_key(target)] = value
        elif isinstance(target, ast.Subscript) and (key := self.heap_key(target)):
            self.heap[key] = value

    def _unpack(self, targets: list[ast.expr], value: Any) -> None:
        if isinstance(value, tuple | list) and len(value) == len(targets) and not any(isinstance(t, ast.Starred) for t in targets):
            for target, part in zip(targets, value, strict=True):
                self.store(target, part)
            return
        for target in targets:
            if isinstance(value, Data):
                part = value
            elif isinstance(value, Obj) and value.kind in ("loader", "batches"):
                part = Unknown(text_of(target), data=True)
            else:
                guess = self.guess(dotted(target)) if isinstance(value, Unknown) and not value.data else None
                part = guess or Unknown(text_of(target), data=isinstance(value, Unknown) and value.data)
            self.store(target, part)

    def _if(self, node: ast.If) -> Any:
        taken = self.choose(node.test, node.body, node.orelse, node)
        if not self.now_and_then:
            return self.block(node.body if taken else node.orelse)
        self.now_and_then = False
        self.trace.occasional += 1
        try:
            return self.block(node.body if taken else node.orelse)
        finally:
            self.trace.occasional -= 1

    def _for(self, node: ast.For) -> Any:
        items, counted = self.items(node)
        return self._loop(node, items, counted)

    def _while(self, node: ast.While) -> Any:
        limit = self.count_of_loop(node)
        micro = self.module.is_microbatch_loop(node, self.frame.owner)
        if not micro and not self.module.contains_backward(node, self.frame.owner):
            limit = 1
        if micro:
            self.begin_epoch()
        for index in range(limit):
            value = self.evaluate(node.test)
            if isinstance(value, Unknown | Data):
                pass
            elif not self.truth(value, node.test):
                break
            if micro:
                self.begin_microbatch(last=index == limit - 1)
            signal = self.body(node)
            if signal == BREAK:
                break
            if signal is not None and signal != CONTINUE:
                return signal
        return None

    def _loop(self, node: ast.For, items: list[Any], counted: bool) -> Any:
        micro = self.module.is_microbatch_loop(node, self.frame.owner)
        if micro and not counted:
            self.begin_epoch()
        if not micro and LOADER_WORDS.search(text_of(node.iter)) and not self.module.contains_backward(node, self.frame.owner):
            self.trace.evaluating += 1
            try:
                return self._turns(node, items, micro=False, counted=counted)
            finally:
                self.trace.evaluating -= 1
        return self._turns(node, items, micro=micro, counted=counted)

    def _turns(self, node: ast.For, items: list[Any], *, micro: bool, counted: bool) -> Any:
        for index, item in enumerate(items):
            if micro:
                self.begin_microbatch(last=not counted and index == len(items) - 1)
            self.store(node.target, item)
            signal = self.body(node)
            if signal == BREAK:
                return None
            if signal is not None and signal != CONTINUE:
                return signal
        return self.block(node.orelse)

    def body(self, node: ast.For | ast.While) -> Any:
        self.loop_depth += 1
        try:
            return self.block(node.body)
        finally:
            self.loop_depth -= 1

    def _with(self, node: ast.With) -> Any:
        leave = []
        for item in node.items:
            leave.append(self.enter(item))
        try:
            return self.block(node.body)
        finally:
            for undo in reversed(leave):
                undo()

    def _try(self, node: ast.Try) -> Any:
        if node.handlers and self.run.skip and self.run.skip == self.trace.tick and self.module.contains_backward(node, self.frame.owner):
            for handler in node.handlers:
                if not isinstance(handler.type, ast.Name) or handler.type.id not in ("KeyboardInterrupt", "ImportError"):
                    self.trace.mark("skip", handler, detail="except")
                    signal = self.block(handler.body)
                    return signal if signal is not None else self.block(node.finalbody)
        signal = self.block(node.body)
        if signal is None:
            signal = self.block(node.orelse)
        after = self.block(node.finalbody)
        return signal if after is None else after

    def _return(self, node: ast.Return) -> Any:
        return ("return", None if node.value is None else self.evaluate(node.value))

    def _raise(self, node: ast.Raise) -> Any:
        return ("return", None)

    def _break(self, node: ast.Break) -> Any:
        return BREAK

    def _continue(self, node: ast.Continue) -> Any:
        return CONTINUE

    def _def(self, node: Any) -> None:
        self.frame.locals[node.name] = Function(node.name, node, None, self.frame)

    def _class(self, node: ast.ClassDef) -> None:
        self.frame.locals[node.name] = Obj("class", node.name)

    def _delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.frame.locals.pop(target.id, None)

    # ---- loops

    def count_of_loop(self, node: ast.For | ast.While) -> int:
        """How often a loop whose end is not known runs."""
        owner = self.frame.owner
        if self.module.is_microbatch_loop(node, owner):
            return self.run.length
        if not self.module.contains_backward(node, owner):
            return 1
        return 3 if any(self.is_counted(inner) for inner in ast.walk(node) if isinstance(inner, ast.For)) else self.run.epochs

    def is_counted(self, node: ast.For) -> bool:
        """Whether a loop runs once for each of the N microbatches: `for i in range(n)`."""
        if not isinstance(node.iter, ast.Call) or last_name(node.iter.func) not in ("range", "trange") or not node.iter.args:
            return False
        end = node.iter.args[-1 if len(node.iter.args) < 3 else 1]
        return any(self.is_window(part) for part in ast.walk(end) if isinstance(part, ast.expr))

    def is_window(self, node: ast.AST) -> bool:
        text = dotted(node)
        if isinstance(node, ast.Constant):
            return node.value in self.window_literals
        return bool(text) and (text in self.window_names or self.names_window(node))

    def items(self, node: ast.For) -> tuple[list[Any], bool]:
        """The items of a for loop, and whether the loop is the N microbatches of one window."""
        value = self.evaluate(node.iter)
        count = self.count_of_loop(node)
        outer = not self.module.is_microbatch_loop(node, self.frame.owner) and self.module.contains_backward(node, self.frame.owner)
        limit = count if outer else max(self.run.length, self.run.microbatches)
        if isinstance(value, range):
            counted = any("n" in part.tags for part in [self.range_end] if isinstance(part, Num))
            return list(value[:limit]), counted
        if isinstance(value, tuple | list):
            return list(value)[:limit], False
        if isinstance(value, Obj) and value.kind == "enumerate":
            start = number(value.info["start"])
            return [(start + i, self.item_of(value.info["over"])) for i in range(count)], False
        if isinstance(value, Unknown) and value.key.startswith(("range(", "trange(")):
            whole = "n" in value.tags and not outer  # a number of whole windows: nothing is left over
            return list(range(count // self.run.microbatches * self.run.microbatches if whole else count)), whole
        if _PIECED.search(text_of(node.iter)) and any(isinstance(parent, Loop) for parent in self.module.above(node)):
            return [self.item_of(value) for _ in range(self.run.microbatches)], True
        return [self.item_of(value) for _ in range(count)], False

    def item_of(self, value: Any) -> Any:
        if isinstance(value, Obj) and value.kind == "zip":
            return tuple(self.item_of(part) for part in value.info["over"])
        if isinstance(value, Obj) and value.kind == "loader":
            return Data({}, kind="batch")
        if isinstance(value, Obj) and value.kind in ("optimizer", "scheduler", "model"):
            return value
        if isinstance(value, Data):
            return value
        if isinstance(value, Unknown) and value.key.endswith("parameters()"):
            return Unknown("parameter")
        return Data({}, kind="batch") if self.loop_depth or isinstance(value, Unknown) else Unknown("item")

    # ---- functions of the file

    def call_function(
        self, function: Function, args: list[Any], keywords: dict[str, Any], *, guess: bool = False, owner: str | None = None
    ) -> Any:
        """Run a function of the file with these values."""
        key = Module.key(function)
        if self.depth >= DEPTH or self.active.count(key) >= 2:
            return Unknown(f"{function.name}()")
        node: FunctionNode = function.node
        parent = function.scope if isinstance(function.scope, Frame) else self.globals
        frame = Frame(node.name, owner or function.owner, parent)
        self._bind(node, frame, args, keywords, method=function.owner is not None, guess=guess)
        outer, self.frame = self.frame, frame
        evaluates = bool(_EVALUATES.match(node.name)) and not self.module.reaches(key)
        self.depth += 1
        self.active.append(key)
        self.trace.evaluating += evaluates
        try:
            signal = self.block(node.body)
        finally:
            self.trace.evaluating -= evaluates
            self.active.pop()
            self.depth -= 1
            self.frame = outer
        return signal[1] if isinstance(signal, tuple) else None

    def _bind(self, node: FunctionNode, frame: Frame, args: list[Any], keywords: dict[str, Any], *, method: bool, guess: bool) -> None:
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        static = any(last_name(d) == "staticmethod" for d in node.decorator_list)
        if method and not static and names:
            frame.locals[names[0]] = Obj("self", frame.owner or "")
            names = names[1:]
        defaults = dict(zip(reversed(names), reversed(node.args.defaults), strict=False))
        for keyword, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            names.append(keyword.arg)
            if default is not None:
                defaults[keyword.arg] = default
        given = dict(zip(names, args, strict=False))
        given |= {name: value for name, value in keywords.items() if name in names}
        index = keywords.get("__index__")
        for name in names:
            if name in given:
                frame.locals[name] = given[name]
            elif index is not None and name in ("global_step", "global_iter", "total_steps", "n_iter"):
                frame.locals[name] = self.trace.tick - 1
            elif index is not None and name in ("batch_idx", "batch_index", "batch_nb", "step", "idx", "i", "iteration", "batch_i", "index"):
                frame.locals[name] = index
            elif name in defaults:
                frame.locals[name] = self._default(name, defaults[name], guess)
            else:
                frame.locals[name] = self.guess(name) or Unknown(name, data="batch" in name)

    def _default(self, name: str, default: ast.expr, guess: bool) -> Any:
        if not guess:
            return self.evaluate(default)
        value = self.evaluate(default)
        if value is None and (found := self.guess(name)):
            return Obj(found.kind, found.name, {**found.info, "maybe": True})
        return Unknown(name) if is_number(value) or value is None else value

    def scale_gradients(self, node: ast.AugAssign) -> None:
        """`p.grad /= n`: every gradient is multiplied."""
        value = self.evaluate(node.value)
        if is_number(value) and number(value) and isinstance(node.op, ast.Div | ast.Mult):
            factor = Fraction(number(value))
            self.trace.multiply(1 / factor if isinstance(node.op, ast.Div) else factor)
        else:
            self.trace.opaque.setdefault("gradients are rescaled", node)


def _load(node: ast.AST) -> ast.AST:
    """The same target as an expression to read."""
    if isinstance(node, ast.Name):
        return ast.Name(node.id, ast.Load())
    if isinstance(node, ast.Attribute):
        return ast.Attribute(node.value, node.attr, ast.Load())
    if isinstance(node, ast.Subscript):
        return ast.Subscript(node.value, node.slice, ast.Load())
    return node


_STATEMENTS: dict[type, Any] = {
    ast.Expr: Machine._expr,  # noqa: SLF001 - a table of this module
    ast.Assign: Machine._assign,  # noqa: SLF001
    ast.AnnAssign: Machine._ann_assign,  # noqa: SLF001
    ast.AugAssign: Machine._aug_assign,  # noqa: SLF001
    ast.If: Machine._if,  # noqa: SLF001
    ast.For: Machine._for,  # noqa: SLF001
    ast.AsyncFor: Machine._for,  # noqa: SLF001
    ast.While: Machine._while,  # noqa: SLF001
    ast.With: Machine._with,  # noqa: SLF001
    ast.AsyncWith: Machine._with,  # noqa: SLF001
    ast.Try: Machine._try,  # noqa: SLF001
    ast.Return: Machine._return,  # noqa: SLF001
    ast.Raise: Machine._raise,  # noqa: SLF001
    ast.Break: Machine._break,  # noqa: SLF001
    ast.Continue: Machine._continue,  # noqa: SLF001
    ast.FunctionDef: Machine._def,  # noqa: SLF001
    ast.AsyncFunctionDef: Machine._def,  # noqa: SLF001
    ast.ClassDef: Machine._class,  # noqa: SLF001
    ast.Delete: Machine._delete,  # noqa: SLF001
}
