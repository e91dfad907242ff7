"""What a file defines: its functions, classes and methods, and where each node stands."""

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from microbatch.linting.guesses import kind_of_name
from microbatch.linting.syntax import FunctionNode, Loop, dotted, last_name
from microbatch.linting.values import Function

__all__ = ["Definitions", "Facts"]

# Methods that too many objects have to tell by the name alone where a call goes.
_GENERIC = frozenset(
    [
        "backward",
        "step",
        "zero_grad",
        "forward",
        "eval",
        "update",
        "state_dict",
        "load_state_dict",
        "to",
        "parameters",
        "item",
        "append",
        "add",
        "log",
        "write",
        "get",
        "items",
        "keys",
        "values",
        "cuda",
        "cpu",
        "detach",
        "mean",
        "sum",
        "close",
        "save",
        "load",
        "format",
        "join",
        "reset",
        "size",
        "view",
        "__init__",
        "prepare",
        "no_sync",
        "scale",
        "unscale_",
        "clip_grad_norm_",
        "next",
    ]
)


@dataclass
class Facts:
    """What one function (or the top level) does.

    Attributes:
        node: The function, or the module.
        owner: The class that holds it.
        backward: Whether it runs a backward, itself or in what it calls.
        flat: Whether it runs one outside of its loops.
        steps: Whether it takes a step or clears gradients, itself or in what it calls.
        sites: The backwards that stand in it.
        calls: The functions of the file that it calls.
        flat_calls: Those that it calls outside of its loops.
    """

    node: ast.AST
    owner: str | None
    backward: bool = False
    flat: bool = False
    steps: bool = False
    sites: set[ast.AST] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)
    flat_calls: set[str] = field(default_factory=set)


