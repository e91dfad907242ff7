"""Generators of the file: a loop over one runs where the generator yields, with what it yields."""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from microbatch.linting.simulated import Simulated
from microbatch.linting.syntax import FunctionNode, Loop, last_name
from microbatch.linting.values import Function, Obj, number

__all__ = ["Feed", "Generators", "yields"]

_BREAK, _CONTINUE = "break", "continue"


@dataclass(frozen=True, slots=True)
class Feed:
    """The loop that a generator feeds.

    Attributes:
        loop: The loop.
        micro: Whether one turn of it is one microbatch.
    """

    loop: ast.For
    micro: bool


class _Left(Exception):  # noqa: N818 - no error: the loop over a generator ends before the generator does
    """A loop left its generator."""


class Generators(Simulated):
    """The part of the machine that runs loops over generators of the file."""

    def generator(self, value: Any) -> tuple[Obj, int | None] | None:
        """The generator of the file that an iterable is, and where `enumerate` begins to count it."""
        if isinstance(value, Obj) and value.kind == "enumerate":
            found = self.generator(value.info["over"])
            return None if found is None or found[1] is not None else (found[0], int(number(value.info["start"])))
        if isinstance(value, Obj) and value.kind == "instance":
            method = self.module.find_method(value.info["class"], "__iter__")
            if method is not None and yields(method.node):
                held = {"function": method, "args": [], "keywords": {}, "owner": value.info["class"]}
                return Obj("generator", method.name, {**held, "holder": value.info.get("id", "")}), None
        return (value, None) if isinstance(value, Obj) and value.kind == "generator" else None

    def is_generator(self, function: Function) -> bool:
        """Whether a call of a function makes a generator, which runs where a loop goes through it."""
        node: FunctionNode = function.node
        managed = any(last_name(each) in ("contextmanager", "fixture") for each in node.decorator_list)
        return not managed and yields(node) and not self.module.reaches(self.module.key(function))

    def feed(self, node: ast.For, made: Obj, start: int | None, *, micro: bool) -> Any:
        """Run a loop over a generator."""
        info, outer, signals, count = made.info, self.frame, list[Any](), start or 0

        def at_yield(value: Any) -> None:
            nonlocal count
            inner, self.frame = self.frame, outer
            try:
                if micro and not has_loop:
                    self.begin_microbatch()
                self.store(node.target, value if start is None else (count, value))
                signal = self.body(node)
            finally:
                self.frame = inner
            count += 1
            if signal is not None and signal != _CONTINUE:
                signals.append(signal)
                raise _Left

        function: Function = info["function"]
        has_loop = _feeds_in_loop(function.node)
        if micro and not has_loop:
            self.begin_epoch()
        depth = self.loop_depth
        try:
            self.loop_depth = max(depth - 1, 0)
            self.call_function(
                function,
                info["args"],
                info["keywords"],
                owner=info["owner"],
                holder=info["holder"],
                at_yield=at_yield,
                feeds=Feed(node, micro),
            )
        except _Left:
            pass
        finally:
            self.loop_depth = depth
        if signals:
            return None if signals[0] == _BREAK else signals[0]
        return self.block(node.orelse)

    def is_micro(self, node: Loop) -> bool:
        """Whether one turn of a loop is one microbatch, by its own backward or by that of the loop that it feeds."""
        feeds = self.frame.feeds
        if feeds is not None and yields(node):
            return feeds.micro and not any(isinstance(each, Loop) and yields(each) for each in _inside(node))
        return self.module.is_microbatch_loop(node, self.frame.owner)

    def holds_backward(self, node: Loop) -> bool:
        """Whether a loop, or the one that it feeds, runs a backward."""
        feeds = self.frame.feeds
        return (feeds is not None and yields(node)) or self.module.contains_backward(node, self.frame.owner)

    def yield_from(self, node: ast.YieldFrom) -> None:
        """`yield from`: the items of another iterable, one after another."""
        value = self.evaluate(node.value)
        at_yield, feeds = self.frame.at_yield, self.frame.feeds
        if at_yield is None or feeds is None:
            return
        found = self.generator(value)
        if found is not None:
            info = found[0].info
            held = {"owner": info["owner"], "holder": info["holder"]}
            inside: Callable[[Any], None] = at_yield
            self.call_function(info["function"], info["args"], info["keywords"], **held, at_yield=inside, feeds=feeds)
            return
        if feeds.micro:
            self.begin_epoch()
        items = list(value) if isinstance(value, (list, tuple, range)) else [value] * self.run.length
        for index, item in enumerate(items[: self.run.length]):
            if feeds.micro:
                self.begin_microbatch(last=index == len(items) - 1)
            at_yield(item if isinstance(value, (list, tuple, range)) else self.item_of(value))


def yields(node: ast.AST) -> bool:
    """Whether a function or a statement yields itself: not in a function inside of it."""
    found: Any = getattr(node, "_yields", None)
    if found is None:
        found = any(isinstance(each, ast.Yield | ast.YieldFrom) for each in _inside(node))
        node._yields = found  # type: ignore[attr-defined]
    return found


def _feeds_in_loop(node: FunctionNode) -> bool:
    """Whether a generator counts its microbatches itself: in a loop, or by `yield from`."""
    return any(isinstance(each, ast.YieldFrom) or (isinstance(each, Loop) and yields(each)) for each in _inside(node))


def _inside(node: ast.AST) -> list[ast.AST]:
    """All nodes inside of one, without those of functions and classes there."""
    found = list[ast.AST]()
    waiting = list(ast.iter_child_nodes(node))
    while waiting:
        each = waiting.pop()
        found.append(each)
        if not isinstance(each, FunctionNode | ast.ClassDef | ast.Lambda):
            waiting += ast.iter_child_nodes(each)
    return found
