"""Which functions and loops of a file reach a backward, and which loops run once a microbatch."""

import ast
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

from microbatch.linting.comprehensions import Comprehension, write_out
from microbatch.linting.definitions import Definitions, Facts
from microbatch.linting.guesses import GROUPS, LOADER_WORDS, PIECE_NAMES, PIECE_WORDS, kind_of_name, names_window
from microbatch.linting.syntax import (
    FunctionNode,
    Loop,
    dotted,
    is_backward_call,
    is_step_call,
    last_name,
    text_of,
)

__all__ = ["Reach"]

# What one microbatch has several of.
_PARTS = re.compile(
    r"loss|task|optim|model|param|term|head|key|layer|group|level|module|net|agent|stage|modal|domain|criteri|name",
    re.IGNORECASE,
)


# What was found out from the nodes of a file, and is found out anew where these change.
_OF_THE_NODES = (
    *("roots", "_memo", "counters", "windows", "names_text", "wraps_ddp", "window_lists", "counted_attributes"),
    "library_names",
    "resets",
    "_made_objects",
    "batch_sizes",
)


class Reach(Definitions):
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
        for name in _OF_THE_NODES:
            self.__dict__.pop(name, None)
        self._reach()

    # ---- which functions and loops reach a backward

    def _reach(self) -> None:
        """Find which functions reach a backward, through all that they call."""
        for facts in self.facts.values():
            self._look(facts)
        self._spread("backward", "calls")
        self._spread("flat", "flat_calls")
        self._spread("steps", "calls")

    def _spread(self, what: str, through: str) -> None:
        """Add every function that calls one of the functions that were found."""
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
            if isinstance(node, (FunctionNode, ast.ClassDef, ast.Lambda)):
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
        if not self.is_inside_loop(loop) or self._is_over_outputs(loop):
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

    def _is_over_outputs(self, loop: ast.For) -> bool:
        """Whether a loop runs over what one forward pass gave: the heads of a model, the layers of its outputs."""
        read = {n.id for n in ast.walk(loop.iter) if isinstance(n, ast.Name)}
        for node in ast.walk(self.loops_above(loop)[0]):
            value = node.value if isinstance(node, ast.Assign) else None
            if isinstance(value, ast.Call) and kind_of_name(last_name(value.func)) in ("model", "engine"):
                made = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}  # type: ignore[attr-defined]
                if read & made:
                    return True
        return False

    def touches_gradients_here(self, node: ast.AST) -> bool:
        """Whether the head of a compound statement touches gradients: `while not closure():`."""
        if isinstance(node, (ast.With, ast.AsyncWith)):
            return any(
                last_name(item.context_expr.func) in ("no_sync", "accumulate", "no_backward_sync", "scale_loss")
                for item in node.items
                if isinstance(item.context_expr, ast.Call)
            )
        if isinstance(node, (ast.If, ast.While)):
            return self.touches_gradients(node.test, self.owner_of(node))
        if isinstance(node, (ast.For, ast.AsyncFor)):
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
            if isinstance(node, (FunctionNode, ast.ClassDef, ast.Lambda)):
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

        Returns:
            Whether it was found.
        """
        node, owner, what = key
        memo = self._memo
        if key in memo:
            return memo[key]
        memo[key] = False
        stack: list[ast.AST] = [node]
        passed = [key]
        while stack:
            current = stack.pop()
            known = memo.get((current, owner, what)) if current is not node and isinstance(current, ast.stmt) else None
            said = judge(current) if known is None else known
            if said:
                while current is not node:  # what is around it holds it too
                    memo[current, owner, what] = True
                    current = self.parents[current]
                memo[key] = True
                return True
            if said is None:
                if isinstance(current, ast.stmt):
                    passed.append((current, owner, what))
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
        key = (loop, None, "own")
        if key not in self._memo:
            self._memo[key] = self._looks_own(loop)
        return self._memo[key]

    def _looks_own(self, loop: ast.For | ast.AsyncFor | ast.comprehension) -> bool:
        text = text_of(loop.iter)
        if PIECE_WORDS.search(text) or self._is_over_group(loop):
            return True
        if self.goes_through_models(loop):
            return False
        names = {last_name(node) for node in ast.walk(loop.iter)} | {last_name(node) for node in ast.walk(loop.target)}
        if any(LOADER_WORDS.search(name) or PIECE_NAMES.search(name) or names_window(name) for name in names):
            return True
        if not self.is_inside_loop(loop):
            return True
        return not any(_PARTS.search(name) for name in names)

    def goes_through_models(self, loop: ast.AST) -> bool:
        """Whether a loop takes several models in turn, each with a loader of its own: `zip(models, iterators)`."""
        return (
            isinstance(loop, ast.For)
            and isinstance(loop.iter, ast.Call)
            and last_name(loop.iter.func) == "zip"
            and any(kind_of_name(last_name(arg)) in ("model", "optimizer") for arg in loop.iter.args)
            and self.is_inside_loop(loop)
        )

    def _is_over_group(self, loop: Loop | ast.comprehension) -> bool:
        """Whether a loop runs over what an outer one takes from `batched(loader, n)`: the microbatches of a window."""
        if not isinstance(loop, ast.For) or not isinstance(loop.iter, ast.Name):
            return False
        return any(
            isinstance(above, ast.For)
            and isinstance(above.iter, ast.Call)
            and dotted(above.target) == loop.iter.id
            and GROUPS.search(last_name(above.iter.func))
            for above in self.loops_above(loop)
        )

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
