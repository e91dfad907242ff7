"""Which statements of a file decide its gradients, so that a run passes over all others."""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass

from microbatch.linting.clearing import averages_weights, clears_all, clears_by_name
from microbatch.linting.guesses import kind_of_name
from microbatch.linting.module import Module
from microbatch.linting.own_models import losses_of_models
from microbatch.linting.syntax import FunctionNode, Loop, dotted, last_name

__all__ = ["Slice", "cut"]

_COMPOUND = (
    ast.Match,
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    *FunctionNode.__args__,
    ast.ClassDef,
)
_NOTHING = (ast.Pass, ast.Import, ast.ImportFrom, ast.Global, *FunctionNode.__args__, ast.ClassDef)
_JUMPS = (ast.Return, ast.Break, ast.Continue, ast.Raise)
# Words that too many statements have for a name to tell which of them belong together.
_COMMON = frozenset(
    {
        "args",
        "config",
        "cfg",
        "self",
        "device",
        "torch",
        "nn",
        "parameters",
        "epoch",
        "step",
        "backward",
        "batch",
        "data",
        "grad",
        "lr",
    }
)
# Methods that change the object that they belong to.
_MUTATES = frozenset({"append", "extend", "clear", "pop", "popleft", "update", "setdefault", "div_", "mul_"})

# Names whose use changes how gradients are handled.
_SWITCHES = frozenset(
    {
        "unscale_",
        "require_backward_grad_sync",
        "grad",
        "update_parameters",
        "Accelerator",
        "prepare",
        "empty_cache",
    }
)


_GRADIENTS = re.compile(r"(^|_)(grads?|gradients?)$")


@dataclass
class Slice:
    """What matters in a file: the statements to run, and those whose branches are worth trying both ways."""

    statements: set[ast.stmt]
    deciding: set[ast.stmt]


def cut(module: Module) -> Slice:
    """The statements that touch gradients, that make a value which these use, and all that lead there.

    Names are compared by their last word alone: too many statements are kept rather than too few.

    Args:
        module: The file.

    Returns:
        The statements to run, and those that decide.
    """
    kept, core = _statements(module)
    names: set[str] = set()
    around = _around(module, core)
    for statement in core:
        names |= _names(ast.walk(statement))
    for node in around:
        names |= _head(node)
    # Which object a name holds hardly ever decides anything; whether there is a scaler does.
    names = {
        name for name in names if kind_of_name(name) in (None, "scaler", "criterion", "ema") and name not in _COMMON
    }
    deciding = set(core)
    for statement in kept - core:
        if not isinstance(statement, _COMPOUND) and _made(ast.walk(statement)) & names:
            deciding.add(statement)
    deciding |= _around(module, deciding)
    return Slice(kept, deciding)


def _around(module: Module, statements: set[ast.stmt]) -> set[ast.stmt]:
    """The statements around others, inside their functions."""
    found: set[ast.stmt] = set()
    for statement in statements:
        node: ast.AST = statement
        while (node := module.parents.get(node, module.tree)) is not module.tree:
            if isinstance(node, (FunctionNode, ast.ClassDef)) or node in found:
                break
            if isinstance(node, ast.stmt):
                found.add(node)
    return found


def _statements(module: Module) -> tuple[set[ast.stmt], set[ast.stmt]]:
    """The statements to run, and among them the simple ones that touch gradients."""
    kept = _Kept(module)
    core: set[ast.stmt] = set()
    others: list[_Simple] = []
    for statement in module.nodes:
        if not isinstance(statement, ast.stmt) or isinstance(statement, _NOTHING):
            continue
        if isinstance(statement, _COMPOUND):
            if module.touches_gradients_here(statement) or _is_own_work(statement):
                kept.add(statement)
            continue
        owner, parts = module.owner_of(statement), list(ast.walk(statement))
        if any(isinstance(part, ast.Yield | ast.YieldFrom) for part in parts):
            kept.add(statement)
            kept.wanted.update(_names(parts))
        if module.touches_gradients(statement, owner) or _switches(parts):
            kept.add(statement)
            core.add(statement)
            kept.wanted.update(_names(parts))
        else:
            made = _made(parts)
            if isinstance(statement, ast.Return):
                # What a function returns is wanted where the function is called, or an object of its class is.
                made = {module.function_of(statement), owner or ""} - {"", "__init__"}
            if isinstance(statement, ast.Return) and _computes_loss(module, statement):
                kept.add(statement)
                kept.wanted.update(_names(parts))
                continue
            others.append(_Simple(statement, made, _names(parts), _called(module, owner, parts)))
    kept.add_what_leads_there(others)
    return kept.statements, core


