"""The simulation: statements of a file run with numbers, data and objects in the place of tensors.

Only what decides the gradients is followed. A value that the file does not show is `Unknown`; a branch on it is taken
as the run decides, the same way each time.
"""

import ast
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

from microbatch.linting.definitions import Facts
from microbatch.linting.expressions import Expressions
from microbatch.linting.function_calls import FunctionCalls
from microbatch.linting.guesses import MEASURED, kind_of_name
from microbatch.linting.loops import BREAK, CONTINUE, Loops
from microbatch.linting.simulated import TooLongError
from microbatch.linting.syntax import FunctionNode, dotted, is_gradient, last_name, subject_of_chain, text_of
from microbatch.linting.trace import Trace
from microbatch.linting.values import Data, Function, Obj, Unknown, as_loss, hangs_on_data, is_number, tags

__all__ = ["Machine"]

STATEMENTS = 30_000  # of one run


class Machine(Loops, FunctionCalls, Expressions):
    """Runs one file once.

    Args:
        module: The file.
        run: How to run it.
        relevant: What matters in the file; `None` runs all.
    """

    # ---- from the roots

    def start(self, root: str) -> Trace:
        """Run a root: the top level, or a function that nobody in the file calls."""
        with suppress(TooLongError):  # what was seen until then counts
            if root == "":
                self.block(self.module.tree.body)
            else:
                self._prepare_globals()
                self._start_function(self.module.facts[root], root)
        return self.trace

    def _prepare_globals(self) -> None:
        """Run the simple assignments of the top level, so that constants and objects are known."""
        for statement in self.module.once("globals", self._find_globals):
            self.statement(statement)

    def _find_globals(self) -> list[ast.stmt]:
        return [
            statement
            for statement in self.module.tree.body
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and not self.module.contains_backward(statement, None)
        ]

    def _start_function(self, facts: Facts, root: str) -> None:
        owner = facts.owner
        self.begin_object(owner, root.rpartition(".")[2])
        if not isinstance(facts.node, FunctionNode):
            return
        function = Function(facts.node.name, facts.node, owner)
        if facts.flat:
            self.drive(function, owner)
            return
        once = self.module.once(f"epochs of {root}", lambda: self._has_epochs(root))
        for _ in range(1 if once else self.run.epochs):
            self.call_function(function, [], {}, guess=True, owner=owner)

    def drive(self, function: Function, owner: str | None) -> None:
        """Call a function once a microbatch: Lightning's training_step, an update function."""
        of_lightning = owner if function.name == "training_step" else None
        for _ in range(self.run.epochs):
            self.begin_epoch()
            self.hook("on_train_epoch_start", of_lightning)
            for index in range(self.run.length):
                self.begin_microbatch(last=index == self.run.length - 1)
                self.call_function(function, [], {"__index__": index}, guess=True, owner=owner)
                self.hook("on_train_batch_end", of_lightning, index=index)
            self.hook("on_train_epoch_end", of_lightning)

    def _has_epochs(self, root: str) -> bool:
        """Whether a loop of the function, or of one that it calls, holds the loop over microbatches."""
        waiting, seen = [root], {root}
        while waiting:
            facts = self.module.facts[waiting.pop()]
            if self._holds_epochs(facts.node, facts.owner):
                return True
            new = {key for key in facts.calls if self.module.reaches(key)} - seen
            seen |= new
            waiting += new
        return False

    def _holds_epochs(self, node: ast.AST, owner: str | None) -> bool:
        return any(
            isinstance(inner, (ast.For, ast.While))
            and self.module.contains_backward(inner, owner)
            and not self.module.is_microbatch_loop(inner, owner)
            for inner in ast.walk(node)
        )

    def begin_epoch(self) -> None:
        """Count an epoch."""
        self.trace.epoch += 1

    def begin_microbatch(self, *, last: bool = False) -> None:
        """Count a microbatch; `last` says that it ends its epoch."""
        self.trace.tick += 1
        self.trace.epoch_of[self.trace.tick] = self.trace.epoch
        self.trace.loop_of[self.trace.tick] = self.trace.loop
        if last:
            self.trace.last_ticks.add(self.trace.tick)
        self.at_last = last

    # ---- statements

    def block(self, body: list[ast.stmt]) -> Any:
        """Run statements; the result is not `None` where one of them jumps."""
        for statement in body:
            if self.relevant is not None and statement not in self.relevant:
                continue
            signal = self.statement(statement)
            if signal is not None:
                return signal
        return None

    def statement(self, node: ast.stmt) -> Any:
        """Run one statement."""
        self.spent += 1
        if self.spent > STATEMENTS:
            raise TooLongError
        method = self._STATEMENT_KINDS.get(type(node))
        if node not in self.clearing:
            return method(self, node) if method else None
        marks = len(self.trace.marks)
        signal = method(self, node) if method else None
        if any(mark.kind == "zero" for mark in self.trace.marks[marks:]):
            self.trace.cleared.add(node)
        else:
            self.trace.may_clear()
        return signal

    def _expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.evaluate(node.value)

    def _assign(self, node: ast.Assign) -> None:
        made = node.value
        if is_gradient(node.targets[0]) and isinstance(made, ast.BinOp) and is_gradient(made.left):
            self.scale_gradients(node, node.targets[0], op=made.op, by=made.right)
            return
        value = self.evaluate(node.value)
        for target in node.targets:
            if isinstance(target, (ast.Name, ast.Attribute)) and (is_number(value) or hangs_on_data(value)):
                self._note_other_number(node, target, value)
            self.store(target, value)

    def _note_other_number(self, node: ast.Assign, target: ast.Name | ast.Attribute, value: Any) -> None:
        """Note that a name stands for another number than N: a length, a count of rows, or what a loop sets it to."""
        is_length = ("len" in tags(value) and "n" not in tags(value)) or hangs_on_data(value)
        if isinstance(target, ast.Attribute):
            if is_length:
                self.moved.add((0, self.heap_key(target)))
        elif is_length or (self.names_window(target) and self.module.is_inside_loop(node)):
            self.moved.add((id(self.frame), target.id))

    def _ann_assign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.store(node.target, self.evaluate(node.value))

    def _aug_assign(self, node: ast.AugAssign) -> None:
        left = self.evaluate(ast.copy_location(_load(node.target), node.target))
        if is_gradient(node.target) or (isinstance(left, Unknown) and left.key.endswith(".grad")):
            self.scale_gradients(node, node.target, op=node.op, by=node.value)
            return
        right = self.evaluate(node.value)
        counted = isinstance(right, Data) and right.kind == "batch" and right.reduction == "sum" and not right.weights
        if counted or (isinstance(right, Unknown) and right.data):
            right = Unknown(text_of(node.value), tags=tags(right))  # a count over several microbatches
        if isinstance(right, Data) and right.number and right.kind == "loss" and isinstance(node.op, ast.Add):
            self.trace.mark("sum", node, dotted(node.target), value=right)
            self.summed.add(dotted(node.target))
        self.store(node.target, self.operate(left, node.op, right, node=node))

    def store(self, target: ast.AST, value: Any) -> None:
        """Bind a target of an assignment."""
        value = self._named_object(target, value)
        if isinstance(target, ast.Name):
            self._store_name(target.id, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._unpack(target.elts, value)
        elif isinstance(target, ast.Starred):
            self.store(target.value, Unknown(text_of(target)))
        elif isinstance(target, ast.Attribute):
            if target.attr == "require_backward_grad_sync":
                self.trace.frameworks.add("sync switch")
                self.sync_off = int(self.known_truth(value) is False)
            elif target.attr == "grad" and isinstance(value, Data):
                return
            self._keep(self.heap_key(target), dotted(target), value)
        elif isinstance(target, ast.Subscript) and (key := self.heap_key(target)):
            self._keep(key, key, value)
            if isinstance(held := self.evaluate(target.value), dict) and isinstance(target.slice, ast.Constant):
                held[target.slice.value] = value

    def _keep(self, key: str, text: str, value: Any) -> None:
        self.heap[key] = value
        self.rooted.add(text.partition(".")[0].partition("[")[0])

    def _named_object(self, target: ast.AST, value: Any) -> Any:
        """The object that a name promises where the value is not known; an object that was made takes the name."""
        is_plain = isinstance(value, Unknown) and not value.data
        if is_plain and isinstance(target, (ast.Name, ast.Attribute)):
            guessed = self.guess(dotted(target))
            is_object = guessed is not None and guessed.kind in ("model", "optimizer", "criterion")
            if "n" in value.tags or (value.tags and not is_object):
                return value  # a number, or what N was given to
            if guessed is not None and not self.trace.tick:
                self.made += 1  # set up once: an object of its own
                guessed.info["key"] = f"{guessed.name} {self.made}"
            value = guessed or value
        if isinstance(value, Obj) and "node" in value.info and "named" not in value.info:
            name = last_name(target)
            if name:
                value.name, value.info["named"] = name, True
        return value

    def _store_name(self, name: str, value: Any) -> None:
        if "loss" in name.lower() and self.trace.tick and not (self.trace.evaluating or MEASURED.match(name)):
            value = self._loss_by_name(name, value)
        self.frame.frame_of(name, self.globals).locals[name] = value
        if name in self.rooted:  # what was kept under the old value is gone with it
            for key in [key for key in self.heap if key.startswith((f"{name}[", f"{name}."))]:
                del self.heap[key]

    def _loss_by_name(self, name: str, value: Any) -> Any:
        """The loss that a name promises, out of a tensor or of a value that the file does not show."""
        if isinstance(value, Data) and value.kind == "tensor" and not value.number:
            return replace(as_loss(value), inside=value is self.output)
        if isinstance(value, Data) and value.kind == "batch" and not value.weights and name.endswith("loss"):
            return self.opaque_loss(name)  # a sum over what is not followed
        if isinstance(value, Unknown) and name not in self.module.counters and not kind_of_name(name):
            made = replace(self.opaque_loss(value.key or name), blurred=not value.data)
            return replace(made, opaque=(f"divided in `{value.key}`",)) if "n" in value.tags else made
        return value

    def _unpack(self, targets: list[ast.expr], value: Any) -> None:
        if (
            isinstance(value, (tuple, list))
            and len(value) == len(targets)
            and not any(isinstance(t, ast.Starred) for t in targets)
        ):
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
        subject = subject_of_chain(node)
        if subject is not None:
            value = self.evaluate(subject)
            key = value.key if isinstance(value, Unknown) and not value.data else value
            if isinstance(key, str):
                said = node, key
                if said not in self.settled:
                    self.settled[said] = self._choose_branch(node)
                return self.block(self.settled[said])
        branch = self._choose_branch(node)
        if not self.now_and_then:
            return self.block(branch)
        self.now_and_then = False
        self.trace.occasional += 1
        try:
            return self.block(branch)
        finally:
            self.trace.occasional -= 1

    def _choose_branch(self, node: ast.If) -> list[ast.stmt]:
        """The branch that is taken; an `elif` is no call inside of a call, for there may be a thousand of them."""
        branch = node.body if self.choose(node) else node.orelse
        while branch is node.orelse and len(branch) == 1 and isinstance(branch[0], ast.If) and not self.now_and_then:
            node = branch[0]
            self.spent += 1
            if self.relevant is not None and node not in self.relevant:
                return []
            branch = node.body if self.choose(node) else node.orelse
        return branch

    def _with(self, node: ast.With) -> Any:
        return self._inside(node.items, node.body)

    def _inside(self, items: list[ast.withitem], body: list[ast.stmt]) -> Any:
        """Run statements inside of contexts."""
        if not items:
            return self.block(body)
        manager = self.own_manager(items[0].context_expr)
        if manager is not None:
            return self.run_around(manager, items[0], lambda: self._inside(items[1:], body))
        leave = self.enter(items[0])
        try:
            return self._inside(items[1:], body)
        finally:
            leave()

    def _try(self, node: ast.Try) -> Any:
        can_skip = bool(node.handlers) and self.module.contains_backward(node, self.frame.owner)
        if can_skip and 0 < self.run.skip == self.trace.tick:
            for handler in node.handlers:
                if last_name(handler.type or node) not in ("KeyboardInterrupt", "ImportError"):
                    self.trace.mark("skip", handler, detail="except")
                    self.handling += 1
                    signal = self.block(handler.body)
                    self.handling -= 1
                    return signal if signal is not None else self.block(node.finalbody)
        signal = self.block(node.body)
        if signal is None:
            signal = self.block(node.orelse)
        after = self.block(node.finalbody)
        return signal if after is None else after

    def _return(self, node: ast.Return) -> Any:
        return ("return", None if node.value is None else self.evaluate(node.value))

    def _jump(self, node: ast.Raise | ast.Break | ast.Continue) -> Any:
        if isinstance(node, ast.Raise):
            return ("return", Unknown("raise"))
        return BREAK if isinstance(node, ast.Break) else CONTINUE

    def _def(self, node: Any) -> None:
        self.frame.locals[node.name] = Function(node.name, node, None, self.frame)

    def _class(self, node: ast.ClassDef) -> None:
        self.frame.locals[node.name] = Obj("class", node.name)

    def _match(self, node: ast.Match) -> Any:
        subject = self.evaluate(node.subject)
        unsettled: list[ast.match_case] = []
        for case in node.cases:
            known = self.matches(subject, case)
            if known is False:
                continue
            if known or self.decide(f"{text_of(node.subject)} is {ast.unparse(case.pattern)}", node):
                return self.block(case.body if not known or not unsettled else unsettled[0].body)
            unsettled.append(case)
        return self.block(unsettled[0].body) if unsettled else None  # one of them, where a run chooses none

    def _delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.frame.locals.pop(target.id, None)
            elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Slice):
                held = self.evaluate(target.value)
                if isinstance(held, list):
                    held.clear()

    _STATEMENT_KINDS: ClassVar[dict[type, Any]] = {
        ast.Expr: _expr,
        ast.Assign: _assign,
        ast.AnnAssign: _ann_assign,
        ast.AugAssign: _aug_assign,
        ast.If: _if,
        ast.For: Loops.loop_for,
        ast.AsyncFor: Loops.loop_for,
        ast.While: Loops.loop_while,
        ast.With: _with,
        ast.AsyncWith: _with,
        ast.Try: _try,
        ast.Return: _return,
        ast.Raise: _jump,
        ast.Break: _jump,
        ast.Continue: _jump,
        ast.FunctionDef: _def,
        ast.AsyncFunctionDef: _def,
        ast.ClassDef: _class,
        ast.Delete: _delete,
        ast.Match: _match,
    }


def _load(node: ast.expr) -> ast.expr:
    """The same target as an expression to read."""
    if isinstance(node, ast.Name):
        return ast.Name(node.id, ast.Load())
    if isinstance(node, ast.Attribute):
        return ast.Attribute(node.value, node.attr, ast.Load())
    if isinstance(node, ast.Subscript):
        return ast.Subscript(node.value, node.slice, ast.Load())
    return node
