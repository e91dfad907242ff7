"""Where a fault stands: the blocks around it, the file's names for N and the scaler, the place of the step."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property

from microbatch.linting.draft import Draft
from microbatch.linting.module import Module
from microbatch.linting.sources import Source
from microbatch.linting.syntax import FunctionNode, Loop, dotted
from microbatch.linting.trace import Trace
from microbatch.linting.verdicts import Reading

__all__ = ["Scene"]


class Scene:
    """One node of a file, with what stands around it.

    Args:
        node: The node.
        source: The source.
        module: Its functions and loops.
        reading: What the simulation saw.
    """

    def __init__(self, node: ast.AST, *, source: Source, module: Module, reading: Reading) -> None:
        self.source, self.module, self.reading, self.node = source, module, reading, node
        self.words = Draft(source)

    @cached_property
    def statement(self) -> ast.stmt | None:
        """The statement that holds the node."""
        return self.module.statement_of(self.node)

    @cached_property
    def scope(self) -> ast.AST:
        """The function that holds the node, or the whole file."""
        return self.scope_of(self.node)

    @cached_property
    def traces(self) -> list[Trace]:
        """All runs of the file."""
        return [outcome.trace for root in self.reading.roots for outcome in root.outcomes]

    @cached_property
    def steps(self) -> set[ast.AST]:
        """The calls of the same function at which an optimizer steps, or that of a function in which one does."""
        found = {step.node for trace in self.traces for step in trace.steps}
        here = {node for node in found if self.scope_of(node) is self.scope}
        for call in self.calls() if found - here else ():
            target = self.module.resolve(call.func, self.module.owner_of(call))
            if target is not None and self.scope_of(call) is self.scope and self.holds(target.node, found):
                here.add(call)
        return here

    @cached_property
    def scaler_step(self) -> ast.Call | None:
        """The call `scaler.step(optimizer)` of the same function."""
        found = {mark.node for trace in self.traces for mark in trace.marks if mark.kind == "scaler step"}
        calls = [
            node for node in found if isinstance(node, ast.Call) and node.args and self.scope_of(node) is self.scope
        ]
        return calls[0] if len(calls) == 1 and isinstance(calls[0].func, ast.Attribute) else None

    def scope_of(self, node: ast.AST) -> ast.AST:
        """Return the function that holds a node, or the tree."""
        while (node := self.module.parents.get(node, self.module.tree)) is not self.module.tree:
            if isinstance(node, FunctionNode):
                break
        return node

    def above(self, node: ast.AST) -> list[ast.stmt]:
        """Return the statements around that of a node, in its function, the innermost first."""
        statement = self.module.statement_of(node)
        return (
            [] if statement is None else [each for each in self.module.above(statement) if isinstance(each, ast.stmt)]
        )

    def block(self, statement: ast.stmt) -> list[ast.stmt]:
        """Return the list of statements that one stands in."""
        parent = self.module.parents.get(statement, self.module.tree)
        for field in ("body", "orelse", "finalbody"):
            held = getattr(parent, field, None)
            if isinstance(held, list) and statement in held:
                return held
        return [statement]

    def holds(self, outer: ast.AST, nodes: set[ast.AST]) -> bool:
        """Return whether one of the nodes stands in another."""
        return any(each in nodes for each in ast.walk(outer))

    def calls(self, inside: ast.AST | None = None) -> Iterator[ast.Call]:
        """Yield the calls of the function, or those in one of its nodes."""
        for node in ast.walk(inside or self.scope):
            if isinstance(node, ast.Call):
                yield node

    def window_names(self) -> list[str]:
        """Return how the function writes N, as it stands in the file: "N", "self.args.accumulate", "8"."""
        names, literals = self.module.windows
        found: dict[str, None] = {}
        for node in ast.walk(self.scope):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and self.is_window(node.right):
                found[self.words.text(node.right)] = None
        for node in ast.walk(self.scope):
            if isinstance(node, ast.Name | ast.Attribute | ast.Subscript) and dotted(node) in names:
                found[self.words.text(node)] = None
        if isinstance(self.scope, FunctionNode) or not found:
            found |= dict.fromkeys(str(number) for number in literals if not names)
        return [text for text in found if "\n" not in text]

    def is_window(self, node: ast.AST) -> bool:
        """Return whether an expression stands for N."""
        names, literals = self.module.windows
        return dotted(node) in names or (isinstance(node, ast.Constant) and node.value in literals)

    def moduli(self, inside: ast.AST) -> list[ast.BinOp]:
        """Return the expressions `i % N` in a node."""
        return [
            node
            for node in ast.walk(inside)
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and self.is_window(node.right)
        ]

    def landing(self, statement: ast.stmt) -> ast.stmt | None:
        """Return the statement that holds the step of its window, as deep as all steps of its branch stand together.

        It is where a line goes that must run once a window: before it or after it.
        """
        current: ast.stmt | None = statement
        while current is not None:
            block = self.block(current)
            parent = self.module.parents.get(current)
            at = block.index(current)
            near = [
                *block[at + 1 :],
                *(reversed(block[:at]) if isinstance(parent, Loop) and current is statement else ()),
            ]
            found = next((each for each in near if self.holds(each, self.steps)), None)
            if found is not None:
                return None if isinstance(found, Loop) else self._deepest(found)
            current = parent if isinstance(parent, Loop | ast.With) else None  # a condition would be lost
        return None

    def _deepest(self, statement: ast.stmt) -> ast.stmt:
        while isinstance(statement, ast.If | ast.With | ast.Try):
            blocks = [getattr(statement, field, []) for field in ("body", "orelse")]
            held = [[each for each in block if self.holds(each, self.steps)] for block in blocks]
            with_step = [each for each in held if each]
            if len(with_step) != 1 or len(with_step[0]) != 1 or isinstance(with_step[0][0], Loop):
                break
            statement = with_step[0][0]
        return statement

    def with_its_condition(self, statement: ast.stmt) -> ast.stmt:
        """Return a statement, or the condition around it that holds nothing else: `if clip: clip_grad_norm_(...)`."""
        parent = self.module.parents.get(statement)
        while (
            isinstance(parent, ast.If)
            and parent.body == [statement]
            and not parent.orelse
            and not self.moduli(parent.test)
        ):
            statement, parent = parent, self.module.parents.get(parent)
        return statement

    def names_of(self, node: ast.AST) -> set[str]:
        """Return the names and dotted names in a node."""
        return {
            text for each in ast.walk(node) if isinstance(each, ast.Name | ast.Attribute) and (text := dotted(each))
        }

    def stored(self, node: ast.AST) -> set[str]:
        """Return the names that a node binds."""
        return {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