def _computes_loss(module: Module, statement: ast.Return) -> bool:
    """Whether a statement returns the loss that a model of the file computes."""
    losses = losses_of_models(module)
    return (module.owner_of(statement) or "", module.function_of(statement)) in losses


@dataclass(slots=True)
class _Simple:
    """A statement without a body: the names that it makes, those that it reads, and the functions that it calls."""

    statement: ast.stmt
    made: set[str]
    read: set[str]
    called: set[ast.AST]


class _Kept:
    """The statements to run, and the names that they read."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.statements: set[ast.stmt] = set()
        self.wanted: set[str] = set()

    def add(self, statement: ast.stmt) -> None:
        """Keep a statement, and all statements around it."""
        node: ast.AST = statement
        while node is not self.module.tree:
            if isinstance(node, ast.stmt):
                if node in self.statements:
                    break
                self.statements.add(node)
                self.wanted.update(_head(node))
            node = self.module.parents[node]

    def add_what_leads_there(self, others: list[_Simple]) -> None:
        """Keep what makes a value that is read, calls a function that is kept, or jumps out of a loop that is kept."""
        changed = True
        while changed:
            changed = False
            rest: list[_Simple] = []
            for simple in others:
                if self._leads_there(simple):
                    self.add(simple.statement)
                    self.wanted.update(simple.read)
                    changed = True
                else:
                    rest.append(simple)
            others = rest

    def _leads_there(self, simple: _Simple) -> bool:
        if simple.made & self.wanted or not simple.called.isdisjoint(self.statements):
            return True
        return isinstance(simple.statement, _JUMPS) and _frame(self.module, simple.statement) in self.statements


def _called(module: Module, owner: str | None, parts: list[ast.AST]) -> set[ast.AST]:
    """The functions of the file that the parts of a statement call."""
    found = {module.resolve(node.func, owner) for node in parts if isinstance(node, ast.Call)}
    return {function.node for function in found if function is not None}


def _is_own_work(statement: ast.stmt) -> bool:
    """Whether a loop clears all gradients or averages weights, which is read as a whole."""
    return isinstance(statement, ast.For) and (clears_all(statement) or averages_weights(statement))


def _frame(module: Module, node: ast.AST) -> ast.AST | None:
    """The loop, or else the function, that a jump leaves."""
    while node in module.parents:
        node = module.parents[node]
        if isinstance(node, (Loop, FunctionNode)):
            return node
    return None


def _head(node: ast.stmt) -> set[str]:
    """The names that a compound statement itself reads."""
    parts: list[ast.AST] = []
    if isinstance(node, (ast.If, ast.While)):
        parts = [node.test]
    elif isinstance(node, ast.Match):
        parts = [node.subject]
    elif isinstance(node, (ast.For, ast.AsyncFor)):
        parts = [node.iter]
    elif isinstance(node, (ast.With, ast.AsyncWith)):
        parts = [item.context_expr for item in node.items]
    return {name for part in parts for name in _names(ast.walk(part))}


def _names(parts: Iterable[ast.AST]) -> set[str]:
    found: set[str] = set()
    for child in parts:
        if isinstance(child, ast.Name):
            found.add(child.id)
        elif isinstance(child, ast.Attribute):
            found.add(child.attr)
        elif isinstance(child, ast.Subscript) and (name := last_name(child)):
            found.add(name)
    found.discard("self")
    return found


def _made(parts: Iterable[ast.AST]) -> set[str]:
    found: set[str] = set()
    for child in parts:
        if isinstance(child, (ast.Name, ast.Attribute, ast.Subscript)) and isinstance(child.ctx, ast.Store):
            held = last_name(child.value) if isinstance(child, ast.Subscript) else ""
            found.add(last_name(child) or held or dotted(child))
        elif isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and child.func.attr in _MUTATES:
            found.add(last_name(child.func.value))
    found.discard("")
    return found


def _switches(parts: Iterable[ast.AST]) -> bool:
    """Whether a statement changes how gradients are handled without touching them: clipping, scaling, EMA."""
    for child in parts:
        name = last_name(child) if isinstance(child, (ast.Attribute, ast.Name)) else ""
        if name in _SWITCHES:
            return True
        if name.startswith(("clip_grad", "_foreach_")) or name == "clip_master_grads" or "ema" in name.split("_"):
            return True
        if _GRADIENTS.search(name) or clears_by_name(name):
            return True
        if (
            isinstance(child, ast.Call)
            and isinstance(child.func, ast.Attribute)
            and child.func.attr in ("step", "update")
        ):
            return True
        if isinstance(child, ast.Call) and any(
            kind_of_name(dotted(arg)) == "scaler" for arg in child.args if dotted(arg)
        ):
            return True  # it may step and update the scale
    return False
