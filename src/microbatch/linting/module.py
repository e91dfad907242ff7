"""Which functions and loops of a file reach a backward, which loops run once a microbatch, and the words for N."""

import ast
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

from microbatch.linting.comprehensions import Comprehension, write_out
from microbatch.linting.definitions import Definitions, Facts
from microbatch.linting.guesses import LOADER_WORDS, PIECE_NAMES, PIECE_WORDS, names_window
from microbatch.linting.syntax import (
    FunctionNode,
    Loop,
    dotted,
    is_backward_call,
    is_step_call,
    last_name,
    steps_inside,
    text_of,
)

__all__ = ["Module"]

# What one microbatch has several of.
_PARTS = re.compile(
    r"loss|task|optim|model|param|term|head|key|layer|group|level|module|net|agent|stage|modal|domain|criteri|name",
    re.IGNORECASE,
)


class Module(Definitions):
    """One parsed file.

    Args:
        tree: Its syntax tree.
    """

    def __init__(self, tree: ast.Module) -> None:
        super().__init__(tree)
        self._reach()
        self.write_out_comprehensions()

    def write_out_comprehensions(self) -> None:
        """Read comprehensions that train as loops."""
        wanted: set[ast.AST] = {
            node
            for node in self.nodes
            if isinstance(node, Comprehension)
            and len(node.generators) == 1
            and self.contains_backward(node.elt, self.owner_of(node))
            and self._is_own_loop(node.generators[0])
        }
        if wanted:
            write_out(self.tree, wanted)
            self.__dict__.pop("nodes", None)
            for node in self.nodes:
                self.parents.update((child, node) for child in ast.iter_child_nodes(node))
            self.read_anew()

    def read_anew(self) -> None:
        """Read anew what calls what."""
        for facts in self.facts.values():
            facts.backward = facts.flat = facts.steps = False
            facts.calls.clear()
            facts.flat_calls.clear()
            facts.sites.clear()
        for name in ("roots", "_memo", "counters", "windows", "names_text", "wraps_ddp", "window_lists"):
            self.__dict__.pop(name, None)
        self._reach()

    @cached_property
    def hints_at_accumulation(self) -> ast.AST | None:
        """A name for the number of microbatches, where no loop of it is in the file but a step may be."""
        if "Accumulator" in self.names_text or not any(self.touches_gradients(each, None) for each in self.tree.body):
            return None
        for node in self.nodes:
            if (
                isinstance(node, ast.Name | ast.Attribute)
                and names_window(last_name(node))
                and dotted(node) not in self.counters
            ):
                return node
        return None

    # ---- which functions and loops reach a backward

    def _reach(self) -> None:
        """Find which functions reach a backward, through all that they call."""
        for facts in self.facts.values():
            self._look(facts)
        self._spread("backward", "calls")
        self._spread("flat", "flat_calls")
        self._spread("steps", "calls")

    def _spread(self, what: str, through: str) -> None:
        """Say the same of every function that calls one of which it is said."""
        callers: dict[str, list[Facts]] = {}
        for facts in self.facts.values():
            for callee in getattr(facts, through):
                callers.setdefault(callee, []).append(facts)
        key_of = {id(facts): key for key, facts in self.facts.items()}
        waiting = [key for key, facts in self.facts.items() if getattr(facts, what)]
        while waiting:
            for facts in callers.get(waiting.pop(), []):
                if not getattr(facts, what):
                    setattr(facts, what, True)
                    waiting.append(key_of[id(facts)])

    def _look(self, facts: Facts) -> None:
        """Note which calls and backwards stand in a function, and which of them stand outside of its loops."""
        body = facts.node.body if isinstance(facts.node, FunctionNode | ast.Module) else []
        stack: list[tuple[ast.AST, bool]] = [(statement, False) for statement in body]
        while stack:
            node, in_loop = stack.pop()
            if isinstance(node, FunctionNode | ast.ClassDef | ast.Lambda):
                continue
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in self.functions:
                facts.calls.add(self.key(self.functions[node.id]))  # handed on: to a launcher, say
            if isinstance(node, ast.Call):
                facts.steps |= is_step_call(node)
                target = self.resolve(node.func, facts.owner)
                if target is not None:
                    facts.calls.add(self.key(target))
                    if not in_loop:
                        facts.flat_calls.add(self.key(target))
                elif is_backward_call(node):
                    facts.backward = True
                    facts.sites.add(node)
                    facts.flat |= not in_loop
            inside = in_loop or (isinstance(node, Loop) and self._is_own_loop(node))
            stack.extend(
                (child, inside if isinstance(child, ast.stmt) else in_loop) for child in ast.iter_child_nodes(node)
            )

    def reaches(self, key: str) -> bool:
        """Whether a function reaches a backward."""
        return self.facts[key].backward

    @cached_property
    def roots(self) -> list[str]:
        """Functions that reach a backward and that no other such function calls; the top level comes first."""
        called = {
            callee for key, facts in self.facts.items() if facts.backward for callee in facts.calls if callee != key
        }
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
        """Whether an inner loop adds something up, and a backward in a later statement beside it reads the sum."""
        if not self.is_inside_loop(loop):
            return False
        added: set[str] = set()
        for node in ast.walk(loop):
            if is_backward_call(node):
                return False
            if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
                added.add(dotted(node.target))
            elif (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.BinOp)
                and isinstance(node.value.op, ast.Add)
            ):
                added.update({dotted(node.targets[0])} & {dotted(node.value.left), dotted(node.value.right)})
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
                added.add(dotted(node.func.value))
        added.discard("")
        siblings = getattr(self.parents[loop], "body", [])
        after = siblings[siblings.index(loop) + 1 :] if loop in siblings else []
        for statement in after:
            for node in ast.walk(statement):
                if is_backward_call(node) and added & {dotted(part) for part in ast.walk(node)}:
                    return True
        return False

    def touches_gradients_here(self, node: ast.AST) -> bool:
        """Whether the head of a compound statement touches gradients: `while not closure():`."""
        if isinstance(node, ast.With | ast.AsyncWith):
            return any(
                last_name(item.context_expr.func) in ("no_sync", "accumulate", "no_backward_sync", "scale_loss")
                for item in node.items
                if isinstance(item.context_expr, ast.Call)
            )
        if isinstance(node, ast.If | ast.While):
            return self.touches_gradients(node.test, self.owner_of(node))
        if isinstance(node, ast.For | ast.AsyncFor):
            return self.touches_gradients(node.iter, self.owner_of(node))
        return False

    def touches_gradients(self, node: ast.AST, owner: str | None) -> bool:
        """Whether a statement, with the functions it calls, adds to gradients, clears them or steps."""
        return self.contains_backward(node, owner) or self.steps(node, owner)

    def steps(self, node: ast.AST, owner: str | None) -> bool:
        """Whether a statement, with the functions it calls, takes a step or clears gradients."""

        def judge(node: ast.AST) -> bool | None:
            if not isinstance(node, ast.Call):
                return None
            target = None if is_step_call(node) else self.resolve(node.func, owner)
            return True if is_step_call(node) or (target and self.facts[self.key(target)].steps) else None

        return self._search((node, owner, "steps"), judge)

    def _holds(self, node: ast.AST, owner: str | None, *, deep: bool) -> bool:
        """Whether a statement runs a backward; if not `deep`, one that no loop inside of it holds."""

        def judge(node: ast.AST) -> bool | None:
            if isinstance(node, FunctionNode | ast.ClassDef | ast.Lambda):
                return False
            if not deep and isinstance(node, Loop) and self._is_own_loop(node):
                return False
            if not isinstance(node, ast.Call):
                return None
            target = self.resolve(node.func, owner)
            if target is None:
                return True if is_backward_call(node) else None
            facts = self.facts[self.key(target)]
            return True if (facts.backward if deep else facts.flat) else None

        return self._search((node, owner, deep), judge)

    def _search(self, key: tuple[ast.AST, str | None, Any], judge: Callable[[ast.AST], bool | None]) -> bool:
        """Whether something is inside of a node, each statement looked at once.

        Args:
            key: The node, the class around it, and what is looked for.
            judge: True where it is found, False where it is not to be looked for further inside.
        """
        node, *what = key
        memo = self._memo
        if key in memo:
            return memo[key]
        memo[key] = False
        stack, passed = [node], [key]
        while stack:
            current = stack.pop()
            known = memo.get((current, *what)) if current is not node and isinstance(current, ast.stmt) else None
            said = judge(current) if known is None else known
            if said:
                while current is not node:  # what is around it holds it too
                    memo[current, *what] = True
                    current = self.parents[current]
                memo[key] = True
                return True
            if said is None:
                if isinstance(current, ast.stmt):
                    passed.append((current, *what))
                stack.extend(ast.iter_child_nodes(current))
        memo.update(dict.fromkeys(passed, False))
        return False

    @cached_property
    def _memo(self) -> dict[tuple[ast.AST, str | None, Any], bool]:
        return {}

    def _is_own_loop(self, loop: Loop | ast.comprehension) -> bool:
        """A loop of its own right: not one over the losses, tasks or optimizers of one microbatch."""
        if isinstance(loop, ast.While):
            return True
        text = text_of(loop.iter)
        if PIECE_WORDS.search(text):
            return True
        names = {last_name(node) for node in ast.walk(loop.iter)} | {last_name(node) for node in ast.walk(loop.target)}
        if any(LOADER_WORDS.search(name) or PIECE_NAMES.search(name) or names_window(name) for name in names):
            return True
        if not self.is_inside_loop(loop):
            return True
        return not any(_PARTS.search(name) for name in names)

    @cached_property
    def caches_outputs(self) -> bool:
        """Whether a loop that runs a backward computes something without a graph first, as gradient caching does."""
        for node in self.nodes:
            if isinstance(node, ast.With) and any("no_grad" in text_of(item.context_expr) for item in node.items):
                loop = next(iter(self.loops_above(node)), None)
                holder = loop or next((p for p in self.around(node) if isinstance(p, FunctionNode)), self.tree)
                # What comes after the backward is an evaluation.
                if any(
                    is_backward_call(n) and n.lineno > node.lineno for n in ast.walk(holder) if isinstance(n, ast.Call)
                ):
                    return True
        return False

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
                is_count = (
                    isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add) and dotted(value.left) == target
                )
                is_reset = isinstance(value, ast.Constant) and value.value == 0 and not isinstance(value.value, bool)
                if target and (is_count or is_reset):
                    found.add(target)
            elif isinstance(node, ast.For):
                found.update(dotted(name) for name in ast.walk(node.target) if isinstance(name, ast.Name))
        found.discard("")
        return found

    @cached_property
    def window_lists(self) -> set[str]:
        """Names of lists that hold the microbatches of one window: `for x, y in chunk:` with the step after it."""
        found: set[str] = set()
        for node in self.nodes:
            name = _iterated(node.iter) if isinstance(node, ast.For) else ""
            if not name or not isinstance(node, ast.For) or not (above := self.loops_above(node)):
                continue
            owner = self.owner_of(node)
            bound = any(
                isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id == name for n in ast.walk(above[0])
            )
            if bound and self.is_microbatch_loop(node, owner) and not any(self.steps(s, owner) for s in node.body):
                if any(self.steps(s, owner) for s in above[0].body):
                    found.add(name)
        return found

    @cached_property
    def windows(self) -> tuple[set[str], set[int]]:
        """Expressions and literal numbers that stand where N stands.

        That is the modulus in a guard of the step, or the range of an inner loop.
        """
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
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
                turns = isinstance(node.value.op, ast.Mod) and dotted(node.targets[0])  # `k = (k + 1) % n`
                if turns and any(dotted(n) == turns for n in ast.walk(node.value.left)) and self.is_inside_loop(node):
                    add(node.value.right)
            elif isinstance(node, ast.Assign) and isinstance(
                node.value, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.IfExp
            ):
                target = last_name(node.targets[0]).lower()
                if any(word in target for word in ("step", "update", "accum", "sync", "last", "boundary")):
                    _moduli(node.value, add, self.counters)
            elif (
                isinstance(node, ast.For)
                and isinstance(node.iter, ast.Call)
                and last_name(node.iter.func) in ("range", "trange")
            ):
                inner = self.is_inside_loop(node)
                if inner and node.iter.args and self.is_microbatch_loop(node, self.owner_of(node)):
                    end = node.iter.args[0] if len(node.iter.args) == 1 else node.iter.args[1]
                    if not (isinstance(end, ast.Call) or "len(" in text_of(end)):
                        add(end)
        return names, literals

    def _guards_step(self, node: ast.If | ast.IfExp) -> bool:
        """Whether a condition decides about a step: inside of it, or after its `continue`."""
        if isinstance(node, ast.IfExp):
            return steps_inside([node])
        owner = self.owner_of(node)
        if any(self.touches_gradients(s, owner) for s in (*node.body, *node.orelse)):
            return True
        loop = next(iter(self.loops_above(node)), None)
        return (
            isinstance(node.body[-1], ast.Continue)
            and loop is not None
            and any(self.touches_gradients(s, owner) for s in loop.body)
        )


def _iterated(node: ast.expr) -> str:
    """The name that a loop runs over, under `enumerate` and the like."""
    while isinstance(node, ast.Call) and last_name(node.func) in ("enumerate", "tqdm", "iter", "list") and node.args:
        node = node.args[0]
    return node.id if isinstance(node, ast.Name) else ""


def _moduli(test: ast.AST, add: Callable[[ast.AST], None], counters: set[str]) -> None:
    """Find the numbers that a condition counts up to: `n` of `(i + 1) % n == 0`, and of `count == n`."""
    for node in ast.walk(test):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            add(node.right)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq | ast.GtE):
            end = node.comparators[0]
            # A list that fills up counts too: `len(waiting) == n`.
            counts = dotted(node.left) in counters or (
                isinstance(node.left, ast.Call) and last_name(node.left.func) == "len"
            )
            if counts and isinstance(end, ast.Constant | ast.Name | ast.Attribute) and "len" not in last_name(end):
                add(end)
