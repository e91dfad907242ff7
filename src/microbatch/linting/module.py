"""What a file holds: its functions and classes, which of them reach a backward, which loops run once a microbatch, and the words for N."""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from microbatch.linting.guesses import LOADER_WORDS, kind_of_name, names_window
from microbatch.linting.values import Function

__all__ = ["Loop", "Module", "dotted", "is_backward_call", "last_name", "text_of"]

_PIECES = re.compile(r"\b(split|chunk|tensor_split|chunks|microbatches|micro_batches)\b")
# What one microbatch has several of.
_PARTS = re.compile(r"loss|task|optim|model|param|term|head|key|layer|group|level|module|net|agent|stage|modal|domain|criteri|name", re.IGNORECASE)
_GENERIC = frozenset(
    "backward step zero_grad forward eval update state_dict load_state_dict to parameters item append add log write get items keys values "
    "cuda cpu detach mean sum close save load format join reset size view __init__ prepare no_sync scale unscale_ clip_grad_norm_ next".split()
)
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Loop = ast.For | ast.AsyncFor | ast.While


def dotted(node: ast.AST) -> str:
    """The text of a name, an attribute or a subscript by a constant: "self.args.n", "config['n']"; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    found = getattr(node, "_dotted", None)  # asked many times for each node
    if found is None:
        found = ""
        if isinstance(node, ast.Attribute):
            base = dotted(node.value)
            found = f"{base}.{node.attr}" if base else ""
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            base = dotted(node.value)
            found = f"{base}[{node.slice.value!r}]" if base else ""
        node._dotted = found  # type: ignore[attr-defined]
    return found


def last_name(node: ast.AST) -> str:
    """The last word of a name: `n` of "self.args.n" and of "config['n']"."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return node.slice.value
    return ""


def text_of(node: ast.AST) -> str:
    """The source of an expression, short enough for a message."""
    found = getattr(node, "_text", None)
    if found is None:
        try:
            found = ast.unparse(node)
        except (ValueError, RecursionError):
            found = "an expression"
        found = found if len(found) <= 60 else found[:57] + "..."
        node._text = found  # type: ignore[attr-defined]
    return found


def is_backward_call(node: ast.AST) -> bool:
    """Whether a call adds to the gradients: `x.backward()`, Lightning's `manual_backward`, a scaler that does all in one."""
    if not isinstance(node, ast.Call):
        return False
    name = last_name(node.func)
    if name in ("backward", "manual_backward"):
        return True
    return kind_of_name(name) == "native_scaler" and not name[:1].isupper() and len(node.args) >= 2


@dataclass
class _Facts:
    """What one function (or the top level) does, outside and inside its loops."""

    node: ast.AST
    owner: str | None
    backward: bool = False
    in_loop: bool = False  # its backward stands in a loop of its own
    flat: bool = False  # a backward stands outside of its loops
    sites: set[ast.AST] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)
    flat_calls: set[str] = field(default_factory=set)


