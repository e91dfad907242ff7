"""What Python's own functions give in the simulation: `len`, `range`, `enumerate`, `sum` and the like."""

import ast
from dataclasses import replace
from typing import Any

from microbatch.linting.guesses import PIECE_WORDS
from microbatch.linting.syntax import dotted, last_name, text_of
from microbatch.linting.values import Data, Function, Num, Obj, Unknown, is_number, number, tags
from microbatch.linting.waiting_lists import waiting_lists

__all__ = ["PYTHON_FUNCTIONS"]


def _len(machine: Any, node: ast.Call) -> Any:
    value = machine.evaluate(node.args[0]) if node.args else None
    if (
        node.args
        and dotted(node.args[0]) in machine.module.window_lists
        and not (
            isinstance(value, (list, tuple))
            and (len(value) > 1 or dotted(node.args[0]) in waiting_lists(machine.module))
        )
    ):
        return machine.window()
    loop = machine.trace.loop
    if (
        node.args
        and isinstance(loop, ast.For)
        and _runs_over_pieces(loop, node.args[0])
        and machine.module.is_inside_loop(loop)
    ):
        return machine.window()
    if (isinstance(value, Obj) and value.kind in ("loader", "enumerate", "zip", "model")) or (
        isinstance(value, Unknown) and not value.data and value.key
    ):
        return Num(machine.run.length, frozenset({"len"}))
    if isinstance(value, (list, tuple)):
        waiting = [v for v in machine.flat(value) if isinstance(v, Data)]  # microbatches, or their losses
        return Num(len(value), frozenset({"n"})) if waiting and len(value) > 1 else len(value)
    return Unknown(text_of(node), data=True)


def _runs_over_pieces(loop: ast.For, node: ast.expr) -> bool:
    """Whether a loop runs over these pieces of a batch, under `enumerate`, `zip` and the like."""
    over = [loop.iter]
    while over:
        part = over.pop()
        if text_of(part) == text_of(node):
            return PIECE_WORDS.search(text_of(part)) is not None
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name):
            over += part.args
    return False


