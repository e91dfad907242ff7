"""What a loop does that the accumulator does by itself, and what nothing reads once that is gone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from microbatch.linting.guesses import CLIP_CALLS, kind_of_name
from microbatch.linting.loop_names import Names, names_of
from microbatch.linting.render import Cannot, Renderer
from microbatch.linting.scene import Scene
from microbatch.linting.syntax import FunctionNode, dotted, last_name, text_of
from microbatch.pages import page

__all__ = ["LoopWork", "is_plain", "statements_of"]

_SWITCHES = ("require_backward_grad_sync", "require_forward_param_sync")
_PURE = ("len", "min", "max", "int", "range", "float")


@dataclass
class LoopWork:
    """One loop that is turned, and what became of its lines so far.

    Attributes:
        scene: One of its calls of backward.
        loop: The loop over microbatches.
        renderer: Gets what is to change.
    """

    scene: Scene
    loop: ast.For
    renderer: Renderer

    def __post_init__(self) -> None:
        self.names: Names = names_of(self.scene, self.loop)
        self.gone: set[ast.AST] = set()  # what nothing reads any more
        self.rest: list[ast.stmt] = []  # what follows the step, where a `continue` stands before it
        self.divisor, self.n = "", ""  # as the file writes them
        self.between: list[ast.stmt] = []  # what follows the loop and stands before the step behind it
        self.guards: list[ast.If] = []  # conditions under which the step is taken, and those written alike

    def _is_work(self, statement: ast.stmt) -> bool:
        """Return whether a statement does what the accumulator does: clear, unscale, clip, step, rescale."""
        if isinstance(statement, ast.For | ast.If):
            body = [*statement.body, *statement.orelse]
            return bool(body) and all(self._is_work(each) for each in body)
        if isinstance(statement, ast.AugAssign | ast.Assign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            return any(last_name(target) in ("grad", *_SWITCHES) for target in targets)
        call = statement.value if isinstance(statement, ast.Expr) else None
        if not isinstance(call, ast.Call):
            return False
        name, base = last_name(call.func), dotted(getattr(call.func, "value", call.func))
        if CLIP_CALLS.search(name):
            if "value" in name:
                raise Cannot(
                    f"it clips by value: use `accumulator.gradient`, clip, and step yourself ({page('gradient')})",
                    call,
                )
            return True
        if name in ("zero_grad", "unscale_") or call in self.scene.steps:
            return True
        if name == "update" and kind_of_name(base) == "scaler":
            return True
        target = self.scene.module.resolve(call.func, self.scene.module.owner_of(call))
        return target is not None and all(self._is_work(each) for each in target.node.body)

    def drop_the_work(self) -> None:
        """Leave out what the accumulator does."""
        scope = self.scene.scope
        for statement in statements_of(scope):
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call):
                if CLIP_CALLS.search(last_name(statement.value.func)):
                    self._norm(statement)
            elif isinstance(statement, ast.If) and scope is not self.scene.scope:
                continue
            elif self._is_work(statement) and not self._is_tail_only(statement):
                self.drop(statement)
            elif isinstance(statement, ast.With) and any(_is_no_sync(item.context_expr) for item in statement.items):
                self.renderer.opened.add(statement)
                self.gone.update(statement.items)

    def _norm(self, statement: ast.Assign) -> None:
        """`norm = clip_grad_norm_(...)`: the step has the norm."""
        inside = [each for each in self.loop.body if any(node is statement for node in ast.walk(each))]
        if inside and not set(inside) & {*self.guards, *self.rest}:
            bound = _bound(statement)
            reads = [node for node in ast.walk(self.loop) if isinstance(node, ast.Name) and node.id == bound]
            if not bound or len(reads) > 1:
                raise Cannot("the norm of its gradients is read inside of a window", statement)
            self.drop(statement)
            return
        self.renderer.swaps[statement.value] = f"{self.names.window}.step.grad_norm"
        self.gone.add(statement.value)

    def _is_tail_only(self, statement: ast.stmt) -> bool:
        """Return whether a statement only holds others; those are looked at one by one."""
        return isinstance(statement, ast.With | ast.Try)

    def drop(self, statement: ast.stmt) -> None:
        """Leave a statement out."""
        self.renderer.dropped.add(statement)
        self.gone.add(statement)

    def drop_unread(self) -> None:
        """Leave out counters, flags and sizes that only the lines that went away have read."""
        for guard in self.guards:
            self.gone.add(guard.test)
        names = {node.id for gone in self.gone for node in ast.walk(gone) if isinstance(node, ast.Name)}
        while True:
            read = self._read()
            unread = [
                each
                for each in statements_of(self.scene.scope)
                if is_plain(each) and each not in self.renderer.dropped and _bound(each) in names - read
            ]
            if not unread:
                self.reads = read
                return
            for each in unread:
                self.drop(each)
                names |= {node.id for node in ast.walk(each) if isinstance(node, ast.Name)}

    def _read(self) -> set[str]:
        """Return the names that the function still reads; a counter that reads itself does not count."""
        new = " ".join([self.n, *self.names.creation, *self.renderer.swaps.values()])
        found, waiting = set(re.findall(r"\w+", new)), [self.scene.scope]
        while waiting:
            node = waiting.pop()
            if node in self.gone:
                continue
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                found.add(node.id)
            if isinstance(node, ast.Global | ast.Nonlocal):
                found.update(node.names)
            if isinstance(node, ast.stmt) and is_plain(node) and isinstance(node, ast.Assign):
                own = _bound(node)
                found |= {
                    n.id for n in ast.walk(node.value) if isinstance(n, ast.Name) and n.id != own and n not in self.gone
                }
                continue
            waiting += ast.iter_child_nodes(node)
        return found


def statements_of(scope: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements of a function, without those of functions inside of it."""
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, FunctionNode | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.stmt):
            yield node
        waiting += ast.iter_child_nodes(node)


def _bound(statement: ast.stmt) -> str:
    target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
    return target.id if isinstance(target, ast.Name) else ""


def is_plain(statement: ast.stmt) -> bool:
    """Return whether a statement only binds one name to a number or a comparison, so that nothing else hangs on it."""
    if not isinstance(statement, ast.Assign | ast.AugAssign) or not _bound(statement):
        return False
    if isinstance(statement, ast.Assign) and len(statement.targets) != 1:
        return False
    return all(not isinstance(n, ast.Call) or dotted(n.func) in _PURE for n in ast.walk(statement.value))


def _is_no_sync(node: ast.expr) -> bool:
    return re.search(r"\bno_(backward_)?sync\b", text_of(node)) is not None
