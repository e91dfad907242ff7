"""What clears gradients without an optimizer's `zero_grad`: a helper by its name, `p.grad = None`, `p.grad.zero_()`."""

import ast
import re

from microbatch.linting.definitions import Definitions
from microbatch.linting.syntax import is_gradient, last_name, text_of

__all__ = ["clears", "clears_by_name", "places_of_clearing"]

_NAMES = re.compile(
    r"(zero|clear|reset|clean|wipe|drop|free|delete|remove|flush|empty|null\w*|init)_?(all_?|out_?|the_?|param\w*_?|model_?)*grad|"
    r"grad\w*_(to_)?(none|zeros?|reset)|set_to_none|zerograd",
    re.IGNORECASE,
)
_FILLS = frozenset({"zero_", "fill_", "copy_", "_foreach_zero_", "zero_all"})


def clears_by_name(name: str) -> bool:
    """Whether a function clears gradients, by what it is called."""
    return _NAMES.search(name) is not None


def clears(node: ast.AST) -> bool:
    """Whether a piece of source clears gradients, of some weights at least."""
    if isinstance(node, ast.Call):
        name = last_name(node.func)
        if clears_by_name(name) or any(keyword.arg in ("zero_grad", "set_to_none") for keyword in node.keywords):
            return True
        return name in _FILLS and "grad" in text_of(node)
    if isinstance(node, ast.Attribute) and clears_by_name(node.attr):
        return True  # handed on, to be called later
    return isinstance(node, ast.Attribute) and is_gradient(node) and isinstance(node.ctx, (ast.Store, ast.Del))


def places_of_clearing(module: Definitions) -> set[ast.AST]:
    """The statements of a file that clear gradients, whether or not a run comes to them."""
    return module.once("clearing", lambda: _find(module))


def _find(module: Definitions) -> set[ast.AST]:
    found = {module.statement_of(node) for node in module.nodes if clears(node)}
    return {statement for statement in found if statement is not None}
