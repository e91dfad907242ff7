"""How the simulation evaluates an expression."""

import ast
import re
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

from microbatch.linting.calls import Calls, is_library
from microbatch.linting.conditions import Conditions
from microbatch.linting.generators import Generators
from microbatch.linting.guesses import MEAN_LOSSES, kind_of_name, names_window
from microbatch.linting.operations import Operations
from microbatch.linting.syntax import as_function, dotted, last_name, parts_of, text_of
from microbatch.linting.values import Data, Function, Num, Obj, Unknown, as_loss, hangs_on_data, is_number, number, tags

__all__ = ["Expressions"]

# Holders of settings: what they hold is a setting, not an object with a part in the loop.
_SETTINGS = re.compile(
    r"(^|\.)_?(args?|cfg|config|conf|configs|hparams|hps|flags|params|opts?|options|settings|hyper\w*|c|cli_args|"
    r"training_args)$",
    re.IGNORECASE,
)
# A counter that goes on where an earlier run ended; the doctor begins it at its first value.
_RESUMED = re.compile(
    r"(^|\.|_)(start|restored?|resumed?|init(ial)?|begin|first|last|starting)_?(global_)?"
    r"(step|iter|iteration|epoch|batch|idx|index)s?$",
    re.IGNORECASE,
)
# An index that picks the rows or tokens that count.
_CHOSEN = re.compile(r"mask|valid|active|!= |>= 0|nonzero", re.IGNORECASE)
# The length of an epoch in microbatches.
_LENGTH = re.compile(
    r"(^|_)(epoch_len|len_epoch|(?<!training_)(?<!train_)(num|n|nb)_(train(ing)?_)?batch(es)?|"
    r"(?<!training_)(?<!train_)(steps|iters|batches)_(per|in)_epoch|(train_)?(loader|dataloader)_len\w*|len_(train_|data_?)?(loader|iter)|epoch_length|num_iters|iters|epoch_batches|num_steps|epoch_size)$",
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
    if _RESUMED.search(word):
        return "begin"
    return "length" if _LENGTH.search(word) else ""


@lru_cache(8192)
def _is_loss(name: str, text: str) -> bool:
    """Whether a full name is that of a loss of torch, which the file calls `text`."""
    is_function = not name[name.rfind(".") + 1 :][:1].isupper()
    return is_function and MEAN_LOSSES.search(name) is not None and (name != text or is_library(text))


class Expressions(Conditions, Calls, Generators, Operations):
    """The part of the machine that reads expressions."""

    def evaluate(self, node: ast.expr) -> Any:
        """The value of an expression."""
        method = self._EXPRESSION_KINDS.get(type(node))
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
        """N, the number of microbatches of a window."""
        self.used_window = True
        return Num(self.run.microbatches, frozenset({"n"}))

    def heap_key(self, node: ast.AST) -> str:
        """The name under which the value of an attribute or a subscript is kept."""
        parts = parts_of(node)
        if parts is None:
            return dotted(node)
        base, last = parts
        if isinstance(base, ast.Name):
            frame = self.frame.find(base.id)
            held = frame.locals[base.id] if frame is not None else self.globals.locals.get(base.id)
            if held is None and base.id == "self" and self.frame.owner:
                return f"{self.frame.holder}::{last.removeprefix('.')}"
            key = base.id
        else:
            key = self.heap_key(base)
            held = self.heap.get(key)
        if isinstance(held, Obj) and held.kind in ("self", "instance") and held.info.get("id"):
            return f"{held.info['id']}::{last.removeprefix('.')}"
        return key + last

    def guess(self, name: str) -> Obj | None:
        """An object by the name alone."""
        kind = _kind_by_name(name)
        return Obj(kind, name.rsplit(".", 1)[-1]) if kind else None

    def _name(self, node: ast.Name) -> Any:
        name = node.id
        is_window = name in self.window_names or self.names_window(node)
        frame = self.frame.find(name)
        if frame is not None:
            return self.window() if is_window and (id(frame), name) not in self.moved else frame.locals[name]
        if is_window:
            return self.window()
        if name in self.globals.locals:
            return self.globals.locals[name]
        if name in self.module.functions:
            return self.module.functions[name]
        if name in self.module.classes:
            return Obj("class", name)
        found = self._library_loss(name) or self.guess(name)
        if found is not None and not name.isupper():
            self.globals.locals[name] = found
            return found
        return self._by_word(name, name)

    def _library_loss(self, text: str) -> Obj | None:
        """A loss of torch that is not called yet: `F.mse_loss`, kept in a variable."""
        name = self.module.full_name(text)
        return Obj("criterion", name, {"reduction": "mean"}) if _is_loss(name, text) else None

    def _by_word(self, word: str, key: str) -> Any:
        """What a word alone says of a number that the file does not show."""
        if key.endswith("state.iteration"):
            return self.trace.tick  # Ignite's engine counts from 1
        said = _word_of_number(word)
        if said == "begin":
            return 0
        return self.run.length if said == "length" else Unknown(key)

    def _attribute(self, node: ast.Attribute) -> Any:
        text = dotted(node)
        key = self.heap_key(node) if text else ""
        if text and (text in self.window_names or self.names_window(node)) and (0, key) not in self.moved:
            return self.window()
        if key and key in self.heap:
            return self.heap[key]
        if text and node.attr.islower() and (loss := self._library_loss(text)) is not None:
            return loss
        base = self.evaluate(node.value)
        if node.attr == "grad" and not (isinstance(base, Data) and base.weights):
            return Unknown(text or text_of(node))
        if isinstance(base, Data):
            return self._attribute_of_data(base, node)
        if isinstance(base, Obj):
            found = self.attribute_of_object(base, node) if "class" not in base.info else self.own_attribute(base, node)
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
            return Unknown(text_of(node), data=True)
        if "loss" in node.attr:
            mean = base.reduction or ("mean" if node.attr == "loss" and base.forward_synced is not None else "")
            return replace(as_loss(base), reduction=mean)
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
        index = self._slice(node.slice, base, node) if isinstance(node.slice, ast.Slice) else self.evaluate(node.slice)
        if isinstance(base, (tuple, list)) and isinstance(index, (int, Num)):
            position = int(number(index))
            if -len(base) <= position < len(base):
                return base[position]
            if len(base) == 1 and isinstance(base[0], Data):
                return base[0]  # `tuple(t.to(device) for t in batch)`: all parts are alike
        if isinstance(base, dict):
            return base.get(index, Unknown(text_of(node))) if isinstance(index, str) else _any_of(base, node)
        if isinstance(base, Data):
            if hangs_on_data(index) and base.weights and _CHOSEN.search(text_of(node.slice)):
                return replace(base, tokens=node.lineno)
            return as_loss(base) if isinstance(index, str) and "loss" in index else base
        if isinstance(base, Obj) and base.kind in ("optimizer", "scheduler", "model", "loader"):
            return base
        if isinstance(base, Unknown) and (
            base.data or (self.trace.begun and not isinstance(node.slice, (ast.Constant, ast.Slice)))
        ):
            return Unknown(text_of(node), data=True)  # a part that this microbatch picks
        may_be_object = isinstance(index, str) and not _SETTINGS.search(dotted(node.value))
        return (self.guess(str(index)) if may_be_object else None) or Unknown(text or text_of(node))

    def _slice(self, node: ast.Slice, base: Any, where: ast.AST) -> Any:
        for part in (node.lower, node.upper, node.step):
            if part is not None:
                self.evaluate(part)
        if isinstance(base, (Data, Unknown)) and node.lower is not None and node.upper is not None and self.loop_depth:
            self.trace.mark("slice", where, text_of(where))
        return None

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
        times, origin = 1, frozenset[str]()
        for generator in node.generators:
            value = self.evaluate(generator.iter)
            times *= len(value) if isinstance(value, range) else 1
            origin |= tags(value) & {"rows"}
            self.store(
                generator.target,
                self.item_of(value) if isinstance(value, (Obj, Data)) else Unknown(text_of(generator.target)),
            )
        element = self.evaluate(node.elt)
        return [element] * min(times, 200) if isinstance(element, Data) else Unknown(text_of(node), tags=origin)

    def _lambda(self, node: ast.Lambda) -> Any:
        function = as_function(node)
        if self.relevant is not None:
            self.relevant.update(function.body)
        return Function("lambda", function, None, self.frame)

    def _if_expression(self, node: ast.IfExp) -> Any:
        taken = self.choose(node)
        return self.evaluate(node.body if taken else node.orelse)

    def _yield(self, node: ast.Yield) -> Any:
        value = None if node.value is None else self.evaluate(node.value)
        if self.frame.at_yield is not None:
            self.frame.at_yield(value)

    def _named(self, node: ast.NamedExpr) -> Any:
        value = self.evaluate(node.value)
        self.store(node.target, value)
        return value

    def _binary(self, node: ast.BinOp) -> Any:
        return self.operate(self.evaluate(node.left), node.op, self.evaluate(node.right), node=node)

    def _unary(self, node: ast.UnaryOp) -> Any:
        value = self.evaluate(node.operand)
        if isinstance(node.op, ast.Not):
            known = self.known_truth(value)
            return Unknown(f"not {text_of(node.operand)}", data=hangs_on_data(value)) if known is None else not known
        if isinstance(node.op, ast.USub) and is_number(value):
            return Num(-number(value), tags(value))
        return value

    _EXPRESSION_KINDS: ClassVar[dict[type, Any]] = {
        ast.Name: _name,
        ast.Attribute: _attribute,
        ast.Subscript: _subscript,
        ast.Constant: _constant,
        ast.Tuple: _sequence,
        ast.List: _sequence,
        ast.Dict: _dict,
        ast.JoinedStr: _joined,
        ast.ListComp: _comprehension,
        ast.GeneratorExp: _comprehension,
        ast.SetComp: _comprehension,
        ast.Lambda: _lambda,
        ast.IfExp: _if_expression,
        ast.NamedExpr: _named,
        ast.Yield: _yield,
        ast.YieldFrom: Generators.yield_from,
        ast.BinOp: _binary,
        ast.UnaryOp: _unary,
        ast.Compare: Conditions.compare,
        ast.BoolOp: Conditions.boolean,
        ast.Call: Calls.call,
    }


def _any_of(values: dict[Any, Any], node: ast.AST) -> Any:
    """One of several values, where the file does not show which: they may all be losses of one kind."""
    first = next(iter(values.values()), None)
    losses = all(isinstance(v, Obj) and v.kind == "criterion" for v in values.values())
    if losses and isinstance(first, Obj) and all(v.info == first.info for v in values.values()):
        return first
    return Unknown(text_of(node))
