"""How the simulation evaluates an expression, and how it decides a condition that the file does not settle."""

import ast
import operator
import re
from functools import lru_cache
from dataclasses import replace
from fractions import Fraction
from typing import Any

from microbatch.linting.calls import Calls
from microbatch.linting.guesses import kind_of_name, names_window
from microbatch.linting.module import dotted, last_name, text_of
from microbatch.linting.values import Bound, Data, Function, Num, Obj, Unknown, is_number, number, tags

__all__ = ["Expressions"]

_ARITHMETIC: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type, Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
# Holders of settings: what they hold is a setting, not an object with a part in the loop.
_SETTINGS = re.compile(r"(^|\.)_?(args?|cfg|config|conf|configs|hparams|hps|flags|params|opts?|options|settings|hyper\w*|c|cli_args|training_args)$", re.I)
_COUNTS = re.compile(r"mask|tok|count|valid|len|num_|norm|active|words|items|non_?pad|!= ", re.I)
_ROWS = re.compile(r"size\(|shape|len\(|batch_size|bsz|\.numel")
# A counter that goes on where an earlier run ended; the doctor begins it at its first value.
_RESUMED = re.compile(r"(^|\.|_)(start|restore[d]?|resume[d]?|init(ial)?|begin|first|last|starting)_?(global_)?(step|iter|iteration|epoch|batch|idx|index)s?$", re.I)
# The length of an epoch in microbatches.
_LENGTH = re.compile(r"(^|_)(epoch_len|len_epoch|(?<!training_)(?<!train_)(num|n|nb)_(train(ing)?_)?batch(es)?|(?<!training_)(?<!train_)(steps|iters|batches)_(per|in)_epoch|(train_)?(loader|dataloader)_len\w*|"
                     r"len_(train_|data_?)?(loader|iter)|epoch_length|num_iters|iters|epoch_batches|num_steps|epoch_size)$", re.I)  # fmt: skip
_TRAINING = re.compile(r"(^|\W)(is_)?train(ing|_mode)?(?![\w.])|is_grad_enabled", re.I)
_MAIN_RANK = re.compile(r"main_process|is_main|(^|_)rank\b.*(== 0|in )|master_process|is_rank_zero|is_global_zero|\bverbose\b|primary", re.I)
_FINITE = re.compile(r"isfinite")
_BROKEN = re.compile(r"isnan|isinf|is_nan|nan\b|overflow|== 0|exceed", re.I)


@lru_cache(8192)
def _kind_by_name(name: str) -> str | None:
    """The kind of object that a name promises; a setting promises none."""
    base = name.rsplit(".", 1)[0] if "." in name else ""
    return None if base and _SETTINGS.search(base) else kind_of_name(name)


@lru_cache(8192)
def _usual_answer(key: str) -> bool | None:
    """The answer of a condition that is the same in all training: yes, this is training, on the first rank."""
    if _TRAINING.search(key) and "trainer" not in key.lower():
        return not re.search(r"!=|not in|eval", key)
    return True if _MAIN_RANK.search(key) else None


@lru_cache(8192)
def _word_of_number(word: str) -> str:
    """Whether a word is a counter that is resumed ("begin"), or the length of an epoch ("length")."""
    return "begin" if _RESUMED.search(word) else "length" if _LENGTH.search(word) else ""


