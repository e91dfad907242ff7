"""A sketch of a file's accumulation loops with `mb.Accumulator`, as a diff to read. Not all loops can be turned."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from microbatch.linting.draft import edits_between
from microbatch.linting.edits import file_diff
from microbatch.linting.module import Module
from microbatch.linting.own_window import turn
from microbatch.linting.render import Cannot, Renderer
from microbatch.linting.scene import Scene
from microbatch.linting.sources import Source
from microbatch.linting.syntax import Loop, is_backward_call
from microbatch.linting.verdicts import Reading, read
from microbatch.pages import page

__all__ = ["Sketch", "rewrite", "sketch"]

_OWNERS = {  # framework: why its loop is not turned, and the page that shows what to write
    "accumulate": ("Accelerate's `accumulate()` owns its windows: use `accumulator_for`", "accelerate"),
    "deepspeed": ("DeepSpeed's engine owns its windows", "deepspeed"),
    "lightning": ("Lightning owns the loop: `Trainer(callbacks=[Microbatch()])`", "lightning"),
    "fabric": ("Fabric owns backward and the precision of this loop", "lightning"),
}


@dataclass(frozen=True)
class Sketch:
    """What became of the loops of a file.

    Attributes:
        diff: A unified diff; empty where no loop was turned.
        reasons: Why loops were not turned, one sentence for each, with its line.
    """

    diff: str
    reasons: tuple[str, ...] = ()


def rewrite(source: Source) -> str:
    """Return the diff of a sketch: the loops of a file with `mb.Accumulator`.

    Args:
        source: A source that parses.

    Returns:
        A unified diff, to be read and adapted; empty where no loop can be turned.
    """
    return sketch(source).diff


def sketch(source: Source) -> Sketch:
    """Turn the loops of a file into loops with `mb.Accumulator`.

    Args:
        source: A source that parses.

    Returns:
        The diff, and why loops were left as they are.
    """
    tree = source.tree
    if not isinstance(tree, ast.Module):
        return Sketch("")
    module = Module(tree)
    reading = read(module)
    text, reasons = source.text, list[str]()
    renderer, turned = Renderer(source), set[ast.stmt]()
    for node in _backwards(reading):
        scene = Scene(node, source=source, module=module, reading=reading)
        attempt = _copy(renderer)
        try:
            loop = _loop_of(scene)
            if loop in turned:
                continue
            turn(scene, loop, attempt)
            _import(tree, attempt)
            text = attempt.file(tree)
            ast.parse(text)
        except Cannot as reason:
            line = getattr(reason.node or node, "lineno", 1)
            reasons.append(f"line {line}: {reason}")
            continue
        except SyntaxError:
            reasons.append(f"line {node.lineno}: its lines are put together in a way that the sketch cannot follow")
            continue
        renderer = attempt
        turned.add(loop)
    text = renderer.file(tree) if turned else source.text
    return Sketch(file_diff(source, edits_between(source.text, text)), tuple(dict.fromkeys(reasons)))


def _backwards(reading: Reading) -> list[ast.Call]:
    """Return the calls of backward in loops that accumulate, in the order of their lines."""
    found = {
        backward.node
        for root in reading.roots
        for outcome in root.outcomes
        if outcome.used_window or any(len(step.since) > 1 for step in outcome.trace.steps)
        for backward in outcome.trace.backwards
    }
    return sorted((node for node in found if isinstance(node, ast.Call)), key=lambda node: node.lineno)


def _loop_of(scene: Scene) -> ast.For:
    """Return the loop over microbatches that holds a backward, if it is one that can be turned."""
    if scene.module.path_of(scene.node) is not None:
        raise Cannot("its backward is in another file", scene.module.tree)
    frameworks = {each for trace in scene.traces for each in trace.frameworks}
    for name, (reason, found_in) in _OWNERS.items():
        if name in frameworks:
            raise Cannot(f"{reason}: see {page(found_in)}")
    loops = [each for each in scene.above(scene.node) if isinstance(each, Loop)]
    owner = scene.module.owner_of(scene.node)
    loop = next((each for each in loops if scene.module.is_microbatch_loop(each, owner)), None)
    if loop is None:
        raise Cannot("its backward is in a function that is called once for each microbatch; move it into the loop")
    if not isinstance(loop, ast.For) or loop.orelse:
        raise Cannot("it is no plain `for` loop; let a generator hand out the microbatches, and loop over it", loop)
    inside = [node for node in ast.walk(loop) if isinstance(node, ast.Call) and is_backward_call(node)]
    if any(scene.scope_of(node) is not scene.scope for node in inside):
        raise Cannot("a function inside of the loop runs a backward", loop)
    return loop


def _copy(renderer: Renderer) -> Renderer:
    return Renderer(
        renderer.source,
        dropped=set(renderer.dropped),
        elsewhere=set(renderer.elsewhere),
        opened=set(renderer.opened),
        swaps=dict(renderer.swaps),
        before={statement: list(lines) for statement, lines in renderer.before.items()},
        after={statement: list(lines) for statement, lines in renderer.after.items()},
        custom=dict(renderer.custom),
    )


def _import(tree: ast.Module, renderer: Renderer) -> None:
    """Import the library behind the last import at the top of the file."""
    lines = ["import microbatch as mb"]
    if any(isinstance(each, ast.Import) and any(name.asname == "mb" for name in each.names) for each in tree.body):
        return
    imports = [each for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom)]
    first = next((each for each in tree.body if not _is_text(each)), None)
    if imports:
        renderer.after[imports[-1]] = lines
    elif first is not None and lines[0] not in renderer.before.get(first, []):
        renderer.before[first] = [*lines, "", *renderer.before.get(first, [])]


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
