"""How the simulation evaluates an expression."""

import ast
import operator
import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from microbatch.linting.calls import Calls
from microbatch.linting.conditions import Conditions
from microbatch.linting.guesses import kind_of_name, names_window
from microbatch.linting.syntax import dotted, last_name, text_of
from microbatch.linting.values import Data, Num, Obj, Unknown, is_number, number, tags

__all__ = ["Expressions"]

_ARITHMETIC: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
# Holders of settings: what they hold is a setting, not an object with a part in the loop.
_SETTINGS = re.compile(
    r"(^|\.)_?(args?|cfg|config|conf|configs|hparams|hps|flags|params|opts?|options|settings|hyper\w*|c|cli_args|training_args)$",
    re.IGNORECASE,
)
_COUNTS = re.compile(r"mask|tok|count|valid|len|num_|norm|active|words|items|non_?pad|!= ", re.IGNORECASE)
_ROWS = re.compile(r"size\(|shape|len\(|batch_size|bsz|\.numel")
# A counter that goes on where an earlier run ended; the doctor begins it at its first value.
_RESUMED = re.compile(
    r"(^|\.|_)(start|restore[d]?|resume[d]?|init(ial)?|begin|first|last|starting)_?(global_)?(step|iter|iteration|epoch|batch|idx|index)s?$",
    re.IGNORECASE,
)
# The length of an epoch in microbatches.
_LENGTH = re.compile(
    r"(^|_)(epoch_len|len_epoch|(?<!training_)(?<!train_)(num|n|nb)_(train(ing)?_)?batch(es)?|(?<!training_)(?<!train_)(steps|iters|batches)_(per|in)_epoch|(train_)?(loader|dataloader)_len\w*|"
    r"len_(train_|data_?)?(loader|iter)|epoch_length|num_iters|iters|epoch_batches|num_steps|epoch_size)$",
    re.IGNORECASE,
)


@lru_cache(8192)
def _kind_by_name(name: str) -> str | None:
    """The kind of object that a name promises; a setting promises none."""
    base = name.rsplit(".", 1)[0] if "." in name else ""
    return None if base and _SETTINGS.search(base) else kind_of_name(name)


@lru_cache(8192)
def _word_of_number(word: str) -> str:
    """Whether a word is a counter that is resumed ("begin"), or the length of an epoch ("length")."""
    return "begin" if _RESUMED.search(word) else "length" if _LENGTH.search(word) else ""


class Expressions(Conditions, Calls):
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
        if (isinstance(base, Obj) and base.kind == "self") or (isinstance(base, Unknown) and not base.data):
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
        index = (
            self.evaluate(node.slice) if not isinstance(node.slice, ast.Slice) else self._slice(node.slice, base, node)
        )
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
        if isinstance(base, Unknown) and (
            base.data or (self.trace.tick and not isinstance(node.slice, ast.Constant | ast.Slice))
        ):
            return Unknown(text_of(node), data=True)  # a part that this microbatch picks
        return (
            self.guess(str(index)) if isinstance(index, str) and not _SETTINGS.search(dotted(node.value)) else None
        ) or Unknown(text or text_of(node))

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
        times = 1
        for generator in node.generators:
            value = self.evaluate(generator.iter)
            times *= len(value) if isinstance(value, range) else 1
            self.store(
                generator.target,
                self.item_of(value) if isinstance(value, Obj | Data) else Unknown(text_of(generator.target)),
            )
        element = self.evaluate(node.elt)
        return [element] * min(times, 200) if isinstance(element, Data) else Unknown(text_of(node))

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
            return (
                Unknown(f"not {text_of(node.operand)}", data=isinstance(value, Data) or getattr(value, "data", False))
                if known is None
                else not known
            )
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
        if (
            isinstance(left, list)
            and isinstance(right, list)
            and isinstance(op, ast.Add)
            and len(left) + len(right) < 200
        ):
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
            value = (
                Fraction(number(other))
                if number(other) == number(other) and abs(number(other)) != float("inf")
                else Fraction(1)
            )
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
                counted = isinstance(other, Unknown) and other.data
                if not counted and not rows:  # a count of the whole window, as far as the file shows
                    return replace(data, reduction="", opaque=(*data.opaque, "divided by a count"))
                return replace(data, reduction="mean", tokens=line if counted and not rows else data.tokens)
            if isinstance(other, Unknown) and (other.data or _ROWS.search(other.key)):
                return data
            return replace(
                data,
                opaque=(*data.opaque, f"divided by {text_of(node.right if isinstance(node, ast.BinOp) else node)}"),
            )
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
            weights = {
                m: left.weights.get(m, Fraction(0)) - right.weights.get(m, Fraction(0))
                for m in {*left.weights, *right.weights}
            }
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
            kind="loss"
            if any(v.kind == "loss" for v in values)
            else "tensor"
            if any(v.kind == "tensor" for v in values)
            else "batch",
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


_EXPRESSIONS: dict[type, Any] = {
    ast.Name: Expressions._name,
    ast.Attribute: Expressions._attribute,
    ast.Subscript: Expressions._subscript,
    ast.Constant: Expressions._constant,
    ast.Tuple: Expressions._sequence,
    ast.List: Expressions._sequence,
    ast.Dict: Expressions._dict,
    ast.JoinedStr: Expressions._joined,
    ast.ListComp: Expressions._comprehension,
    ast.GeneratorExp: Expressions._comprehension,
    ast.SetComp: Expressions._comprehension,
    ast.Lambda: Expressions._lambda,
    ast.IfExp: Expressions._if_expression,
    ast.NamedExpr: Expressions._named,
    ast.BinOp: Expressions._binary,
    ast.UnaryOp: Expressions._unary,
    ast.Compare: Conditions.compare,
    ast.BoolOp: Conditions.boolean,
    ast.Call: Expressions.call,
}