class Module:
    """One parsed file.

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
        self.facts: dict[str, _Facts] = {"": _Facts(tree, None)}
        self._resolved: dict[tuple[ast.AST, str | None], Function | None] = {}
        self.paths: dict[ast.AST, str] = {}
        self._found: dict[str, Any] = {}
        self._collect(tree, None, None)
        self._reach()

    # ---- what is there

    def add(self, node: FunctionNode | ast.ClassDef, tree: ast.Module, path: str) -> None:
        """Add a function or class of another file. What this file defines itself stays."""
        if node.name in self.functions or node.name in self.classes:
            return
        self.paths[node] = path
        self.parents[node] = self.tree
        before = set(self.facts)
        holder = ast.Module([node], [])
        self._collect(holder, None, None)
        self.parents[node] = self.tree
        for key in set(self.facts) - before:
            self._look(self.facts[key])
        self._resolved.clear()
        self._again()

    def _again(self) -> None:
        """Read what calls what anew."""
        for facts in self.facts.values():
            facts.backward = facts.flat = facts.in_loop = False
            facts.calls.clear()
            facts.flat_calls.clear()
            facts.sites.clear()
        for name in ("roots", "_memo", "counters", "windows", "names_text", "wraps_ddp"):
            self.__dict__.pop(name, None)
        self._reach()

    def path_of(self, node: ast.AST) -> str | None:
        """The file of a node that was added from another one; `None` for this file's own."""
        while node is not self.tree:
            if node in self.paths:
                return self.paths[node]
            if node not in self.parents:
                return None
            node = self.parents[node]
        return None

    @cached_property
    def hints_at_accumulation(self) -> ast.AST | None:
        """A name for the number of microbatches, where no loop of it is in the file."""
        for node in self.nodes:
            if isinstance(node, ast.Name | ast.Attribute) and names_window(last_name(node)) and dotted(node) not in self.counters:
                return node
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
                    self.facts[self.key(function)] = _Facts(child, function.owner)
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
        return not body or (len(body) == 1 and isinstance(body[0], ast.Raise | ast.Pass))

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
        if func.attr in _GENERIC or kind_of_name(dotted(func.value)) in ("optimizer", "scheduler", "accelerator", "model"):
            return None
        candidates = self.by_method.get(func.attr, [])
        return candidates[0] if len(candidates) == 1 else None

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the file."""
        return list(ast.walk(self.tree))

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What is found in the file itself, the same for all runs: it is looked for once."""
        if name not in self._found:
            self._found[name] = find()
        return self._found[name]

    # ---- which functions and loops reach a backward

    def _reach(self) -> None:
        for facts in self.facts.values():
            self._look(facts)
        changed = True
        while changed:
            changed = False
            for facts in self.facts.values():
                backward = facts.backward or any(self.facts[c].backward for c in facts.calls)
                flat = facts.flat or any(self.facts[c].flat for c in facts.flat_calls)
                if (backward, flat) != (facts.backward, facts.flat):
                    facts.backward, facts.flat = backward, flat
                    changed = True

    def _look(self, facts: _Facts) -> None:
        body = facts.node.body if isinstance(facts.node, FunctionNode | ast.Module) else []
        stack: list[tuple[ast.AST, bool]] = [(statement, False) for statement in body]
        while stack:
            node, in_loop = stack.pop()
            if isinstance(node, FunctionNode | ast.ClassDef | ast.Lambda):
                continue
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in self.functions:
                facts.calls.add(self.key(self.functions[node.id]))  # handed on: to a launcher, say
            if isinstance(node, ast.Call):
                target = self.resolve(node.func, facts.owner)
                if target is not None:
                    facts.calls.add(self.key(target))
                    if not in_loop:
                        facts.flat_calls.add(self.key(target))
                elif is_backward_call(node):
                    facts.backward = True
                    facts.sites.add(node)
                    facts.flat |= not in_loop
                    facts.in_loop |= in_loop
            inside = in_loop or (isinstance(node, Loop) and self._is_own_loop(node))
            for child in ast.iter_child_nodes(node):
                stack.append((child, inside if isinstance(child, ast.stmt) or in_loop else in_loop))

    def reaches(self, key: str) -> bool:
        """Whether a function reaches a backward."""
        return self.facts[key].backward

    @cached_property
    def roots(self) -> list[str]:
        """Functions that reach a backward and that no other such function calls; the top level comes first."""
        called = {callee for key, facts in self.facts.items() if facts.backward for callee in facts.calls if callee != key}
        found = [key for key, facts in self.facts.items() if facts.backward and key not in called]
        # Functions that only call one another in a circle are begun at the first of them.
        return found or [key for key, facts in self.facts.items() if facts.backward][:1]

    def holders_of_backward(self) -> list[str]:
        """The functions in which a backward itself stands."""
        return [key for key in self.facts if self.backward_sites(key)]

    def backward_sites(self, key: str) -> set[ast.AST]:
        """The calls of backward that stand in a function itself."""
        return self.facts[key].sites

    def contains_backward(self, node: ast.AST, owner: str | None) -> bool:
        """Whether a statement, with the functions it calls, runs a backward."""
        return self._holds(node, owner, deep=True)

    def is_microbatch_loop(self, loop: Loop, owner: str | None) -> bool:
        """Whether one iteration is one microbatch: it runs a backward that no deeper loop of microbatches holds."""
        if not self._is_own_loop(loop):
            return False
        return any(self._holds(statement, owner, deep=False) for statement in loop.body) or self._collects(loop)

    def _collects(self, loop: Loop) -> bool:
        """Whether a loop adds up losses that one backward after it goes through."""
        key = (loop, None, "collects")
        if key not in self._memo:
            self._memo[key] = isinstance(loop, ast.For) and self._adds_for_later(loop)
        return self._memo[key]

    def _adds_for_later(self, loop: ast.For) -> bool:
        if not any(isinstance(parent, Loop) for parent in self.above(loop)):
            return False
        added: set[str] = set()
        for node in ast.walk(loop):
            if is_backward_call(node):
                return False
            if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
                added.add(dotted(node.target))
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.Add):
                added.update({dotted(node.targets[0])} & {dotted(node.value.left), dotted(node.value.right)})
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
                added.add(dotted(node.func.value))
        added.discard("")
        siblings = getattr(self.parents[loop], "body", [])
        after = siblings[siblings.index(loop) + 1 :] if loop in siblings else []
        for statement in after:
            for node in ast.walk(statement):
                if is_backward_call(node) and isinstance(node, ast.Call) and added & {dotted(part) for part in ast.walk(node)}:
                    return True
        return False

    def touches_gradients_here(self, node: ast.AST) -> bool:
        """Whether the head of a compound statement touches gradients: `while not closure():`."""
        if isinstance(node, ast.With | ast.AsyncWith):
            return any(last_name(item.context_expr.func) in ("no_sync", "accumulate", "no_backward_sync", "scale_loss")
                       for item in node.items if isinstance(item.context_expr, ast.Call))  # fmt: skip
        head = node.test if isinstance(node, ast.If | ast.While) else node.iter if isinstance(node, ast.For | ast.AsyncFor) else None
        return head is not None and self.touches_gradients(head, self.owner_of(node))

    def touches_gradients(self, node: ast.AST, owner: str | None) -> bool:
        """Whether a statement, with the functions it calls, adds to gradients, clears them or steps."""
        return self._touches(node, owner, set())

    def _touches(self, node: ast.AST, owner: str | None, seen: set[str]) -> bool:
        key = (node, owner, "touch")
        if key in self._memo:
            return self._memo[key]
        found = _steps([node]) or self.contains_backward(node, owner)
        if not found:
            for call in ast.walk(node):
                target = self.resolve(call.func, owner) if isinstance(call, ast.Call) else None
                if target is not None and (name := self.key(target)) not in seen:
                    found = found or self._touches(target.node, target.owner, seen | {name})
        self._memo[key] = found
        return found

    def _holds(self, node: ast.AST, owner: str | None, *, deep: bool) -> bool:
        memo = self._memo
        key = (node, owner, deep)
        if key in memo:
            return memo[key]
        memo[key] = False
        stack: list[ast.AST] = [node]
        found = False
        while stack and not found:
            current = stack.pop()
            if isinstance(current, FunctionNode | ast.ClassDef | ast.Lambda):
                continue
            if not deep and isinstance(current, Loop) and self._is_own_loop(current):
                continue
            if isinstance(current, ast.Call):
                target = self.resolve(current.func, owner)
                if target is not None:
                    facts = self.facts[self.key(target)]
                    found = facts.backward if deep else facts.flat
                else:
                    found = is_backward_call(current)
            stack.extend(ast.iter_child_nodes(current))
        memo[key] = found
        return found

    @cached_property
    def _memo(self) -> dict[tuple[ast.AST, str | None, Any], bool]:
        return {}

    def _is_own_loop(self, loop: Loop) -> bool:
        """A loop of its own right: not one over the losses, tasks or optimizers of one microbatch."""
        if isinstance(loop, ast.While):
            return True
        text = text_of(loop.iter)
        if _PIECES.search(text):
            return True
        names = {last_name(node) for node in ast.walk(loop.iter)} | {last_name(node) for node in ast.walk(loop.target)}
        if any(LOADER_WORDS.search(name) or names_window(name) or "batch" in name.lower() or "chunk" in name.lower() for name in names):
            return True
        if not any(isinstance(parent, Loop) for parent in self.above(loop)):
            return True
        return not any(_PARTS.search(name) for name in names)

    def above(self, node: ast.AST) -> list[ast.AST]:
        """The nodes around one, inside its function."""
        found: list[ast.AST] = []
        while (node := self.parents.get(node, self.tree)) is not self.tree and not isinstance(node, FunctionNode | ast.ClassDef):
            found.append(node)
        return found

    def statement_of(self, node: ast.AST) -> ast.stmt | None:
        """The statement that holds an expression, or the statement itself."""
        while not isinstance(node, ast.stmt):
            if node not in self.parents:
                return None
            node = self.parents[node]
        return node

    def is_inside_loop(self, node: ast.AST) -> bool:
        """Whether a statement stands inside of a loop of its function."""
        return any(isinstance(parent, Loop) for parent in self.above(node))

    def function_of(self, node: ast.AST) -> str:
        """The name of the function that holds a node; empty at the top level."""
        while (node := self.parents.get(node, self.tree)) is not self.tree:
            if isinstance(node, FunctionNode):
                return node.name
        return ""

    @cached_property
    def names_text(self) -> str:
        """All names of the file, for a search by words."""
        return " ".join({n.id for n in self.nodes if isinstance(n, ast.Name)} | {n.attr for n in self.nodes if isinstance(n, ast.Attribute)})

    @cached_property
    def wraps_ddp(self) -> bool:
        """Whether the file wraps a model in DistributedDataParallel."""
        return any(isinstance(n, ast.Call) and last_name(n.func) in ("DistributedDataParallel", "DDP") for n in self.nodes)

    # ---- the words for N

    @cached_property
    def counters(self) -> set[str]:
        """Names that count: added to, or set back to a small number inside of a loop."""
        found: set[str] = set()
        for node in self.nodes:
            if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
                found.add(dotted(node.target))
            elif isinstance(node, ast.Assign) and len(node.targets) == 1:
                target = dotted(node.targets[0])
                value = node.value
                is_count = isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add) and dotted(value.left) == target
                is_reset = isinstance(value, ast.Constant) and value.value in (0,) and not isinstance(value.value, bool)
                if target and (is_count or is_reset):
                    found.add(target)
            elif isinstance(node, ast.For):
                found.update(dotted(name) for name in ast.walk(node.target) if isinstance(name, ast.Name))
        found.discard("")
        return found

    @cached_property
    def windows(self) -> tuple[set[str], set[int]]:
        """Expressions and literal numbers that stand where N stands: the modulus of a guard of the step, the range of an inner loop."""
        names: set[str] = set()
        literals: set[int] = set()

        def add(node: ast.AST) -> None:
            if isinstance(node, ast.Constant):
                if isinstance(node.value, int) and not isinstance(node.value, bool) and node.value > 1:
                    literals.add(node.value)
            elif (text := dotted(node)) and text not in self.counters:
                names.add(text)

        for node in self.nodes:
            if isinstance(node, ast.If | ast.IfExp) and self._guards_step(node):
                _moduli(node.test, add, self.counters)
            elif isinstance(node, ast.Call):
                for keyword in node.keywords:
                    if keyword.arg in ("update_grad", "need_update", "enabled"):
                        _moduli(keyword.value, add, self.counters)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.IfExp):
                target = last_name(node.targets[0]).lower()
                if any(word in target for word in ("step", "update", "accum", "sync", "last", "boundary")):
                    _moduli(node.value, add, self.counters)
            elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call) and last_name(node.iter.func) in ("range", "trange"):
                inner = any(isinstance(parent, Loop) for parent in self.above(node))
                if inner and node.iter.args and self.is_microbatch_loop(node, self.owner_of(node)):
                    end = node.iter.args[0] if len(node.iter.args) == 1 else node.iter.args[1]
                    if not (isinstance(end, ast.Call) or "len(" in text_of(end)):
                        add(end)
        return names, literals

    def _guards_step(self, node: ast.If | ast.IfExp) -> bool:
        """Whether a condition decides about a step: inside of it, or after its `continue`."""
        if isinstance(node, ast.IfExp):
            return _steps([node])
        owner = self.owner_of(node)
        if any(self.touches_gradients(s, owner) for s in (*node.body, *node.orelse)):
            return True
        loop = next((p for p in self.above(node) if isinstance(p, Loop)), None)
        return isinstance(node.body[-1], ast.Continue) and loop is not None and any(self.touches_gradients(s, owner) for s in loop.body)

    def owner_of(self, node: ast.AST) -> str | None:
        """The class that holds a node."""
        while (node := self.parents.get(node, self.tree)) is not self.tree:
            if isinstance(node, ast.ClassDef):
                return node.name
        return None


def _steps(body: Sequence[ast.AST]) -> bool:
    """Whether an optimizer's step or the clearing of gradients is inside."""
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                base = node.func.value
                kind = kind_of_name(dotted(base)) or kind_of_name(last_name(base.func) if isinstance(base, ast.Call) else "")
                if node.func.attr == "step" and kind not in ("scheduler", "ema", "log", "meter"):
                    return True
                if node.func.attr == "zero_grad":
                    return True
                if "optim" in node.func.attr and "step" in node.func.attr:
                    return True
    return False


def _moduli(test: ast.AST, add, counters: set[str]) -> None:  # noqa: ANN001 - a function of one node
    """The numbers that a condition counts up to: `n` of `(i + 1) % n == 0`, and of `count == n`."""
    for node in ast.walk(test):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            add(node.right)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq | ast.GtE):
            if dotted(node.left) in counters and (names_window(last_name(node.comparators[0])) or isinstance(node.comparators[0], ast.Constant)):
                add(node.comparators[0])
