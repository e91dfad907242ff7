"""The names that a file uses for what an accumulator is made of, and the line that creates one."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from microbatch.linting.draft import Draft
from microbatch.linting.guesses import CLIP_CALLS, kind_of_name
from microbatch.linting.render import Cannot
from microbatch.linting.scene import Scene
from microbatch.linting.syntax import FunctionNode, dotted, is_backward_call, last_name

__all__ = ["Names", "names_of"]

_WIDTH = 100


@dataclass(frozen=True)
class Names:
    """What the new lines are written with.

    Attributes:
        model: The model.
        accumulator: A free name for the accumulator.
        window: Likewise for a window.
        creation: The lines that create the accumulator.
        needed: The names in that line.
        per_call: Whether the function gets its optimizer from outside, and so may be called many times.
    """

    model: str
    accumulator: str
    window: str
    creation: tuple[str, ...]
    needed: frozenset[str]
    per_call: bool


def names_of(scene: Scene, loop: ast.For) -> Names:
    """Read the names of a loop.

    Args:
        scene: One of its calls of backward.
        loop: The loop.

    Returns:
        The names.

    Raises:
        Cannot: The loop has several optimizers, or something that an accumulator does not do.
    """
    optimizer, scaler = _optimizer(scene), _scaler(loop)
    model = _model(scene, loop, optimizer)
    taken = {node.id for node in ast.walk(scene.module.tree) if isinstance(node, ast.Name)}
    options = [model, optimizer]
    norm = _norm(scene)
    options += [f"max_grad_norm={norm}"] if norm else []
    options += [f"grad_scaler={_under_its_condition(scene, scaler)}"] if scaler else []
    accumulator = "accumulator" if "accumulator" not in taken else "mb_accumulator"
    creation = (f"{accumulator} = mb.Accumulator({', '.join(options)})",)
    if len(creation[0]) > _WIDTH:
        creation = (f"{accumulator} = mb.Accumulator(", *(f"    {each}," for each in options), ")")
    needed = frozenset(re.findall(r"[A-Za-z_][\w.]*", " ".join(options)))
    parameters = scene.scope.args.args if isinstance(scene.scope, FunctionNode) else []
    per_call = optimizer.split(".")[0] in {each.arg for each in parameters} | {"self"}
    window = "window" if "window" not in taken else "mb_window"
    return Names(model, accumulator, window, creation, needed, per_call)


def _optimizer(scene: Scene) -> str:
    """Return the optimizer; the step may be in a function of the file that the loop calls."""
    words = Draft(scene.source)
    found = set[str]()
    for trace in scene.traces:
        for step in trace.steps:
            call = step.node
            if (
                not isinstance(call, ast.Call)
                or not isinstance(call.func, ast.Attribute)
                or last_name(call.func) != "step"
            ):
                raise Cannot("its optimizer steps inside of another call", call)
            if scene.module.path_of(call) is not None:
                raise Cannot("its step is in another file", scene.node)
            found.add(words.text(call.args[0] if call.args else call.func.value))
    if len(found) != 1:
        raise Cannot(
            f"it has {len(found) or 'no'} optimizers: {', '.join(sorted(found)) or 'none was seen'}", scene.node
        )
    return found.pop()


def _scaler(loop: ast.For) -> tuple[str, ast.Call] | None:
    for call in ast.walk(loop):
        if isinstance(call, ast.Call) and last_name(call.func) == "scale" and isinstance(call.func, ast.Attribute):
            parent = dotted(call.func.value)
            if kind_of_name(parent) == "scaler":
                return parent, call
        if isinstance(call, ast.Call) and last_name(call.func) == "scale_loss":
            raise Cannot("apex scales its loss; use torch.amp first", call)
        if (
            isinstance(call, ast.Call)
            and is_backward_call(call)
            and kind_of_name(last_name(call.func)) == "native_scaler"
        ):
            raise Cannot("a scaler of its own does backward and step in one call", call)
    return None


def _under_its_condition(scene: Scene, scaler: tuple[str, ast.Call]) -> str:
    """Return the scaler; where the file uses it under a condition, so that `None` stands for the other case."""
    name, call = scaler
    tests = [each for each in scene.above(call) if isinstance(each, ast.If)]
    if not tests or not tests[0].orelse:
        return name
    test = tests[0].test
    if isinstance(test, ast.Compare) and dotted(test.left) == name:
        return name
    inside = any(each is call for statement in tests[0].body for each in ast.walk(statement))
    text = Draft(scene.source).text(test)
    return f"{name} if {text} else None" if inside else f"None if {text} else {name}"


def _norm(scene: Scene) -> str:
    """Return the norm that gradients are clipped to; empty if they are not."""
    words, found = Draft(scene.source), dict[str, None]()
    for call in scene.calls():
        if not CLIP_CALLS.search(last_name(call.func)) or "value" in last_name(call.func):
            continue
        said = [each.value for each in call.keywords if each.arg in ("max_norm", "max_grad_norm", "clip_grad", "clip")]
        norm = call.args[1] if len(call.args) > 1 else said[0] if said else None
        if norm is None:
            raise Cannot("the norm that it clips to is not in the call", call)
        text = words.text(norm)
        tests = [each.test for each in scene.above(call) if isinstance(each, ast.If) and not scene.moduli(each.test)]
        same = [test for test in tests if text in words.text(test)]
        if same:
            plain = dotted(same[0]) == text
            is_none = isinstance(same[0], ast.Compare) and isinstance(same[0].ops[0], ast.IsNot)
            text = f"{text} or None" if plain else text if is_none else f"{text} if {words.text(same[0])} else None"
        found[text] = None
    if len(found) > 1:
        raise Cannot(f"it clips to several norms: {', '.join(found)}", scene.node)
    return next(iter(found), "")


def _model(scene: Scene, loop: ast.For, optimizer: str) -> str:
    """Return the model: what the optimizer was made of, what is clipped or set to training, or what is called."""
    words, found = Draft(scene.source), list[ast.expr]()
    for node in ast.walk(scene.module.tree):
        if (
            isinstance(node, ast.Assign)
            and dotted(node.targets[0]) == optimizer
            and scene.scope_of(node) is scene.scope
        ):
            found += _with_parameters(node.value)
    for call in scene.calls():
        if CLIP_CALLS.search(last_name(call.func)):
            found += _with_parameters(call)
    for call in scene.calls():
        if (
            isinstance(call.func, ast.Attribute)
            and call.func.attr in ("train", "no_sync")
            and kind_of_name(dotted(call.func.value)) == "model"
        ):
            found.append(call.func.value)
    for call in scene.calls(loop):
        base = call.func.value if isinstance(call.func, ast.Attribute) and call.func.attr != "train" else None
        found += [each for each in (call.func, base) if each is not None and kind_of_name(dotted(each)) == "model"]
    if not found:
        raise Cannot("which model it trains is not in this function", loop)
    return words.text(found[0]).removesuffix(".module")


def _with_parameters(node: ast.expr) -> list[ast.expr]:
    return [
        call.func.value
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("parameters", "named_parameters")
    ]
