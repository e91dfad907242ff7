"""What a file does with N or with gradients beside its loop, so that a fault of the weights is not certain."""

import ast
import re

from microbatch.linting.module import Module
from microbatch.linting.syntax import dotted, is_gradient, last_name, text_of

__all__ = ["doubt_of_gradients", "doubt_of_weights"]

_DIVIDES = frozenset({"div", "div_", "true_divide", "true_divide_", "divide", "divide_"})
_SIZES = re.compile(r"len|size|rows|samples|batch|steps|iters|num_|epoch|tokens|length|duration|time", re.IGNORECASE)
# What only measures a gradient.
_MEASURES = frozenset({"norm", "abs", "mean", "std", "max", "min", "pow", "square", "item", "shape", "numel", "isnan"})


def doubt_of_weights(module: Module) -> str | None:
    """Find a division by N that no run saw divide a loss or gradients: a learning rate, a hook, another class.

    Args:
        module: The file, after its runs.

    Returns:
        What decides; `None` if there is no such division.
    """
    for node in module.once("divisions by N", lambda: _divisions(module)):
        if node not in module.understood:
            return f"what line {node.lineno} divides by N"
    return doubt_of_gradients(module)


def _divisions(module: Module) -> list[ast.expr | ast.stmt]:
    found: list[ast.expr | ast.stmt] = []
    for node in module.nodes:
        left, right = None, None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            left, right = node.left, node.right
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Div):
            left, right = node.target, node.value
        elif isinstance(node, ast.Call) and last_name(node.func) in _DIVIDES and node.args:
            left, right = node.func, node.args[-1]
        if left is None or right is None or not _is_window(module, right):
            continue
        text = text_of(left)
        if "loss" in text or "grad" in text or not _SIZES.search(text):
            found.append(node)  # type: ignore[arg-type]
    return found


def _is_window(module: Module, node: ast.AST) -> bool:
    """Whether an expression is N, or `float(n)`."""
    while isinstance(node, ast.Call) and len(node.args) == 1 and last_name(node.func) in ("float", "int", "max"):
        node = node.args[0]
    return bool(dotted(node)) and module.is_window(node)


def doubt_of_gradients(module: Module) -> str | None:
    """Find where a file keeps gradients in a place of its own, or puts other ones in their place.

    Args:
        module: The file.

    Returns:
        What decides; `None` if gradients are nowhere kept.
    """
    node = module.once("kept gradients", lambda: next((n for n in module.nodes if _keeps(module, n)), None))
    return None if node is None else f"what line {node.lineno} does with the gradients"


def _keeps(module: Module, node: ast.AST) -> bool:
    """Whether a gradient is read here as a value: not to scale, to clear or to measure it."""
    if not isinstance(node, ast.Attribute) or not is_gradient(node) or node.attr == "data":
        return False
    inside: ast.AST = node
    parent = module.parents.get(inside)
    if isinstance(node.ctx, ast.Store):
        statement = module.statement_of(node)
        value = statement.value if isinstance(statement, ast.Assign) else None
        if value is None or isinstance(value, ast.Constant):
            return False
        return not any(is_gradient(each) for each in ast.walk(value)) and "zeros" not in text_of(value)
    while isinstance(parent, (ast.Attribute, ast.Call)) and not (
        isinstance(parent, ast.Call) and inside in parent.args
    ):
        if isinstance(parent, ast.Attribute) and (parent.attr in _MEASURES or parent.attr.endswith("_")):
            return False
        inside, parent = parent, module.parents.get(parent)
    if isinstance(parent, ast.BinOp):
        while isinstance(parent, ast.BinOp):
            inside, parent = parent, module.parents.get(parent)
    if isinstance(parent, ast.Assign):
        return parent.value is inside and not any(is_gradient(target) for target in parent.targets)
    if isinstance(parent, ast.AugAssign):
        return parent.value is inside and not is_gradient(parent.target)
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Attribute):
        return parent.func.attr in ("add_", "append", "copy_", "extend") and not _is_weight(parent.func.value)
    return False


def _is_weight(node: ast.AST) -> bool:
    """Whether a tensor is a weight: `p.data`, `p`."""
    return last_name(node) in ("data", "p", "param", "parameter", "weight")
