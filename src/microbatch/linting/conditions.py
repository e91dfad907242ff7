"""How the simulation decides a condition that the file does not settle."""

import ast
import operator
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from microbatch.linting.generators import yields
from microbatch.linting.simulated import Simulated
from microbatch.linting.syntax import last_name, text_of
from microbatch.linting.values import Bound, Data, Function, Obj, Unknown, hangs_on_data, is_number, number, tags

__all__ = ["Conditions"]

_COMPARE: dict[type, Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_TRAINING = re.compile(r"(^|\W)(is_)?train(ing|_mode)?(?![\w.])|is_grad_enabled", re.IGNORECASE)
_MAIN_RANK = re.compile(
    r"main_process|is_main|(^|_)rank\b.*(== 0|in )|master_process|is_rank_zero|is_global_zero|\bverbose\b|primary",
    re.IGNORECASE,
)
_MEMORY = re.compile(r"memory|\boom\b", re.IGNORECASE)  # of which a handler of exceptions asks
_FINITE = re.compile(r"isfinite")
_BROKEN = re.compile(r"isnan|isinf|is_nan|nan\b|overflow|== 0|exceed", re.IGNORECASE)


@lru_cache(8192)
def _usual_answer(key: str) -> bool | None:
    """The answer of a condition that is the same in all training: yes, this is training, on the first rank."""
    if _TRAINING.search(key) and "trainer" not in key.lower():
        return not re.search(r"!=|not in|eval", key)
    return True if _MAIN_RANK.search(key) else None


@lru_cache(8192)
def _asks_for_finite(key: str) -> tuple[bool, bool]:
    """Whether a condition asks for finite numbers, and whether it asks for broken ones."""
    return _FINITE.search(key) is not None and not key.startswith("not "), _BROKEN.search(key) is not None


@dataclass(frozen=True, slots=True)
class _Branch:
    """What one branch of a condition does, the same in all runs.

    Attributes:
        body: Its statements.
        jumps: Whether it ends in a jump.
        continues: Whether this jump is a `continue`.
        yields: Whether it yields.
        holds: Whether it touches gradients: a backward, a step or a clearing.
        backward: Whether it runs a backward.
    """

    body: list[ast.stmt]
    jumps: bool = False
    continues: bool = False
    yields: bool = False
    holds: bool = False
    backward: bool = False


@dataclass(frozen=True, slots=True)
class _Branches:
    """What a condition decides about: its two branches, and the place of the whole."""

    taken: _Branch
    other: _Branch
    node: ast.AST

    def turned(self) -> "_Branches":
        """The same of the opposite condition."""
        return _Branches(self.other, self.taken, self.node)


_NOTHING = _Branch([])


class Conditions(Simulated):
    """The part of the machine that decides conditions."""

    def compare(self, node: ast.Compare) -> Any:
        """The value of a comparison."""
        values = [self.evaluate(node.left)] + [self.evaluate(c) for c in node.comparators]
        if len(values) == 2:
            found = self._compare_two(values[0], node.ops[0], values[1], node=node)
            if found is not None:
                return found
        elif all(is_number(v) for v in values) and all(type(op) in _COMPARE for op in node.ops):
            pairs = zip(node.ops, pairwise(values), strict=True)
            return all(_COMPARE[type(op)](number(a), number(b)) for op, (a, b) in pairs)
        return Unknown(text_of(node), data=any(hangs_on_data(v) for v in values))

    def _compare_two(self, left: Any, op: ast.cmpop, right: Any, *, node: ast.AST) -> bool | None:
        if isinstance(op, (ast.Is, ast.IsNot)):
            if right is None and isinstance(left, Data) and left.kind == "batch":
                return None
            if right is None and not isinstance(left, Unknown):
                missing = left is None
                if isinstance(left, Obj) and left.info.get("maybe"):
                    missing = not self.decide(left.name, node)
                return missing if isinstance(op, ast.Is) else not missing
            if isinstance(left, bool) and isinstance(right, bool):
                return (left is right) if isinstance(op, ast.Is) else left is not right
            return None
        if isinstance(op, (ast.In, ast.NotIn)) and is_number(left):
            if not isinstance(right, (range, list, tuple, frozenset)) or not all(is_number(each) for each in right):
                return None
            return (number(left) in [number(each) for each in right]) == isinstance(op, ast.In)
        if is_number(left) and is_number(right) and type(op) in _COMPARE:
            return _COMPARE[type(op)](number(left), number(right))
        if isinstance(left, str) and isinstance(right, str) and type(op) in _COMPARE:
            return _COMPARE[type(op)](left, right)
        return None

    def boolean(self, node: ast.BoolOp) -> Any:
        """The value of `and` or `or`; unknown where the parts that are known do not settle it."""
        is_and = isinstance(node.op, ast.And)
        unknown: Any = None
        value: Any = None
        for part in node.values:
            value = self.evaluate(part)
            known = self.known_truth(value)
            if known is None:
                unknown = unknown or Unknown(text_of(node), data=hangs_on_data(value))
            elif known != is_and:
                return not is_and if unknown is None or isinstance(value, bool) else unknown
        return unknown if unknown is not None else value

    def known_truth(self, value: Any) -> bool | None:
        """Whether a value is true; `None` where the file does not show it."""
        if isinstance(value, (Unknown, Data)):
            return None
        if isinstance(value, Obj):
            return None if value.info.get("maybe") else True
        if isinstance(value, (Function, Bound)):
            return True
        return bool(number(value))

    def truth(self, value: Any, node: ast.AST) -> bool:
        """Whether a value is true; the run decides where the file does not show it."""
        known = self.known_truth(value)
        if known is not None:
            return known
        return self.decide(value.key if isinstance(value, Unknown) and value.key else text_of(node), node)

    def choose(self, node: ast.If | ast.IfExp) -> bool:
        """Whether a condition takes its first branch."""
        test = node.test
        value = self.evaluate(test)
        known = self.known_truth(value)
        tested = isinstance(value, Unknown) and value.data and "torch.is" in value.key and "loss" in value.key
        if tested or (isinstance(value, Data) and not value.number and value.kind != "batch"):
            self.trace.mark("sync", test, "condition")
        if known is False and self.relevant is None and isinstance(node, ast.If) and self._comes_late(node):
            self.now_and_then = known = True
        if known is not None:
            return known
        return self._settle(test, value, self._branches(node))

    def _branches(self, node: ast.If | ast.IfExp) -> _Branches:
        """What a condition decides about; its statements are read once, and not in each run."""
        owner = self.frame.owner
        known: dict[Any, _Branches] = self.module.once("branches", dict)
        found = known.get((node, owner))
        if found is None:
            both = (node.body, node.orelse) if isinstance(node, ast.If) else ([], [])
            taken, other = (self._branch(body, owner) for body in both)
            found = known[node, owner] = _Branches(taken, other, node)
        return found

    def _branch(self, body: list[ast.stmt], owner: str | None) -> _Branch:
        return _Branch(
            body,
            jumps=_jumps(body),
            continues=bool(body) and isinstance(body[-1], ast.Continue),
            yields=any(map(yields, body)),
            holds=any(self.module.touches_gradients(statement, owner) for statement in body),
            backward=any(self.module.contains_backward(statement, owner) for statement in body),
        )

    def _settle(self, test: ast.expr, value: Any, branches: _Branches) -> bool:
        """Decide a condition that the file does not show, by what its branches do to gradients."""
        text = value.key if isinstance(value, Unknown) and value.key else text_of(test)
        data = hangs_on_data(value)
        taken, other, node = branches.taken, branches.other, branches.node
        if data and self._may_skip(taken, other):
            skips = 0 < self.run.skip == self.trace.tick
            if skips:
                self.trace.mark("skip", node, text)
            return skips == (taken.jumps or not taken.holds)
        said = self._said_by_words(text, branches, data=data)
        if said is not None:
            return said
        if taken.jumps and not taken.holds:
            if taken.continues and not data and self.trace.begun:
                self.trace.settings["bounds"] = node  # the loop ends where the file does not show
            return False
        if other.jumps and not other.holds:
            return True
        if isinstance(node, ast.If) and not other.body and taken.backward and not self.loop_depth:
            return True
        if isinstance(test, ast.BoolOp):
            looks = self.relevant is None and bool(taken.body) and not data and _only_looks(text, branches)
            return self._settle_parts(test, node, looks=looks)
        flag = isinstance(value, Data) and value.kind == "batch"
        flag |= data and self._asks_window(test)
        only_steps = (taken.holds or other.holds) and not (taken.backward or other.backward)
        if (flag or "n" in tags(value)) and self.trace.begun and only_steps:
            # It comes with the batch, or from a call that is given N: as if it were true at the end of each window.
            self.trace.settings["assumed"] = text
            return (self.trace.tick % self.run.microbatches == 0) == taken.holds
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return not self._settle(test.operand, self.evaluate(test.operand), branches.turned())
        if data:
            return taken.holds or not other.body or all(map(_gives_zero, other.body))
        if _only_looks(text, branches):
            self.now_and_then = bool(taken.body)
            return True
        return self.decide(text, node)

    def _comes_late(self, node: ast.If) -> bool:
        """Whether a condition such as `step % 100 == 99` is true later than the few microbatches that are run."""
        test = node.test.left if isinstance(node.test, ast.Compare) else None
        every = test.right if isinstance(test, ast.BinOp) and isinstance(test.op, ast.Mod) else None
        if not isinstance(every, ast.Constant) or every.value in self.window_literals:
            return False
        branches = self._branches(node)
        return not (branches.taken.jumps or branches.taken.holds or branches.other.holds)

    def _asks_window(self, test: ast.expr) -> bool:
        """Whether N is a part of a condition, found once."""
        found = getattr(test, "_asks_window", None)
        if found is None:
            found = test._asks_window = any(self.is_window(part) for part in ast.walk(test))  # type: ignore[attr-defined]
        return found

    def _said_by_words(self, text: str, branches: _Branches, *, data: bool) -> bool | None:
        """The answer of a condition about memory that ended or numbers that are not finite; `None` for others.

        A generator yields, where it may: what it leaves out is not known.

        Returns:
            The answer.
        """
        if self.handling and _MEMORY.search(text):
            return "not in" not in text and not text.startswith("not ")
        finite, broken = _asks_for_finite(text)
        if finite:
            return True
        if broken and data:
            return text.startswith("not ")
        feeds = branches.taken.yields if self.frame.feeds is not None else None
        return feeds if feeds is not None and feeds != branches.other.yields else None

    def _settle_parts(self, test: ast.BoolOp, node: ast.AST, *, looks: bool) -> bool:
        if looks:
            self.now_and_then = True
            return True
        is_and = isinstance(test.op, ast.And)
        nothing = _Branches(_NOTHING, _NOTHING, node)
        for part in test.values:
            value = self.evaluate(part)
            known = self.known_truth(value)
            taken = self._settle(part, value, nothing) if known is None else known
            self.now_and_then |= known is None and "%" in text_of(part)
            if taken != is_and:
                return taken
        return is_and

    def _may_skip(self, taken: _Branch, other: _Branch) -> bool:
        """A condition on the data that leaves out this microbatch's backward."""
        if not self.loop_depth:
            return False
        if taken.continues and not taken.holds:
            return True
        if not other.body:
            return taken.backward
        return taken.backward != other.backward and not (taken if other.backward else other).holds

    def matches(self, subject: Any, case: ast.match_case) -> bool | None:
        """Whether a value goes into a case of a `match`; `None` where the file does not show it."""
        said: bool | None = None
        if isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None:
            said = True
            if case.pattern.name is not None:
                self.store(ast.Name(case.pattern.name, ast.Store()), subject)
        elif isinstance(case.pattern, ast.MatchValue):
            said = self._compare_two(subject, ast.Eq(), self.evaluate(case.pattern.value), node=case.pattern.value)
        if case.guard is None or said is False:
            return said
        guard = self.known_truth(self.evaluate(case.guard))
        return guard if said else (False if guard is False else None)

    def decide(self, key: str, node: ast.AST) -> bool:
        """The truth of a condition that only the user's settings know; the run fixes it, the same each time."""
        if key in self.run.decisions:
            return self.run.decisions[key]
        if key.startswith("not "):
            return not self.decide(key[4:].strip("()"), node)
        if key.endswith((".grad", ".requires_grad")):
            return True
        usual = _usual_answer(key)
        if usual is not None:
            return usual
        for opposite, sign in ((" is not None", True), (" is None", False)):
            if key.endswith(opposite):
                return self.decide(key[: -len(opposite)], node) == sign
        if self.deciding is None or self.module.statement_of(node) in self.deciding:
            self.run.asked.setdefault(key, node)
        return False


def _jumps(body: list[ast.stmt]) -> bool:
    """Whether statements end in a jump, or in a condition of which every branch does."""
    last = body[-1] if body else None
    if isinstance(last, ast.If):
        return _jumps(last.body) and _jumps(last.orelse)
    return isinstance(last, (ast.Break, ast.Continue, ast.Return, ast.Raise))


def _only_looks(text: str, branches: _Branches) -> bool:
    """Whether a condition is true now and then, and its branches do nothing to gradients: a log, an evaluation."""
    return ("%" in text or "boundary" in text) and not branches.taken.holds and not branches.other.holds


def _gives_zero(statement: ast.stmt) -> bool:
    """Whether a statement sets a loss to 0, as where a microbatch has nothing that counts: `torch.tensor(0.0)`."""
    value = statement.value if isinstance(statement, ast.Assign) else None
    while isinstance(value, ast.Call):
        if last_name(value.func) in ("zeros", "new_zeros", "zeros_like"):
            return True
        inner = value.args[0] if last_name(value.func) in ("tensor", "new_tensor") and value.args else None
        value = inner or (value.func.value if isinstance(value.func, ast.Attribute) else None)
    return isinstance(value, ast.Constant) and type(value.value) in (int, float) and value.value == 0
