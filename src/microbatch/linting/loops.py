"""How often the loops of a file run, and which of their iterations are microbatches."""

import ast
from typing import Any

from microbatch.linting.clearing import averages_weights, clears_all
from microbatch.linting.generators import Generators
from microbatch.linting.guesses import LOADER_WORDS, PIECE_WORDS
from microbatch.linting.syntax import FunctionNode, Loop, dotted, last_name, text_of
from microbatch.linting.values import Data, Obj, Unknown, is_number, number, tags
from microbatch.linting.waiting_lists import waiting_lists

__all__ = ["BREAK", "CONTINUE", "Loops"]

BREAK, CONTINUE = "break", "continue"


class Loops(Generators):
    """The part of the machine that runs loops."""

    def loop_for(self, node: ast.For) -> Any:
        """Run a `for` loop."""
        if clears_all(node) and len(self.trace.groups) < 2:
            self.trace.zero(node, None)
            self.trace.cleared.update(each for each in ast.walk(node) if isinstance(each, ast.stmt))
            return None
        if averages_weights(node) and self.trace.begun:
            self.trace.mark("ema", node, text_of(node.iter))
            return None
        micro, value = self.is_micro(node), self.evaluate(node.iter)
        made = self.generator(value) if micro else None
        if made is not None:
            self.trace.loop = node
            return self.feed(node, *made, micro=True)
        items, counted = self.items(node, value)
        if micro:
            if self.frame.feeds is None:
                self.trace.loop = node
            if not counted:
                self.begin_epoch()
        elif self.fills_list(node):
            self.begin_epoch()
        still = not micro and not self.holds_backward(node)
        if still and self.still_depth:
            items = items[:2]  # a table of tables: its entries are alike, and there are very many
        evaluates = still and (LOADER_WORDS.search(text_of(node.iter)) is not None or self._follows_training(node))
        self.trace.evaluating += evaluates
        self.still_depth += still
        try:
            return self._turns(node, items, micro=micro, counted=counted)
        finally:
            self.still_depth -= still
            self.trace.evaluating -= evaluates

    def _follows_training(self, node: ast.For) -> bool:
        """Whether a loop that trains stands before this one in the same function, and none is around it."""
        if self.loop_depth or not self.trace.begun:
            return False
        holder = next((p for p in self.module.around(node) if isinstance(p, FunctionNode)), self.module.tree)
        return any(isinstance(s, Loop) and s.lineno < node.lineno and self.holds_backward(s) for s in holder.body)

    def loop_while(self, node: ast.While) -> Any:
        """Run a `while` loop."""
        limit = self.count_of_loop(node)
        micro = self.is_micro(node)
        if not micro and not self.holds_backward(node):
            limit = 1
        if micro:
            if self.frame.feeds is None:
                self.trace.loop = node
            self.begin_epoch()
        waits = not micro and isinstance(node.test, ast.Constant) and not self.holds_backward(node)
        self.trace.occasional += waits  # it may end at any `break`
        try:
            return self._turns_of_while(node, limit, micro=micro)
        finally:
            self.trace.occasional -= waits

    def _turns_of_while(self, node: ast.While, limit: int, *, micro: bool) -> Any:
        for index in range(limit):
            value = self.evaluate(node.test)
            if not isinstance(value, (Unknown, Data)) and not self.truth(value, node.test):
                break
            if micro:
                self.begin_microbatch(last=index == limit - 1)
            signal = self.body(node)
            if signal == BREAK:
                break
            if signal is not None and signal != CONTINUE:
                return signal
        return None

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
        """Run one turn of a loop."""
        self.loop_depth += 1
        try:
            return self.block(node.body)
        finally:
            self.loop_depth -= 1

    def count_of_loop(self, node: ast.For | ast.While) -> int:
        """How often a loop whose end is not known runs."""
        if self.is_micro(node) or self.fills_list(node):
            return self.run.length
        if not self.holds_backward(node) or self.loop_depth > 2 or self.module.goes_through_models(node):
            return 1
        return 3 if self._runs_once_a_window(node) else self.run.epochs

    def fills_list(self, node: ast.For | ast.While) -> bool:
        """Whether the turns of a loop add microbatches to a list that waits for its window to be full."""
        return any(node in filling for filling in waiting_lists(self.module).values())

    def _runs_once_a_window(self, node: ast.For | ast.While) -> bool:
        """Whether the N microbatches of one window are a loop inside, and no other loop is between."""
        key = f"windows in {id(node)}"
        return self.module.once(key, lambda: self._holds_window(node))

    def _holds_window(self, node: ast.For | ast.While) -> bool:
        inner = [each for each in ast.walk(node) if isinstance(each, (ast.For, ast.While)) and each is not node]
        counted = {each for each in inner if isinstance(each, ast.For) and self.is_counted(each)}
        between = any(each not in counted and counted & set(ast.walk(each)) for each in inner)
        return bool(counted) and not between

    def is_counted(self, node: ast.For) -> bool:
        """Whether a loop runs once for each of the N microbatches: `for i in range(n)`."""
        if self._over_window(node):
            return True
        if (
            not isinstance(node.iter, ast.Call)
            or last_name(node.iter.func) not in ("range", "trange")
            or not node.iter.args
        ):
            return False
        end = node.iter.args[-1 if len(node.iter.args) < 3 else 1]
        return any(self.is_window(part) for part in ast.walk(end) if isinstance(part, ast.expr))

    def _over_window(self, node: ast.For) -> bool:
        """Whether a loop runs over the list of one window's microbatches."""
        return any(
            isinstance(part, ast.Name) and part.id in self.module.window_lists for part in ast.walk(node.iter)
        ) and self.module.is_microbatch_loop(node, self.frame.owner)

    def is_window(self, node: ast.AST) -> bool:
        """Whether an expression is N."""
        text = dotted(node)
        if isinstance(node, ast.Constant):
            return node.value in self.window_literals
        return text in self.window_names or self.names_window(node)

    def items(self, node: ast.For, value: Any) -> tuple[list[Any], bool]:
        """The items of what a `for` loop goes through, and whether they are the N microbatches of one window."""
        outer = not self.is_micro(node) and self.holds_backward(node)
        if isinstance(value, range) and not value and outer:
            return list(range(self.count_of_loop(node))), False  # `range(0)` in a tutorial that is not to train
        if isinstance(value, range) and not outer and len(value) <= self.run.microbatches:
            return list(value), "n" in tags(self.range_end)
        count = self.count_of_loop(node)
        if isinstance(value, range):
            return list(value[: self._limit(count, outer=outer)]), "n" in tags(self.range_end)
        if self._over_window(node) and not (isinstance(value, (tuple, list)) and len(value) > 1):
            return self._window_items(value), True
        if isinstance(value, (tuple, list)):
            return list(value)[: self._limit(count, outer=outer)], False
        if isinstance(value, Obj) and value.kind == "enumerate":
            start = number(value.info["start"])
            return [(start + i, self._item_at(value.info["over"], i)) for i in range(count)], False
        if isinstance(value, Unknown) and value.key.startswith(("range(", "trange(")):
            if isinstance(node.iter, ast.Call) and len(node.iter.args) == 3 and self._cuts_window(node):
                self.used_window = True
                return list(range(self.run.microbatches)), True
            whole = "n" in value.tags and not outer  # a number of whole windows: nothing is left over
            turns = count // self.run.microbatches * self.run.microbatches if whole else count
            begin = self.range_begins.get(value.key, 0)
            first = int(number(begin)) if is_number(begin) else 0
            if not is_number(begin) and not outer:
                self.trace.settings["origin"] = begin.key if isinstance(begin, Unknown) else text_of(node.iter)
            return list(range(first, first + turns)), whole
        if PIECE_WORDS.search(text_of(node.iter)) and self.module.is_inside_loop(node):
            self.used_window = True
            return [self.item_of(value) for _ in range(self.run.microbatches)], True
        if isinstance(value, Obj) and value.kind == "zip":
            over = value.info["over"]
            short = min((len(each) for each in over if isinstance(each, range)), default=count)
            return [self._item_at(value, index) for index in range(min(count, short) or count)], False
        return [self.item_of(value) for _ in range(count)], False

    def _limit(self, count: int, *, outer: bool) -> int:
        """How many turns a loop over known items takes at most."""
        return count if outer else max(self.run.length, self.run.microbatches)

    def _cuts_window(self, node: ast.For) -> bool:
        """Whether a loop goes through a batch piece by piece, with the step after it."""
        micro = self.module.is_microbatch_loop(node, self.frame.owner)
        inside = self.module.is_inside_loop(node) or self.module.callers_step(node)
        return micro and inside and self.module.step_follows(node)

    def _window_items(self, value: Any) -> list[Any]:
        """The N microbatches of a list that the file fills in a way that is not followed."""
        self.used_window = True
        if isinstance(value, Obj) and value.kind == "enumerate":
            start, over = number(value.info["start"]), value.info["over"]
            return [(start + k, self.item_of(over)) for k in range(self.run.microbatches)]
        if isinstance(value, (tuple, list)) and value:
            numbered = isinstance(value[0], tuple) and is_number(value[0][0]) if value[0] else False
            return [(k, value[0][1]) if numbered else value[0] for k in range(self.run.microbatches)]
        return [self.item_of(value) for _ in range(self.run.microbatches)]

    def _item_at(self, value: Any, index: int) -> Any:
        """The item of an iterable at a place; places are told apart where numbers are counted."""
        if isinstance(value, Obj) and value.kind == "zip":
            return tuple(self._item_at(part, index) for part in value.info["over"])
        if isinstance(value, Obj) and value.kind == "enumerate":
            return number(value.info["start"]) + index, self._item_at(value.info["over"], index)
        if isinstance(value, (range, list, tuple)) and index < len(value):
            return value[index]
        if isinstance(value, Unknown) and value.key.startswith("range("):
            return index
        return self.item_of(value)

    def item_of(self, value: Any) -> Any:
        """One item of an iterable."""
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