class Expressions(Calls):
    """The part of the machine that reads expressions."""

    def evaluate(self, node: ast.expr) -> Any:
        """The value of an expression."""
        method = _EXPRESSIONS.get(type(node))
        if method is None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.evaluate(child)
            return Unknown(text_of(node))
        return method(self, node)

    # ---- names

    def names_window(self, node: ast.AST) -> bool:
        """Whether an expression is called as the number of microbatches is usually called, and does not count."""
        found = getattr(node, "_window", None)
        if found is None:
            name, counters = last_name(node), self.module.counters
            found = bool(name) and names_window(name) and dotted(node) not in counters and name not in counters
            node._window = found  # type: ignore[attr-defined]
        return found

    def window(self) -> Num:
        self.used_window = True
        return Num(self.run.microbatches, frozenset({"n"}))

    def heap_key(self, node: ast.AST) -> str:
        text = dotted(node)
        if text.startswith("self.") and self.frame.owner:
            return f"{self.frame.owner}::{text[5:]}"
        return text

    def guess(self, name: str) -> Obj | None:
        """An object by the name alone."""
        kind = _kind_by_name(name)
        return Obj(kind, name.rsplit(".", 1)[-1]) if kind else None

    def _name(self, node: ast.Name) -> Any:
        name = node.id
        is_window = name in self.window_names or self.names_window(node)
        frame = self.frame
        while frame is not None:
            if name in frame.locals:
                return self.window() if is_window and (id(frame), name) not in self.moved else frame.locals[name]
            frame = frame.parent
        if is_window:
            return self.window()
        if name in self.globals.locals:
            return self.globals.locals[name]
        if name in self.module.functions:
            return self.module.functions[name]
        if name in self.module.classes:
            return Obj("class", name)
        found = self.guess(name)
        if found is not None and not name.isupper():
            self.globals.locals[name] = found
            return found
        return self._by_word(name, name)

    def _by_word(self, word: str, key: str) -> Any:
        """What a word alone says of a number that the file does not show."""
        if key.endswith("state.iteration"):
            return self.trace.tick  # Ignite's engine counts from 1
        said = _word_of_number(word)
        return 0 if said == "begin" else self.run.length if said == "length" else Unknown(key)

    def _attribute(self, node: ast.Attribute) -> Any:
        text = dotted(node)
        if text and (text in self.window_names or self.names_window(node)):
            return self.window()
        key = self.heap_key(node) if text else ""
        if key and key in self.heap:
            return self.heap[key]
        base = self.evaluate(node.value)
        if isinstance(base, Data):
            return self._attribute_of_data(base, node)
        if isinstance(base, Obj):
            found = self.attribute_of_object(base, node)
            if found is not None:
                return found
        if isinstance(base, Obj) and base.kind == "self" or (isinstance(base, Unknown) and not base.data):
            found = None if not text else self.guess(text if "." in text else node.attr)
            if found is not None and key:
                self.heap[key] = found
                return found
        if isinstance(base, Unknown) and base.data:
            return Unknown(text or text_of(node), data=True)
        return self._by_word(node.attr, text or text_of(node))

    def _attribute_of_data(self, base: Data, node: ast.Attribute) -> Any:
        if node.attr in ("shape", "ndim", "device", "dtype", "size"):
            return Unknown(f"{text_of(node)}", data=True)
        if "loss" in node.attr:
            mean = base.reduction or ("mean" if node.attr == "loss" and base.forward_synced is not None else "")
            return replace(self.as_loss(base), reduction=mean)
        if node.attr == "data":
            return replace(base, number=True)
        return base

    def _subscript(self, node: ast.Subscript) -> Any:
        text = dotted(node)
        if text and (text in self.window_names or (isinstance(node.slice, ast.Constant) and self.names_window(node))):
            return self.window()
        key = self.heap_key(node) if text else ""
        if key and key in self.heap:
            return self.heap[key]
        base = self.evaluate(node.value)
        index = self.evaluate(node.slice) if not isinstance(node.slice, ast.Slice) else self._slice(node.slice, base, node)
        if isinstance(base, tuple | list) and isinstance(index, int | Num):
            position = int(number(index))
            if -len(base) <= position < len(base):
                return base[position]
        if isinstance(base, dict):
            return base.get(index if isinstance(index, str) else None, Unknown(text_of(node)))
        if isinstance(base, Data):
            return self.as_loss(base) if isinstance(index, str) and "loss" in index else base
        if isinstance(base, Obj) and base.kind in ("optimizer", "scheduler", "model", "loader"):
            return base
        if isinstance(base, Unknown) and base.data:
            return Unknown(text_of(node), data=True)
        return (self.guess(str(index)) if isinstance(index, str) and not _SETTINGS.search(dotted(node.value)) else None) or Unknown(text or text_of(node))

    def _slice(self, node: ast.Slice, base: Any, where: ast.AST) -> Any:
        for part in (node.lower, node.upper, node.step):
            if part is not None:
                self.evaluate(part)
        if isinstance(base, Data | Unknown) and node.lower is not None and node.upper is not None and self.loop_depth:
            self.trace.mark("slice", where, text_of(where))
        return None

    def as_loss(self, value: Data) -> Data:
        return replace(value, kind="loss")

    # ---- displays

    def _constant(self, node: ast.Constant) -> Any:
        value = node.value
        if isinstance(value, int) and not isinstance(value, bool) and value in self.window_literals:
            self.used_window = True
            return Num(value, frozenset({"n"}))
        return value

    def _sequence(self, node: ast.Tuple | ast.List) -> Any:
        values = [self.evaluate(e.value if isinstance(e, ast.Starred) else e) for e in node.elts]
        return tuple(values) if isinstance(node, ast.Tuple) else values

    def _dict(self, node: ast.Dict) -> Any:
        found: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            name = self.evaluate(key) if key is not None else None
            found[name if isinstance(name, str) else len(found)] = self.evaluate(value)
        return found

    def _joined(self, node: ast.JoinedStr) -> Any:
        parts = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                value = self.evaluate(part.value)
                if isinstance(value, Data) and not value.number and value.kind != "batch":
                    self.trace.mark("sync", part.value, "format")
                parts.append(value)
        return tuple(parts)

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp) -> Any:
        for generator in node.generators:
            value = self.evaluate(generator.iter)
            self.store(generator.target, self.item_of(value) if isinstance(value, Obj | Data) else Unknown(text_of(generator.target)))
        element = self.evaluate(node.elt)
        return [element] if isinstance(element, Data) else Unknown(text_of(node))

    def _lambda(self, node: ast.Lambda) -> Any:
        return Unknown("lambda")

    def _if_expression(self, node: ast.IfExp) -> Any:
        taken = self.choose(node.test, [], [], node)
        return self.evaluate(node.body if taken else node.orelse)

    def _named(self, node: ast.NamedExpr) -> Any:
        value = self.evaluate(node.value)
        self.store(node.target, value)
        return value

    # ---- arithmetic

    def _binary(self, node: ast.BinOp) -> Any:
        return self.operate(self.evaluate(node.left), node.op, self.evaluate(node.right), node)

    def _unary(self, node: ast.UnaryOp) -> Any:
        value = self.evaluate(node.operand)
        if isinstance(node.op, ast.Not):
            known = self.known_truth(value)
            return Unknown(f"not {text_of(node.operand)}", data=isinstance(value, Data) or getattr(value, "data", False)) if known is None else not known
        if isinstance(node.op, ast.USub) and is_number(value):
            return Num(-number(value), tags(value))
        return value

    def operate(self, left: Any, op: ast.operator, right: Any, node: ast.AST, target: str = "") -> Any:
        """The value of `left op right`."""
        if isinstance(left, Data) or isinstance(right, Data):
            return self._operate_data(left, op, right, node)
        if is_number(left) and is_number(right):
            return self._operate_numbers(left, op, right, node)
        if isinstance(left, str) and isinstance(op, ast.Mod):
            return right if isinstance(right, tuple) else (right,)
        if isinstance(left, list) and isinstance(right, list) and isinstance(op, ast.Add) and len(left) + len(right) < 200:
            return left + right
        if isinstance(left, tuple | str) and isinstance(right, tuple | str) and isinstance(op, ast.Add):
            return (*(left if isinstance(left, tuple) else ()), *(right if isinstance(right, tuple) else ()))
        data = any(isinstance(v, Unknown) and v.data for v in (left, right))
        return Unknown(text_of(node), data=data, tags=tags(left, right))

    def _operate_numbers(self, left: Any, op: ast.operator, right: Any, node: ast.AST) -> Any:
        a, b, origin = number(left), number(right), tags(left, right)
        try:
            if isinstance(op, ast.Div):
                value: Any = Fraction(a) / Fraction(b)
            elif isinstance(op, ast.Pow):
                if abs(b) > 16 or abs(a) > 10_000:
                    return Unknown(text_of(node), tags=origin)
                value = Fraction(a) ** int(b) if int(b) == b else float(a) ** float(b)
            elif type(op) in _ARITHMETIC:
                value = _ARITHMETIC[type(op)](a, b)
            else:
                return Unknown(text_of(node), tags=origin)
        except (ArithmeticError, TypeError, ValueError):
            return Unknown(text_of(node), tags=origin)
        if isinstance(value, int) and value.bit_length() > 2000:
            return Unknown(text_of(node), tags=origin)
        return Num(value, origin) if origin else value

    def _operate_data(self, left: Any, op: ast.operator, right: Any, node: ast.AST) -> Any:
        if isinstance(left, Data) and isinstance(right, Data):
            return self._two_data(left, op, right, node)
        data, other = (left, right) if isinstance(left, Data) else (right, left)
        if data.kind == "batch" and not data.weights:
            return data
        if isinstance(op, ast.Div) and data is right:
            return replace(data, blurred=True)
        if isinstance(op, ast.Mult | ast.Div):
            return self._scaled(data, op, other, node)
        if isinstance(op, ast.MatMult):
            return data
        if isinstance(op, ast.FloorDiv | ast.Mod | ast.Pow):
            return replace(data, blurred=True)
        return data

    def _scaled(self, data: Data, op: ast.operator, other: Any, node: ast.AST) -> Data:
        line = getattr(node, "lineno", 0)
        if is_number(other):
            value = Fraction(number(other)) if number(other) == number(other) and abs(number(other)) != float("inf") else Fraction(1)
            is_n = "n" in tags(other)
            if value == 0:
                return data
            if is_n or data.number:
                return data.times(1 / value if isinstance(op, ast.Div) else value, line if is_n else 0)
            if isinstance(op, ast.Div) and data.reduction == "sum":
                return replace(data, reduction="mean")
            return data
        if isinstance(op, ast.Div):
            if data.number:
                return replace(data, blurred=True)
            if data.reduction == "sum":
                rows = isinstance(other, Unknown) and bool(_ROWS.search(other.key))
                counted = isinstance(other, Unknown) and (other.data or _COUNTS.search(other.key))
                return replace(data, reduction="mean", tokens=line if counted and not rows else data.tokens)
            if isinstance(other, Unknown) and (other.data or _ROWS.search(other.key)):
                return data
            return replace(data, opaque=(*data.opaque, f"divided by {text_of(node.right if isinstance(node, ast.BinOp) else node)}"))
        if isinstance(other, Unknown) and not data.number:
            return replace(data, opaque=(*data.opaque, "multiplied by a value that the file does not show"))
        return replace(data, blurred=True) if data.number else data

    def _two_data(self, left: Data, op: ast.operator, right: Data, node: ast.AST) -> Any:
        line = getattr(node, "lineno", 0)
        if isinstance(op, ast.Div):
            if left.reduction == "sum" and left.weights:
                counts = isinstance(node, ast.BinOp) and _COUNTS.search(text_of(node.right))
                return replace(left, reduction="mean", tokens=line if counts else left.tokens)
            return replace(left, blurred=True) if left.weights else right
        if isinstance(op, ast.MatMult):
            return replace(self.combine([left, right], node), coupled=line)
        if isinstance(op, ast.Mult):
            return left if left.weights else right
        if isinstance(op, ast.Sub) and left.number and right.number:
            weights = {m: left.weights.get(m, Fraction(0)) - right.weights.get(m, Fraction(0)) for m in {*left.weights, *right.weights}}
            return replace(left, weights={m: w for m, w in weights.items() if w}, blurred=left.blurred or right.blurred)
        return self.combine([left, right], node)

    def combine(self, values: list[Data], node: ast.AST) -> Data:
        """One value out of several: a sum over microbatches, or an objective of several terms in one microbatch."""
        first = next((v for v in values if v.kind == "loss"), values[0])
        weights: dict[int, Fraction] = {}
        for value in values:
            for m, w in value.weights.items():
                weights.setdefault(m, w)
        reductions = {v.reduction for v in values if v.weights and v.kind == "loss"} or {v.reduction for v in values}
        synced = [v.forward_synced for v in values if v.forward_synced is not None]
        return Data(
            weights,
            kind="loss" if any(v.kind == "loss" for v in values) else "tensor" if any(v.kind == "tensor" for v in values) else "batch",
            reduction=reductions.pop() if len(reductions) == 1 else "",
            number=all(v.number for v in values),
            scaled=any(v.scaled for v in values),
            opaque=tuple(dict.fromkeys(o for v in values for o in v.opaque)),
            tokens=max(v.tokens for v in values),
            coupled=max(v.coupled for v in values),
            forward_synced=any(synced) if synced else None,
            divided=max(v.divided for v in values),
            blurred=any(v.blurred for v in values),
            source=first.source,
        )

    # ---- conditions

    def _compare(self, node: ast.Compare) -> Any:
        left = self.evaluate(node.left)
        values = [left] + [self.evaluate(c) for c in node.comparators]
        if len(values) == 2:
            found = self._compare_two(values[0], node.ops[0], values[1], node)
            if found is not None:
                return found
        elif all(is_number(v) for v in values) and all(type(op) in _COMPARE for op in node.ops):
            return all(_COMPARE[type(op)](number(a), number(b)) for op, a, b in zip(node.ops, values, values[1:], strict=False))
        return Unknown(text_of(node), data=any(isinstance(v, Data) or (isinstance(v, Unknown) and v.data) for v in values))

    def _compare_two(self, left: Any, op: ast.cmpop, right: Any, node: ast.AST) -> bool | None:
        if isinstance(op, ast.Is | ast.IsNot):
            if right is None and not isinstance(left, Unknown):
                missing = left is None
                if isinstance(left, Obj) and left.info.get("maybe"):
                    missing = not self.decide(left.name, node)
                return missing if isinstance(op, ast.Is) else not missing
            if isinstance(left, bool) and isinstance(right, bool):
                return (left is right) if isinstance(op, ast.Is) else left is not right
            return None
        if is_number(left) and is_number(right) and type(op) in _COMPARE:
            return _COMPARE[type(op)](number(left), number(right))
        if isinstance(left, str) and isinstance(right, str) and type(op) in _COMPARE:
            return _COMPARE[type(op)](left, right)
        return None

    def _bool(self, node: ast.BoolOp) -> Any:
        is_and = isinstance(node.op, ast.And)
        unknown: Any = None
        value: Any = None
        for part in node.values:
            value = self.evaluate(part)
            known = self.known_truth(value)
            if known is None:
                unknown = unknown or Unknown(text_of(node), data=isinstance(value, Data) or getattr(value, "data", False))
            elif known != is_and:
                return not is_and if unknown is None or isinstance(value, bool) else unknown
        return unknown if unknown is not None else value

    def known_truth(self, value: Any) -> bool | None:
        """Whether a value is true; `None` where the file does not show it."""
        if isinstance(value, Unknown | Data):
            return None
        if isinstance(value, Obj):
            return None if value.info.get("maybe") else True
        if isinstance(value, Function | Bound):
            return True
        return bool(number(value))

    def truth(self, value: Any, node: ast.AST) -> bool:
        known = self.known_truth(value)
        return self.decide(value.key if isinstance(value, Unknown) and value.key else text_of(node), node) if known is None else known

    def choose(self, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt], node: ast.AST) -> bool:
        """Which branch a condition takes."""
        value = self.evaluate(test)
        known = self.known_truth(value)
        tested = isinstance(value, Unknown) and value.data and "torch.is" in value.key and "loss" in value.key
        if tested or (isinstance(value, Data) and not value.number and value.kind != "batch"):
            self.trace.mark("sync", test, "condition")
        if known is not None:
            return known
        return self._settle(test, value, body, orelse, node)

    def _settle(self, test: ast.expr, value: Any, body: list[ast.stmt], orelse: list[ast.stmt], node: ast.AST) -> bool:
        text = value.key if isinstance(value, Unknown) and value.key else text_of(test)
        data = isinstance(value, Data) or (isinstance(value, Unknown) and value.data)
        if data and self._may_skip(body, orelse):
            skips = self.run.skip == self.trace.tick
            if skips:
                self.trace.mark("skip", node, text)
            jumps = _jumps(body) or not self._holds(body)
            return skips == jumps
        if _FINITE.search(text) and not text.startswith("not "):
            return True
        if _BROKEN.search(text) and data:
            return text.startswith("not ")
        if body and _jumps(body) and not self._holds(body):
            if _continues(body) and not data and self.trace.tick:
                self.trace.settings["bounds"] = node  # the loop ends where the file does not show
            return False
        if orelse and _jumps(orelse) and not self._holds(orelse):
            return True
        if isinstance(node, ast.If) and not orelse and self._runs_backward(body) and not self.loop_depth:
            return True
        if isinstance(test, ast.BoolOp):
            return self._settle_parts(test, node)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return not self._settle(test.operand, self.evaluate(test.operand), orelse, body, node)
        if data:
            return bool(self._holds(body)) or not orelse
        if "%" in text and not self._holds(body) and not self._holds(orelse):
            self.now_and_then = bool(body)
            return True
        return self.decide(text, node)

    def _settle_parts(self, test: ast.BoolOp, node: ast.AST) -> bool:
        is_and = isinstance(test.op, ast.And)
        for part in test.values:
            value = self.evaluate(part)
            known = self.known_truth(value)
            taken = self._settle(part, value, [], [], node) if known is None else known
            self.now_and_then |= known is None and "%" in text_of(part)
            if taken != is_and:
                return taken
        return is_and

    def _may_skip(self, body: list[ast.stmt], orelse: list[ast.stmt]) -> bool:
        """A condition on the data that leaves out this microbatch's backward."""
        if not self.loop_depth:
            return False
        return _continues(body) and not self._holds(body) or (not orelse and self._runs_backward(body)) or (
            self._runs_backward(body) != self._runs_backward(orelse) and bool(orelse) and not self._holds(body if self._runs_backward(orelse) else orelse)
        )

    def _runs_backward(self, body: list[ast.stmt]) -> bool:
        return any(self.module.contains_backward(statement, self.frame.owner) for statement in body)

    def _holds(self, body: list[ast.stmt]) -> bool:
        """Whether statements touch gradients: a backward, a step or a clearing."""
        return any(self.module.touches_gradients(statement, self.frame.owner) for statement in body)

    def decide(self, key: str, node: ast.AST) -> bool:
        """The truth of a condition that only the user's settings know; the run fixes it, the same each time."""
        if key in self.run.decisions:
            return self.run.decisions[key]
        if key.startswith("not "):
            return not self.decide(key[4:].strip("()"), node)
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
    return bool(body) and isinstance(body[-1], ast.Break | ast.Continue | ast.Return | ast.Raise)