def _range(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    if args and all(is_number(a) for a in args):
        numbers = [int(number(a)) for a in args]
        machine.range_end = args[0] if len(args) == 1 else args[1]
        step = numbers[2] if len(numbers) > 2 else 1
        if step == 0:
            return Unknown(text_of(node))
        return range(numbers[0], numbers[1], step) if len(numbers) > 1 else range(numbers[0])
    if len(args) == 2 and is_number(args[1]) and "n" in tags(args[1]):
        machine.range_end = args[1]
        machine.trace.settings["origin"] = text_of(node.args[0])
        return range(int(number(args[1])))
    made = Unknown(f"range({', '.join(text_of(a) for a in node.args)})", tags=tags(*args) | {"rows"})
    if len(args) > 1:
        machine.range_begins[made.key] = args[0]
    return made


def _enumerate(machine: Any, node: ast.Call) -> Any:
    args, keywords = machine.arguments(node)
    start = args[1] if len(args) > 1 else keywords.get("start", 0)
    over = args[0] if args else Unknown("")
    if isinstance(over, (list, tuple)) and over:
        return [(number(start) + i if is_number(start) else i, item) for i, item in enumerate(over)]
    if isinstance(over, range):
        return [(i, item) for i, item in enumerate(over)][: machine.run.length + 2]
    return Obj("enumerate", "enumerate", {"over": over, "start": start if is_number(start) else 0})


def _zip(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    return Obj("zip", "zip", {"over": args})


def _count(machine: Any, node: ast.Call) -> Any:
    args, keywords = machine.arguments(node)
    start = args[0] if args else keywords.get("start", 0)
    step = args[1] if len(args) > 1 else keywords.get("step", 1)
    if not is_number(start) or not is_number(step) or not number(step):
        return Unknown(text_of(node))
    return range(int(number(start)), int(number(start)) + 10_000 * int(number(step)), int(number(step)))


def _set(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    value = args[0] if args else ()
    if not isinstance(value, (range, list, tuple, frozenset)) or not all(is_number(each) for each in value):
        return Unknown(text_of(node))
    return frozenset(number(each) for each in value)


def _first(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    if not args and last_name(node.func) == "list":
        return []
    return args[0] if args else Unknown(text_of(node))


def _next(machine: Any, node: ast.Call) -> Any:
    machine.arguments(node)
    return Data({}, kind="batch")


def _number_of(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    value = args[0] if args else 0
    if isinstance(value, Data):
        if not value.number and value.kind != "batch":
            machine.trace.mark("sync", node, last_name(node.func))
        return replace(value, number=True)
    if is_number(value) and last_name(node.func) in ("int", "round"):
        rounded = int(number(value))
        return Num(rounded, tags(value)) if tags(value) else rounded
    return value


def _extreme(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    if len(args) > 1 and all(is_number(a) for a in args):
        plain = [number(a) for a in args]
        value = max(plain) if last_name(node.func) == "max" else min(plain)
        origin = tags(args[plain.index(value)])
        return Num(value, origin) if origin else value
    data = [v for v in machine.flat(args) if isinstance(v, Data)]
    return data[0] if data else Unknown(text_of(node), tags=tags(*args))


def _queue(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    return list(args[0]) if args and isinstance(args[0], (list, tuple)) else [] if not args else Unknown(text_of(node))


def _divmod(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    if len(args) != 2:
        return Unknown(text_of(node))
    return tuple(machine.operate(args[0], op, args[1], node=node) for op in (ast.FloorDiv(), ast.Mod()))


def _sum(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    data = [v for v in machine.flat(args) if isinstance(v, Data)]
    if data and all(v.kind == "batch" and not v.weights for v in data):
        return Unknown(text_of(node))  # a count of the whole window
    return machine.combine(data) if data else Unknown(text_of(node))


def _print(machine: Any, node: ast.Call) -> Any:
    return machine.log_call(node, "print")


def _truth(machine: Any, node: ast.Call) -> Any:
    args, _ = machine.arguments(node)
    known = machine.known_truth(args[0]) if args else False
    return Unknown(text_of(node), data=isinstance(args[0], Data)) if known is None else known


def _test(machine: Any, node: ast.Call) -> Any:
    machine.arguments(node)
    return Unknown(text_of(node))


def _getattr(machine: Any, node: ast.Call) -> Any:
    if len(node.args) >= 2 and isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, str):
        attribute = ast.copy_location(ast.Attribute(node.args[0], node.args[1].value, ast.Load()), node)
        return machine.evaluate(attribute)
    return machine.unknown_call(node, "getattr")


def _partial(machine: Any, node: ast.Call) -> Any:
    args, keywords = machine.arguments(node)
    first = args[0] if args else Unknown(text_of(node))
    if isinstance(first, Obj) and first.kind == "criterion" and isinstance(keywords.get("reduction"), str):
        return Obj("criterion", first.name, {**first.info, "reduction": keywords["reduction"]})
    known = isinstance(first, Obj) or (isinstance(first, Function) and len(args) == 1)
    return first if known else Unknown(text_of(node))


PYTHON_FUNCTIONS: dict[str, Any] = {
    "len": _len,
    "partial": _partial,
    "next": _next,
    "sum": _sum,
    "divmod": _divmod,
    "print": _print,
    "bool": _truth,
    "getattr": _getattr,
    "enumerate": _enumerate,
    "zip": _zip,
    "count": _count,
    "deque": _queue,
    **dict.fromkeys(("set", "frozenset"), _set),
    **dict.fromkeys(("range", "trange"), _range),
    **dict.fromkeys(("tqdm", "iter", "list", "tuple", "reversed", "islice", "cycle"), _first),
    **dict.fromkeys(("int", "float", "round"), _number_of),
    **dict.fromkeys(("max", "min"), _extreme),
    **dict.fromkeys(("isinstance", "hasattr", "callable"), _test),
}