class Definitions:
    """What one parsed file defines.

    Args:
        tree: Its syntax tree.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.functions: dict[str, Function] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        self.methods: dict[str, dict[str, Function]] = {}
        self.by_method: dict[str, list[Function]] = {}
        self.parents: dict[ast.AST, ast.AST] = {}
        self.facts: dict[str, Facts] = {"": Facts(tree, None)}
        self.paths: dict[ast.AST, str] = {}
        self._resolved: dict[tuple[ast.AST, str | None], Function | None] = {}
        self._found: dict[str, Any] = {}
        self._owners: dict[ast.AST, str | None] = {}
        self._collect(tree, None, None)

    def add(self, node: FunctionNode | ast.ClassDef, path: str) -> None:
        """Add a function or class of another file. What this file defines itself stays."""
        if node.name in self.functions or node.name in self.classes:
            return
        self.paths[node] = path
        self._collect(ast.Module([node], []), None, None)
        self.parents[node] = self.tree
        self._resolved.clear()

    def path_of(self, node: ast.AST) -> str | None:
        """The file of a node that was added from another one; `None` for this file's own."""
        while node is not self.tree:
            if node in self.paths:
                return self.paths[node]
            if node not in self.parents:
                return None
            node = self.parents[node]
        return None

    def _collect(self, node: ast.AST, owner: str | None, scope: FunctionNode | None) -> None:
        stack: list[tuple[ast.AST, str | None, FunctionNode | None]] = [(node, owner, scope)]
        while stack:
            node, owner, scope = stack.pop()
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
                if isinstance(child, ast.ClassDef):
                    self.classes.setdefault(child.name, child)
                    self.methods.setdefault(child.name, {})
                    stack.append((child, child.name, None))
                elif isinstance(child, FunctionNode):
                    function = Function(child.name, child, owner if scope is None else None, scope)
                    if owner is not None and scope is None:
                        self.methods[owner][child.name] = function
                        self.by_method.setdefault(child.name, []).append(function)
                    else:
                        self.functions.setdefault(child.name, function)
                    self.facts[self.key(function)] = Facts(child, function.owner)
                    stack.append((child, owner, child))
                else:
                    stack.append((child, owner, scope))

    @staticmethod
    def key(function: Function) -> str:
        """The name of a function in this module's tables."""
        return f"{function.owner}.{function.name}" if function.owner else function.name

    @staticmethod
    def _is_abstract(function: Function) -> bool:
        """Whether a function only says that a subclass has to write it."""
        body = [s for s in function.node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        return not body or (len(body) == 1 and isinstance(body[0], (ast.Raise, ast.Pass)))

    def find_method(self, owner: str | None, name: str) -> Function | None:
        """A method of a class of the file or of its base classes there."""
        seen: set[str] = set()
        waiting = [owner] if owner else []
        while waiting:
            current = waiting.pop(0)
            if current in seen or current not in self.classes:
                continue
            seen.add(current)
            if name in self.methods[current]:
                return self.methods[current][name]
            waiting += [last_name(base) for base in self.classes[current].bases]
        return None

    def resolve(self, func: ast.AST, owner: str | None) -> Function | None:
        """The function of the file that a call goes to, as far as names tell."""
        key = (func, owner)
        if key not in self._resolved:
            found = self._resolve(func, owner)
            self._resolved[key] = None if found is None or self._is_abstract(found) else found
        return self._resolved[key]

    def _resolve(self, func: ast.AST, owner: str | None) -> Function | None:
        if isinstance(func, ast.Name):
            return self.functions.get(func.id)
        if not isinstance(func, ast.Attribute):
            return None
        if isinstance(func.value, ast.Name) and func.value.id in ("self", "cls"):
            return self.find_method(owner, func.attr)
        if isinstance(func.value, ast.Call) and last_name(func.value.func) == "super":
            bases = [last_name(base) for base in self.classes[owner].bases] if owner in self.classes else []
            return next((found for base in bases if (found := self.find_method(base, func.attr))), None)
        if func.attr in _GENERIC or kind_of_name(dotted(func.value)) in (
            "optimizer",
            "scheduler",
            "accelerator",
            "model",
        ):
            return None
        candidates = [each for each in self.by_method.get(func.attr, []) if not self._is_abstract(each)]
        return candidates[0] if len(candidates) == 1 and self._is_given_enough(candidates[0], func) else None

    def _is_given_enough(self, method: Function, func: ast.AST) -> bool:
        """Whether a call gives a method what it must be given: `model.train()` is no call of `train(self, args)`."""
        call = self.parents.get(func)
        if not isinstance(call, ast.Call) or call.func is not func:
            return True
        if any(isinstance(arg, ast.Starred) for arg in call.args) or any(k.arg is None for k in call.keywords):
            return True
        given, args = len(call.args) + len(call.keywords), method.node.args
        of_class = any(last_name(each) == "staticmethod" for each in method.node.decorator_list)
        return given >= len(args.posonlyargs) + len(args.args) - (0 if of_class else 1) - len(args.defaults)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the file."""
        return list(ast.walk(self.tree))

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What is found in the file itself, the same for all runs: it is looked for once."""
        if name not in self._found:
            self._found[name] = find()
        return self._found[name]

    def above(self, node: ast.AST) -> list[ast.AST]:
        """The nodes around one, inside its function."""
        found: list[ast.AST] = []
        while (node := self.parents.get(node, self.tree)) is not self.tree and not isinstance(
            node, FunctionNode | ast.ClassDef
        ):
            found.append(node)
        return found

    def loops_above(self, node: ast.AST) -> list[Loop]:
        """The loops around a node, inside its function; the innermost comes first."""
        return [parent for parent in self.above(node) if isinstance(parent, Loop)]

    def around(self, node: ast.AST) -> list[ast.AST]:
        """All nodes around one, functions and classes included."""
        found: list[ast.AST] = []
        while node in self.parents:
            node = self.parents[node]
            found.append(node)
        return found

    def owner_of(self, node: ast.AST) -> str | None:
        """The class that holds a node."""
        known, passed = self._owners, [node]
        found = None
        while (node := self.parents.get(node, self.tree)) is not self.tree:
            if isinstance(node, ast.ClassDef):
                found = node.name
                break
            if node in known:
                found = known[node]
                break
            passed.append(node)
        known.update((each, found) for each in passed if isinstance(each, ast.stmt))
        return found

    def statement_of(self, node: ast.AST) -> ast.stmt | None:
        """The statement that holds an expression, or the statement itself."""
        while not isinstance(node, ast.stmt):
            if node not in self.parents:
                return None
            node = self.parents[node]
        return node

    def stored_in(self, node: ast.AST) -> set[str]:
        """The names that a statement assigns, itself or inside."""
        stores = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        return self.once(f"stored in {id(node)}", lambda: {n.id for n in stores})

    def is_inside_loop(self, node: ast.AST) -> bool:
        """Whether a node stands inside of a loop of its function."""
        return bool(self.loops_above(node))

    def function_of(self, node: ast.AST) -> str:
        """The name of the function that holds a node; empty at the top level."""
        while (node := self.parents.get(node, self.tree)) is not self.tree:
            if isinstance(node, FunctionNode):
                return node.name
        return ""

    @cached_property
    def names_text(self) -> str:
        """All names of the file, for a search by words."""
        return " ".join(
            {n.id for n in self.nodes if isinstance(n, ast.Name)}
            | {n.attr for n in self.nodes if isinstance(n, ast.Attribute)}
        )

    @cached_property
    def wraps_ddp(self) -> bool:
        """Whether the file wraps a model in DistributedDataParallel."""
        return any(
            isinstance(n, ast.Call) and last_name(n.func) in ("DistributedDataParallel", "DDP") for n in self.nodes
        )
