"""What clears gradients without an optimizer's `zero_grad`: a helper by its name, `p.grad = None`, `p.grad.zero_()`."""

import ast
import re

from microbatch.linting.definitions import Definitions
from microbatch.linting.guesses import kind_of_name
from microbatch.linting.syntax import dotted, is_gradient, last_name, text_of

__all__ = ["averages_weights", "calls_that_may_clear", "clears", "clears_all", "clears_by_name", "places_of_clearing"]

_NAMES = re.compile(
    r"(zero|clear|reset|clean|wipe|drop|free|delete|remove|flush|empty|null\w*|init)_?(all_?|out_?|the_?|param\w*_?|model_?)*grad|"
    r"grad\w*_(to_)?(none|zeros?|reset)|set_to_none|zerograd",
    re.IGNORECASE,
)
# Base classes whose own methods clear nothing, and words of functions that do not either.
_KNOWN_BASES = frozenset({"object", "Module", "LightningModule", "ABC", "Protocol", "Generic", "Callback", "Enum"})
_HARMLESS = re.compile(
    r"lr|learning_rate|sched|warm|adjust|decay|save|load|checkpoint|state|resume|log|print|eval|valid|test|metric|"
    r"forward|loss|manual_backward|clip|device|prepare|amp|master_params|scale|setup|init",
    re.IGNORECASE,
)
_AVERAGED = re.compile(r"(\b|_)(ema|shadow|teacher|averaged?)(\b|_)", re.IGNORECASE)
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


def clears_all(node: ast.For | ast.AsyncFor) -> bool:
    """Whether a loop clears the gradient of every parameter: `for p in model.parameters(): p.grad = None`."""
    if last_name(node.iter.func if isinstance(node.iter, ast.Call) else node.iter) != "parameters":
        return False
    body = node.body
    if len(body) == 1 and isinstance(body[0], ast.If) and is_gradient_there(body[0].test) and not body[0].orelse:
        body = body[0].body
    if len(body) != 1:
        return False
    only = body[0]
    if isinstance(only, ast.Assign):
        return is_gradient(only.targets[0]) and isinstance(only.value, ast.Constant) and only.value.value is None
    return isinstance(only, ast.Expr) and isinstance(only.value, ast.Call) and clears(only.value)


def is_gradient_there(test: ast.expr) -> bool:
    """Whether a condition asks if there is a gradient: `p.grad is not None`."""
    return isinstance(test, ast.Compare) and is_gradient(test.left) and isinstance(test.ops[0], ast.IsNot)


def averages_weights(node: ast.For | ast.AsyncFor) -> bool:
    """Whether a loop updates a moving average of the weights: `for e, p in zip(ema.parameters(), ...): e.mul_(d)`."""
    text = text_of(node.iter)
    if "zip(" not in text or not _AVERAGED.search(text):
        return False
    return any(
        isinstance(each, ast.Call) and last_name(each.func) in ("mul_", "lerp_", "copy_") for each in ast.walk(node)
    )


def places_of_clearing(module: Definitions) -> set[ast.AST]:
    """Find the statements of a file that clear gradients, whether or not a run comes to them."""
    return module.once("clearing", lambda: _find(module))


def _find(module: Definitions) -> set[ast.AST]:
    found = {module.statement_of(node) for node in module.nodes if clears(node)}
    return {statement for statement in found if statement is not None}


def calls_that_may_clear(module: Definitions) -> list[ast.Call]:
    """Find the calls whose code the file does not show, and which may clear gradients.

    Args:
        module: The file.

    Returns:
        Calls of methods of a base class in another file, and of functions that get the optimizer.
    """
    return module.once("may clear", lambda: [node for node in module.nodes if _may_clear(module, node)])


def _may_clear(module: Definitions, node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or _HARMLESS.search(last_name(node.func)) or last_name(node.func) == "":
        return False
    owner = module.owner_of(node)
    if module.resolve(node.func, owner) is not None or not (module.function_of(node) or module.is_inside_loop(node)):
        return False
    if isinstance(node.func, ast.Attribute):
        cls = module.classes.get(owner or "")
        bases = {last_name(base) for base in cls.bases} if cls is not None else set[str]()
        foreign = bool(bases - _KNOWN_BASES - set(module.classes))
        return foreign and dotted(node.func.value) in ("self", "super()") and not node.args and not node.keywords
    gets = any(kind_of_name(dotted(arg)) == "optimizer" for arg in node.args if dotted(arg))
    return (
        gets and not last_name(node.func)[:1].isupper() and last_name(node.func) not in ("isinstance", "len", "getattr")
    )