def _continues(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], ast.Continue)


_EXPRESSIONS: dict[type, Any] = {
    ast.Name: Expressions._name,  # noqa: SLF001 - a table of this module
    ast.Attribute: Expressions._attribute,  # noqa: SLF001
    ast.Subscript: Expressions._subscript,  # noqa: SLF001
    ast.Constant: Expressions._constant,  # noqa: SLF001
    ast.Tuple: Expressions._sequence,  # noqa: SLF001
    ast.List: Expressions._sequence,  # noqa: SLF001
    ast.Dict: Expressions._dict,  # noqa: SLF001
    ast.JoinedStr: Expressions._joined,  # noqa: SLF001
    ast.ListComp: Expressions._comprehension,  # noqa: SLF001
    ast.GeneratorExp: Expressions._comprehension,  # noqa: SLF001
    ast.SetComp: Expressions._comprehension,  # noqa: SLF001
    ast.Lambda: Expressions._lambda,  # noqa: SLF001
    ast.IfExp: Expressions._if_expression,  # noqa: SLF001
    ast.NamedExpr: Expressions._named,  # noqa: SLF001
    ast.BinOp: Expressions._binary,  # noqa: SLF001
    ast.UnaryOp: Expressions._unary,  # noqa: SLF001
    ast.Compare: Expressions._compare,  # noqa: SLF001
    ast.BoolOp: Expressions._bool,  # noqa: SLF001
    ast.Call: Expressions.call,
}
