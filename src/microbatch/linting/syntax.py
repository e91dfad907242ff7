"""Questions to a syntax tree that need no knowledge of the file.

What is the text of a name? Is a call a backward or a step? Answers that are asked for many times are kept on the node.
"""

import ast
from collections.abc import Sequence
from typing import Any

from microbatch.linting.guesses import kind_of_name

__all__ = [
    "FunctionNode",
    "Loop",
    "as_function",
    "declared",
    "dotted",
    "is_backward_call",
    "is_gradient",
    "is_step_call",
    "last_name",
    "pairs",
    "parts_of",
    "steps_inside",
    "subject_of_chain",
    "text_of",
]

CHAIN = 12  # so many branches make a chain of `elif` long
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Loop = ast.For | ast.AsyncFor | ast.While


def dotted(node: ast.AST) -> str:
    """The text of a name, an attribute or a subscript by a constant: "self.args.n", "config['n']".

    Returns:
        The text; empty for any other expression.
    """
    if isinstance(node, ast.Name):
        return node.id
    found = getattr(node, "_dotted", None)
    if found is None:
        found = ""
        if isinstance(node, ast.Attribute):
            base = dotted(node.value)
            found = f"{base}.{node.attr}" if base else ""
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            base = dotted(node.value)
            found = f"{base}[{node.slice.value!r}]" if base else ""
        node._dotted = found  # type: ignore[attr-defined]
    return found


def pairs(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """The targets of an assignment, each with its value: both pairs of `a, b = 1, 2`."""
    found: list[tuple[ast.expr, ast.expr]] = []
    for target in node.targets:
        both = target, node.value
        if all(isinstance(each, ast.Tuple) for each in both) and len(target.elts) == len(node.value.elts):  # type: ignore[attr-defined]
            found += zip(target.elts, node.value.elts, strict=True)  # type: ignore[attr-defined]
        else:
            found.append(both)
    return found


def parts_of(node: ast.AST) -> tuple[ast.expr, str] | None:
    """What an attribute or a subscript belongs to, and its own part: `self.args` and ".n" of "self.args.n".

    Returns:
        Both; `None` for a plain name and for any other expression.
    """
    found: Any = getattr(node, "_parts", False)
    if found is False:
        found, text = None, dotted(node)
        if text and isinstance(node, (ast.Attribute, ast.Subscript)):
            found = node.value, text[len(dotted(node.value)) :]
        node._parts = found  # type: ignore[attr-defined]
    return found


def last_name(node: ast.AST) -> str:
    """The last word of a name: `n` of "self.args.n", of "config['n']" and of "config.get('n', 4)"."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return node.slice.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
        key = node.args[0]
        return key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else ""
    return ""


def as_function(node: ast.Lambda) -> ast.FunctionDef:
    """The function that a lambda is, the same each time."""
    found = getattr(node, "_function", None)
    if found is None:
        body = ast.copy_location(ast.Return(node.body), node)
        found = ast.copy_location(ast.FunctionDef("lambda", node.args, [body], []), node)
        node._function = found  # type: ignore[attr-defined]
    return found


def declared(node: FunctionNode) -> dict[str, str]:
    """The names that a function declares as "global" or "nonlocal"."""
    found = getattr(node, "_declared", None)
    if found is None:
        found = {
            name: "global" if isinstance(each, ast.Global) else "nonlocal"
            for each in ast.walk(node)
            if isinstance(each, (ast.Global, ast.Nonlocal))
            for name in each.names
        }
        node._declared = found  # type: ignore[union-attr]
    return found


def subject_of_chain(node: ast.If) -> ast.expr | None:
    """What a long chain of `elif` compares with one text or number after another; `None` for any other condition."""
    found: Any = getattr(node, "_subject", False)
    if found is False:
        found, count, at = None, 0, node
        left = dotted(node.test.left) if isinstance(node.test, ast.Compare) else ""
        while left and isinstance(at.test, ast.Compare) and dotted(at.test.left) == left and _is_equality(at.test):
            count += 1
            if len(at.orelse) != 1 or not isinstance(at.orelse[0], ast.If):
                found = node.test.left if count >= CHAIN and isinstance(node.test, ast.Compare) else None
                break
            at = at.orelse[0]
        node._subject = found  # type: ignore[attr-defined]
    return found


def _is_equality(test: ast.Compare) -> bool:
    return len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq) and isinstance(test.comparators[0], ast.Constant)


def text_of(node: ast.AST) -> str:
    """The source of an expression, short enough for a message."""
    found = getattr(node, "_text", None)
    if found is None:
        try:
            found = ast.unparse(node)
        except (ValueError, RecursionError):
            found = "an expression"
        found = found if len(found) <= 60 else found[:57] + "..."
        node._text = found  # type: ignore[attr-defined]
    return found


def is_gradient(node: ast.AST) -> bool:
    """Whether an expression is a gradient: `p.grad`, `p.grad.data`."""
    if isinstance(node, ast.Attribute) and node.attr == "data":
        node = node.value
    return last_name(node) == "grad"


def is_backward_call(node: ast.AST) -> bool:
    """Whether a call adds to the gradients.

    Returns:
        `True` for `x.backward()`, for Lightning's `manual_backward` and for a scaler that does all in one call.
    """
    if not isinstance(node, ast.Call):
        return False
    name = last_name(node.func)
    if name in ("backward", "manual_backward"):
        return "dist_autograd" not in dotted(node.func) and "distributed.autograd" not in dotted(node.func)
    return kind_of_name(name) == "native_scaler" and not name[:1].isupper() and len(node.args) >= 2


def is_step_call(node: ast.AST) -> bool:
    """Whether a call is an optimizer's step, or clears gradients."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    base, attr = node.func.value, node.func.attr
    if attr == "zero_grad" or ("optim" in attr and "step" in attr):
        return True
    if attr != "step":
        return attr.startswith("step_") and kind_of_name(dotted(base)) == "optimizer"  # of a wrapper of an optimizer
    kind = kind_of_name(dotted(base)) or kind_of_name(last_name(base.func) if isinstance(base, ast.Call) else "")
    return kind not in ("scheduler", "ema", "log", "meter")


def steps_inside(body: Sequence[ast.AST]) -> bool:
    """Whether an optimizer's step or the clearing of gradients is inside."""
    return any(is_step_call(node) for statement in body for node in ast.walk(statement))
