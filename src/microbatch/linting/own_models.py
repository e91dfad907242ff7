"""The models that a file defines: which of their methods compute a loss, and which attributes are layers."""

import ast

from microbatch.linting.definitions import Definitions
from microbatch.linting.guesses import COUPLED_LOSSES, MEAN_LOSSES, kind_of_name
from microbatch.linting.syntax import FunctionNode, dotted, last_name
from microbatch.linting.values import Function

__all__ = ["layers", "losses_of_models", "takes"]


def losses_of_models(module: Definitions) -> dict[tuple[str, str], Function]:
    """The methods of models of the file that compute a loss, by class and name."""
    return module.once("losses of models", lambda: _find_losses(module))


def _find_losses(module: Definitions) -> dict[tuple[str, str], Function]:
    found: dict[tuple[str, str], Function] = {}
    for cls, methods in module.methods.items():
        if module.find_method(cls, "forward") is None or "loss" in cls.lower() or "criterion" in cls.lower():
            continue
        for name, function in methods.items():
            calls = [last_name(n.func) for n in ast.walk(function.node) if isinstance(n, ast.Call)]
            if any(MEAN_LOSSES.search(c) or COUPLED_LOSSES.search(c) or kind_of_name(c) == "criterion" for c in calls):
                found[cls, name] = function
    return found


def layers(module: Definitions, cls: str) -> set[str]:
    """The attributes of a model that its `__init__` sets to what a call made."""
    return module.once(f"layers of {cls}", lambda: _find_layers(module, cls))


def _find_layers(module: Definitions, cls: str) -> set[str]:
    init = module.find_method(cls, "__init__")
    if init is None or module.find_method(cls, "forward") is None:
        return set()
    return {
        dotted(target)
        for node in ast.walk(init.node)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
    }


def takes(node: FunctionNode, count: int) -> bool:
    """Whether a method can be called with so many arguments."""
    names = len(node.args.posonlyargs) + len(node.args.args) - 1
    least = names - len(node.args.defaults)
    return count >= least and (count <= names + len(node.args.kwonlyargs) or node.args.vararg is not None)
