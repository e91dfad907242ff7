"""The losses of a loop that is turned: no division by N, `window.backward`, and reports that say what they said."""

from __future__ import annotations

import ast

from microbatch.linting.guesses import kind_of_name
from microbatch.linting.loop_work import LoopWork
from microbatch.linting.mends import loss_of
from microbatch.linting.render import Cannot
from microbatch.linting.syntax import dotted, is_backward_call, text_of
from microbatch.pages import page

__all__ = ["LoopLoss"]

_GIVE = "give `window.backward` an `mb.Loss(sum, count)`"


class LoopLoss(LoopWork):
    """The part of a turned loop that is about losses."""

    def undo_divisions(self) -> None:
        """Take the division by N out, and keep it where the loss is only reported."""
        lines = {
            b.loss.divided for trace in self.scene.traces for b in trace.backwards if b.node in self.backward_calls
        }
        lines.discard(0)
        seen, names = set[int](), dict[str, int]()  # the names that were divided, each with its first line
        for node in ast.walk(self.loop):
            row = getattr(node, "lineno", 0)
            if row not in lines:
                continue
            statement = self.scene.module.statement_of(node)
            if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Div):
                self.drop(node)
                self.divisor = self.scene.words.text(node.value)
                names.setdefault(dotted(node.target), row)
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                target = statement.targets[0] if isinstance(statement, ast.Assign) else None
                if (
                    isinstance(statement, ast.Assign)
                    and statement.value is node
                    and dotted(node.left) == dotted(target or node)
                ):
                    self.drop(statement)
                elif not self._in_backward(node):
                    self.renderer.swaps[node] = self.scene.words.text(node.left)
                self.gone.add(node.right)
                self.divisor = self.scene.words.text(node.right)
                if target is not None:
                    names.setdefault(dotted(target), row)
            else:
                continue
            seen.add(row)
        if lines - seen:
            raise Cannot("its loss is divided by N in another function", self.loop)
        if any(b.loss.reduction == "sum" for trace in self.scene.traces for b in trace.backwards):
            raise Cannot(f"its loss is a sum: {_GIVE}, see {page('losses')}")
        losses = [b.loss for trace in self.scene.traces for b in trace.backwards]
        if any(loss.tokens or any(o.startswith(("divided", "multiplied")) for o in loss.opaque) for loss in losses):
            raise Cannot(f"its loss is weighted by counts of its own: {_GIVE}, see {page('losses')}")
        self._reports(names)

    @property
    def backward_calls(self) -> set[ast.AST]:
        """The calls of backward in the loop."""
        return {node for node in ast.walk(self.loop) if is_backward_call(node)}

    def _in_backward(self, node: ast.AST) -> bool:
        return any(any(each is node for each in ast.walk(call)) for call in self.backward_calls)

    def _reports(self, names: dict[str, int]) -> None:
        """Divide where a loss that is no more divided is reported, unless it is wrong there."""
        scaled = {v.fault.node for v in self.scene.reading.verdicts if v.fault.rule == "MB701"}
        block, parents = self.scene.block(self.loop), self.scene.module.parents
        after = block[block.index(self.loop) :]
        for node in (each for statement in after for each in ast.walk(statement)):
            if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load):
                continue
            if (
                node.id not in names
                or node.lineno < names[node.id]
                or self.scene.scope_of(node) is not self.scene.scope
            ):
                continue
            if self._in_backward(node) or any(node is each for gone in self.gone for each in ast.walk(gone)):
                continue
            if any(node is each for swapped in self.renderer.swaps for each in ast.walk(swapped)):
                continue
            top: ast.AST = node
            while isinstance(parents.get(top), ast.Attribute) or (
                isinstance(p := parents.get(top), ast.Call) and p.func is top
            ):
                top = parents[top]
            outer = parents.get(top)
            if not isinstance(top, ast.expr) or any(node is each for fault in scaled for each in ast.walk(fault)):
                continue
            if not self.renderer.draft.is_exact(top):
                continue
            text, n = self.scene.words.text(top), self.divisor or self.n
            if (
                isinstance(outer, ast.BinOp)
                and isinstance(outer.op, ast.Mult)
                and n in (text_of(outer.left), text_of(outer.right))
            ):
                self.renderer.swaps[outer] = text
            elif n:
                self.renderer.swaps[top] = (
                    f"({text} / {n})" if isinstance(outer, ast.BinOp | ast.UnaryOp) else f"{text} / {n}"
                )

    def run_backwards(self, *, counted: bool) -> None:
        """`window.backward(loss)` for every backward; with the rows, where the window has not handed them out."""
        calls = [node for node in ast.walk(self.loop) if isinstance(node, ast.Call) and is_backward_call(node)]
        count = f", count={self._rows()}" if counted else ""
        for call in calls:
            loss = loss_of(call)
            if loss is None or call.keywords or (call.args and loss is not call.args[0]):
                raise Cannot("its backward has arguments of its own, or does more than backward", call)
            if isinstance(loss, ast.BinOp) and isinstance(loss.op, ast.Div) and loss.right in self.gone:
                loss = loss.left
            elif isinstance(loss, ast.BinOp) and isinstance(loss.op, ast.Div | ast.Mult):
                raise Cannot(
                    "its loss is divided or multiplied in the call of backward, by something that may be N", call
                )
            self.renderer.swaps[call] = f"{self.names.window}.backward({self.scene.words.text(loss)}{count})"
        self._one_backward(calls)

    def _one_backward(self, calls: list[ast.Call]) -> None:
        """Refuse two backwards of one microbatch: only those in branches of one condition are never both run."""
        for i, one in enumerate(calls):
            for other in calls[i + 1 :]:
                branches = [
                    each
                    for each in self.scene.above(one)
                    if isinstance(each, ast.If) and _branch(each, one) != _branch(each, other) and _branch(each, other)
                ]
                if not branches:
                    raise Cannot("a microbatch has several calls of backward: add the losses, and call it once", other)

    def _rows(self) -> str:
        """Return the number of rows of a microbatch, from what the model is given."""
        for call in self.scene.calls(self.loop):
            if dotted(call.func) == self.names.model or kind_of_name(dotted(call.func)) == "model":
                first = next(
                    (each for each in call.args if isinstance(each, ast.Name | ast.Attribute | ast.Subscript)), None
                )
                if first is not None and any(
                    isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store) and each.lineno > call.lineno
                    for each in ast.walk(self.loop)
                    if dotted(each) == dotted(first)
                ):
                    raise Cannot(
                        "what the model is given is replaced before its backward, so its rows are not known", call
                    )
                if first is not None:
                    return f"len({self.scene.words.text(first)})"
        return "1"


def _branch(branch: ast.If, node: ast.AST) -> str:
    """Return in which branch of a condition a node stands."""
    for name, block in (("body", branch.body), ("orelse", branch.orelse)):
        if any(each is node for statement in block for each in ast.walk(statement)):
            return name
    return ""
