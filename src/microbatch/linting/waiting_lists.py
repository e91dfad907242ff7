"""Lists and queues that microbatches wait in, until their window is full and a loop goes through them."""

import ast

from microbatch.linting.definitions import Facts
from microbatch.linting.reach import Reach
from microbatch.linting.syntax import Loop, last_name

__all__ = ["waiting_lists"]

_KEEPS = frozenset({"append", "appendleft"})
# Calls that fetch a microbatch or move it, and compute nothing.
_FETCHES = frozenset(
    {"next", "to", "cuda", "tuple", "list", "dict", "clone", "items", "keys", "values", "get", "append"}
)


def waiting_lists(module: Reach) -> dict[str, set[Loop]]:
    """The last words of such lists, each with the loops that fill it from a loader."""
    return module.once("waiting lists", lambda: _find(module))


def _read(node: Loop) -> set[str]:
    """The last words of what a loop goes through: `for x in waiting`, `while waiting`."""
    return {last_name(each) for each in ast.walk(node.test if isinstance(node, ast.While) else node.iter)} - {""}


def _find(module: Reach) -> dict[str, set[Loop]]:
    kept = {
        last_name(node.func.value): node
        for node in module.nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _KEEPS
    }
    if not kept:
        return {}
    loops = [node for node in module.nodes if isinstance(node, Loop)]
    read = {name for node in loops if module.is_microbatch_loop(node, module.owner_of(node)) for name in _read(node)}
    found = {name: {loop for loop in loops if _fills(module, loop, name)} for name in kept.keys() & read - {""}}
    return {name: filling for name, filling in found.items() if filling}


def _fills(module: Reach, loop: Loop, name: str) -> bool:
    """Whether the turns of a loop add to a list, which another loop, in it or in what it calls, goes through."""
    owner = module.owner_of(loop)
    if module.is_microbatch_loop(loop, owner) or not module.contains_backward(loop, owner):
        return False
    for each in ast.walk(loop):
        is_inner = isinstance(each, Loop) and each is not loop and module.contains_backward(each, owner)
        if is_inner and not (module.is_microbatch_loop(each, owner) and name in _read(each)):  # type: ignore[arg-type]
            return False
    return any(_adds(each, name) for body in (loop, *_called(module, loop, owner)) for each in ast.walk(body))


def _called(module: Reach, loop: Loop, owner: str | None) -> list[ast.AST]:
    """The functions of the file that a loop calls, directly or through others."""
    keys, found = list[str](), dict[str, Facts]()
    for each in ast.walk(loop):
        target = module.resolve(each.func, owner) if isinstance(each, ast.Call) else None
        keys += [] if target is None else [module.key(target)]
    while keys:
        key = keys.pop()
        if key not in found and key in module.facts:
            found[key] = module.facts[key]
            keys += module.facts[key].calls
    return [facts.node for facts in found.values()]


def _adds(node: ast.AST, name: str) -> bool:
    """Whether a call keeps what was fetched in a list: no output and no loss, for these have been computed already."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _KEEPS):
        return False
    calls = (each for arg in node.args for each in ast.walk(arg) if isinstance(each, ast.Call))
    words = (last_name(each) for arg in node.args for each in ast.walk(arg))
    return (
        last_name(node.func.value) == name
        and all(last_name(each.func) in _FETCHES for each in calls)
        and not any("loss" in word or "out" in word or "logit" in word for word in words)
    )
