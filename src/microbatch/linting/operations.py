"""How the simulation computes: numbers exactly, and data as one weight for each microbatch."""

import ast
import math
import operator
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

from microbatch.linting.simulated import Simulated
from microbatch.linting.syntax import last_name, text_of
from microbatch.linting.values import Data, Num, Unknown, is_number, number, tags

__all__ = ["Operations"]

_ARITHMETIC: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_COUNTS = re.compile(r"mask|tok|count|valid|len|num_|norm|active|words|items|non_?pad|!= ", re.IGNORECASE)
_COEFFICIENTS = re.compile(r"(\b|_)(w|weights?|lambda\w*|coeff?|alpha|beta|gamma)(\b|_|\d)", re.IGNORECASE)  # of a term
_MASKS = re.compile(r"mask|[=!]=|[<>]", re.IGNORECASE)
_SIZES = re.compile(r"batch|bs\b", re.IGNORECASE)
_ROWS = re.compile(r"size\(|shape|len\(|batch_size|bsz|\.numel")


class Operations(Simulated):
    """The part of the machine that computes."""

    def operate(self, left: Any, op: ast.operator, right: Any, *, node: ast.AST) -> Any:
        """The value of `left op right`."""
        if isinstance(left, str) and isinstance(op, ast.Mod):
            return right if isinstance(right, tuple) else (right,)
        if isinstance(left, Data) or isinstance(right, Data):
            return self._operate_data(left, op, right, node=node)
        if is_number(left) and is_number(right):
            return self._operate_numbers(left, op, right, node=node)
        if isinstance(left, frozenset) and isinstance(right, frozenset) and isinstance(op, (ast.BitOr, ast.Sub)):
            return _ARITHMETIC[type(op)](left, right)
        if (
            isinstance(left, list)
            and isinstance(right, list)
            and isinstance(op, ast.Add)
            and len(left) + len(right) < 200
        ):
            return left + right
        if isinstance(left, (tuple, str)) and isinstance(right, (tuple, str)) and isinstance(op, ast.Add):
            return (*(left if isinstance(left, tuple) else ()), *(right if isinstance(right, tuple) else ()))
        data = any(isinstance(v, Unknown) and v.data for v in (left, right))
        if (
            isinstance(op, ast.Mod)
            and isinstance(left, Unknown)
            and not data
            and "n" in tags(right)
            and is_number(right)
        ):
            return self._counts_by_itself(left, right)
        return Unknown(text_of(node), data=data, tags=self._origin(left, op, right, node=node))

    def _counts_by_itself(self, left: Unknown, right: Any) -> Any:
        """A count modulo N that the file does not follow: as if it counted microbatches, and N were full."""
        if not self.trace.begun:
            return Unknown(f"{left.key} modulo N", tags=tags(right))
        self.trace.settings["assumed"] = left.key
        return self.trace.tick % number(right)

    def _origin(self, left: Any, op: ast.operator, right: Any, *, node: ast.AST) -> frozenset[str]:
        """The origins of two numbers together; "by n" where N divides.

        A number of rows, divided by a batch size that no loader of the file has, may be a number of steps: it has no
        origin where the file shows loaders, and "perhaps len" where it shows none.

        Returns:
            The origins.
        """
        found = tags(left, right)
        if not isinstance(op, (ast.Div, ast.FloorDiv)):
            return found
        if "len" in tags(left) and isinstance(node, ast.BinOp) and _SIZES.search(text_of(node.right)):
            shown = self.module.batch_sizes
            if (last_name(node.right) or text_of(node.right)) not in shown:
                found = found - {"len"} if shown else (found - {"len"}) | {"perhaps len"}
        return found | {"by n"} if isinstance(op, ast.Div) and "n" in tags(right) else found

    def _operate_numbers(self, left: Any, op: ast.operator, right: Any, *, node: ast.AST) -> Any:
        a, b, origin = number(left), number(right), self._origin(left, op, right, node=node)
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

    def _operate_data(self, left: Any, op: ast.operator, right: Any, *, node: ast.AST) -> Any:
        if isinstance(left, Data) and isinstance(right, Data):
            return self._two_data(left, op, right, node=node)
        data, other = (left, right) if isinstance(left, Data) else (right, left)
        if data.kind == "batch" and not data.weights:
            return data
        if isinstance(op, ast.Div) and "n" in tags(other):
            self.module.understood.add(node)
        if isinstance(op, ast.Div) and data is right:
            return replace(data, blurred=True)
        if isinstance(op, (ast.Mult, ast.Div)):
            return self._scaled(data, op, other, node=node)
        if isinstance(op, ast.MatMult):
            return data
        if isinstance(op, (ast.FloorDiv, ast.Mod, ast.Pow)):
            return replace(data, blurred=True)
        return data

    def _scaled(self, data: Data, op: ast.operator, other: Any, *, node: ast.AST) -> Data:
        """Data times or divided by something else."""
        if is_number(other):
            return self._scaled_by_number(data, op, other, node=node)
        if data.number:
            return replace(data, blurred=True)
        if isinstance(op, ast.Div):
            return self._divided(data, other, node)
        by_data = isinstance(other, Unknown) and other.data and not data.reduction
        weighs_rows = by_data and (data.kind == "tensor" or _MASKS.search(other.key) is not None)
        if isinstance(other, Unknown) and not weighs_rows:
            coefficient = _COEFFICIENTS.search(other.key)
            doubt = f"`{other.key}`" if coefficient else "multiplied by a value that the file does not show"
            return replace(data, opaque=(*data.opaque, doubt))
        return data

    def _scaled_by_number(self, data: Data, op: ast.operator, other: Any, *, node: ast.AST) -> Data:
        is_n, line = "n" in tags(other), getattr(node, "lineno", 0)
        plain, doubt = number(other), self._may_be_window(data, op, other, node=node)
        value = Fraction(plain) if not isinstance(plain, float) or math.isfinite(plain) else Fraction(1)
        if value == 0:
            return data
        factor = 1 / value if isinstance(op, ast.Div) else value
        if is_n or data.number:
            return data.times(factor, line if is_n and factor < 1 else 0)
        if isinstance(op, ast.Div) and data.reduction == "sum":
            return replace(data, reduction="mean")
        return data if doubt is None else replace(data, opaque=(*data.opaque, doubt))

    def _may_be_window(self, data: Data, op: ast.operator, other: Any, *, node: ast.AST) -> str | None:
        """What is unsure of a loss that is divided by a number: N may be written as a number, or be a length.

        Returns:
            The doubt; `None` where the number is no N, as the 2 in the mean of two terms.
        """
        value = Fraction(number(other)) if math.isfinite(number(other)) else Fraction(1)
        times = 1 / value if isinstance(op, ast.Mult) and value else value
        if data.number or data.kind == "batch" or times.denominator != 1 or times < 2:
            return None
        said = text_of(node.right) if isinstance(node, ast.BinOp) else str(times)
        if "len" in tags(other):
            return f"divided by {said}" if isinstance(op, ast.Div) else None
        left = node.left if isinstance(node, ast.BinOp) else node
        terms = 1 + sum(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add) for n in ast.walk(left))
        if times in (2, terms) or self.module.has_other_window(int(times)):
            return None
        return f"`{said}`, which may be N"

    def _divided(self, data: Data, other: Any, node: ast.AST) -> Data:
        """A tensor divided by what is no known number."""
        if "n" in tags(other) and isinstance(node, ast.BinOp) and isinstance(other, Unknown):
            by_n = isinstance(node.right, ast.BinOp) and isinstance(node.right.op, ast.Mult)
            if not by_n or data.reduction != "sum" or not _ROWS.search(other.key):
                return replace(data, opaque=(*data.opaque, f"divided by {text_of(node.right)}"))
            mean = data.times(Fraction(1, self.run.microbatches), node.lineno)
            return replace(mean, reduction="mean", tokens=0)
        rows = isinstance(other, Unknown) and bool(_ROWS.search(other.key))
        if rows and not other.data and other.key.startswith("sum("):
            rows = False  # of all microbatches of a window
        counted = isinstance(other, Unknown) and other.data
        if data.reduction == "sum" and self._counts_window(node):
            rows = counted = False
        if data.reduction == "sum" and _is_own_size(node):
            return data
        if data.reduction == "sum":
            if not counted and not rows:  # a count of the whole window, as far as the file shows
                return replace(data, reduction="", opaque=(*data.opaque, "divided by a count"))
            tokens = getattr(node, "lineno", 0) if counted and not rows else data.tokens
            return replace(data, reduction="mean", tokens=tokens)
        if counted or rows:
            return data
        divisor = text_of(node.right if isinstance(node, ast.BinOp) else node)
        return replace(data, opaque=(*data.opaque, f"divided by {divisor}"))

    def _counts_window(self, node: ast.AST) -> bool:
        """Whether a divisor comes from outside of the loop over the pieces of a batch: it counts the whole window."""
        loop = self.trace.loop
        if not isinstance(node, ast.BinOp) or loop is None or loop not in self.module.above(node):
            return False
        if not isinstance(loop, ast.For) or not self.module.step_follows(loop):
            return False
        read = {n.id for n in ast.walk(node.right) if isinstance(n, ast.Name)}
        return bool(read) and not read & self.module.stored_in(loop)

    def _two_data(self, left: Data, op: ast.operator, right: Data, *, node: ast.AST) -> Any:
        line = getattr(node, "lineno", 0)
        if isinstance(op, ast.Div):
            if left.reduction == "sum" and left.weights and self._counts_window(node):
                return replace(left, reduction="", opaque=(*left.opaque, "divided by a count"))
            if left.reduction == "sum" and left.weights:
                counts = right.reduction == "sum" or (
                    isinstance(node, ast.BinOp) and _COUNTS.search(text_of(node.right))
                )
                return replace(left, reduction="mean", tokens=line if counts else left.tokens)
            return replace(left, blurred=True) if left.weights else right
        if isinstance(op, ast.MatMult):
            return replace(self.combine([left, right]), coupled=line)
        if isinstance(op, ast.Mult):
            loss, by = (left, right) if left.kind == "loss" or not right.weights else (right, left)
            if loss.kind == "loss" and loss.reduction and by.kind != "loss":
                return replace(loss, opaque=(*loss.opaque, "multiplied by a weight of its microbatch"))
            return loss
        if isinstance(op, ast.Sub) and left.number and right.number:
            weights = {
                m: left.weights.get(m, Fraction(0)) - right.weights.get(m, Fraction(0))
                for m in {*left.weights, *right.weights}
            }
            return replace(left, weights={m: w for m, w in weights.items() if w}, blurred=left.blurred or right.blurred)
        both = self.combine([left, right])
        if left.kind == right.kind == "loss" and _is_mixed(left, right) and isinstance(op, (ast.Add, ast.Sub)):
            return replace(both, mixed=both.mixed or line)
        return both

    def combine(self, values: list[Data]) -> Data:
        """One value out of several: a sum over microbatches, or an objective of several terms in one microbatch."""
        if len(values) == 1 and len(values[0].opaque) < 2:
            return values[0]
        weights: dict[int, Fraction] = {}
        for value in values:
            for m, w in value.weights.items():
                weights.setdefault(m, w)
        reductions = {v.reduction for v in values if v.weights and v.kind == "loss"} or {v.reduction for v in values}
        synced = [v.forward_synced for v in values if v.forward_synced is not None]
        kinds = {v.kind for v in values}
        return Data(
            weights,
            kind=next(kind for kind in ("loss", "tensor", "batch") if kind in kinds),
            reduction=reductions.pop() if len(reductions) == 1 else "",
            number=all(v.number for v in values),
            scaled=any(v.scaled for v in values),
            opaque=tuple(dict.fromkeys(o for v in values for o in v.opaque)),
            tokens=max(v.tokens for v in values),
            coupled=max(v.coupled for v in values),
            forward_synced=any(synced) if synced else None,
            divided=max(v.divided for v in values),
            blurred=any(v.blurred for v in values),
            mixed=max(v.mixed for v in values),
        )


def _is_mixed(left: Data, right: Data) -> bool:
    """Whether one of two losses of a microbatch is divided by N and the other is not."""
    if left.number or right.number or left.weights.keys() != right.weights.keys():
        return False
    return left.weights != right.weights and bool(left.divided) != bool(right.divided)


def _is_own_size(node: ast.AST) -> bool:
    """Whether a sum is divided by its own number of elements, which is 1: `loss / loss.numel()`."""
    right = node.right if isinstance(node, ast.BinOp) else None
    size = right.func if isinstance(right, ast.Call) else None
    return (
        isinstance(size, ast.Attribute)
        and size.attr in ("numel", "nelement")
        and isinstance(node, ast.BinOp)
        and text_of(size.value) == text_of(node.left)
    )
