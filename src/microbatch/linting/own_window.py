"""Turn one loop: what the accumulator does by itself is left out, and the loop becomes one over its windows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from microbatch.linting.comprehensions import is_written_out
from microbatch.linting.loop_loss import LoopLoss
from microbatch.linting.loop_work import is_plain
from microbatch.linting.render import Cannot, Renderer
from microbatch.linting.scene import Scene
from microbatch.linting.syntax import FunctionNode, Loop, dotted, is_backward_call, last_name, text_of

__all__ = ["turn"]


def turn(scene: Scene, loop: ast.For, renderer: Renderer) -> None:
    """Plan the new lines of a loop that becomes one with `mb.Accumulator`.

    Args:
        scene: One of its calls of backward.
        loop: The loop over microbatches.
        renderer: Gets what is to change.

    Raises:
        Cannot: The loop cannot be turned.
    """
    _Turn(scene, loop, renderer).run()


class _Turn(LoopLoss):
    """A loop with the step inside of it, or one of N microbatches with the step behind it."""

    def run(self) -> None:
        scene, loop = self.scene, self.loop
        within = any(scene.holds(each, scene.steps) for each in loop.body)
        self.guards = self._guards() if within else []
        self.n = self._window(within)
        if is_written_out(loop):
            raise Cannot("it is a comprehension: write it as a loop first", loop)
        changing = scene.stored(loop) | {node.arg for node in ast.walk(loop) if isinstance(node, ast.arg)}
        if changing & set(re.findall(r"\w+", self.n)):
            raise Cannot(f"its number of microbatches, `{self.n}`, changes inside of it", loop)
        seldom = {v.fault.node for v in scene.reading.verdicts if v.fault.rule == "MB106"}
        if seldom & self.backward_calls:
            raise Cannot("only one of its microbatches runs a backward (MB106): mend that first", loop)
        self._breaks()
        self.drop_the_work()
        self.undo_divisions()
        self.run_backwards(counted=not within or _is_range(loop.iter))
        if within:
            self._tail()
        else:
            self._inner()
        self.drop_unread()
        self.renderer.custom[loop] = self._windows if within else self._window_block
        self._create()

    # ---- where the window ends

    def _guards(self) -> list[ast.If]:
        """Return the conditions of the loop body under which the step is taken, and those that are written alike."""
        found = [each for each in self.loop.body if self.scene.holds(each, self.scene.steps)]
        guard = found[0]
        at = self.loop.body.index(guard)
        skips = [
            each for each in self.loop.body[:at] if isinstance(each, ast.If) and isinstance(each.body[-1], ast.Continue)
        ]
        skips = [each for each in skips if len(each.body) == 1 and not each.orelse and self._n_in(each.test)]
        if not isinstance(guard, ast.If) and skips:
            self.rest = self.loop.body[self.loop.body.index(skips[-1]) + 1 :]
            self._no_backward(self.rest)
            return [skips[-1]]
        if not isinstance(guard, ast.If) or guard.orelse:
            what = "the optimizer steps after every microbatch, or its condition has an `else`"
            raise Cannot(what, guard)
        self._no_backward([guard])
        test = text_of(guard.test)
        return [
            each
            for each in self.loop.body
            if isinstance(each, ast.If) and text_of(each.test) == test and not each.orelse
        ]

    def _window(self, within: bool) -> str:  # noqa: FBT001 - whether the step is inside of the loop
        """Return N as the file writes it."""
        if not within:
            return ""
        scene, test = self.scene, self.guards[0].test
        tests: list[ast.expr] = [test]
        for name in scene.names_of(test):
            tests += [
                node.value
                for node in ast.walk(scene.scope)
                if isinstance(node, ast.Assign) and any(dotted(target) == name for target in node.targets)
            ]
        found = next((n for each in tests if (n := self._n_in(each))), "")
        if not found:
            raise Cannot("its number of microbatches is not in the condition of the step", self.guards[0])
        return found

    def _n_in(self, test: ast.expr) -> str:
        """Return N as it is written in a condition; empty if it is not there."""
        moduli = self.scene.moduli(test)
        if moduli:
            return self.scene.words.text(moduli[0].right)
        compared = [each.comparators[0] for each in ast.walk(test) if isinstance(each, ast.Compare)]
        return next((self.scene.words.text(each) for each in compared if self.scene.is_window(each)), "")

    def _no_backward(self, statements: list[ast.stmt]) -> None:
        if any(is_backward_call(call) for each in statements for call in self.scene.calls(each)):
            raise Cannot("backward and step are under one condition", statements[0])

    def _breaks(self) -> None:
        """Refuse to leave a window in its middle; a loop that stops before its last, short window need not."""
        own = self.loop.body[: len(self.loop.body) - len(self.rest)]
        for statement in own:
            if statement in self.guards:
                continue
            for node in _of_this_loop(statement):
                holder = self.scene.module.parents.get(node)
                whole = (
                    isinstance(holder, ast.If) and holder is statement and holder.body == [node] and not holder.orelse
                )
                if whole and isinstance(holder, ast.If) and self._is_short_of_n(holder.test):
                    self.drop(holder)
                elif isinstance(node, ast.Break):
                    raise Cannot("a `break` may leave a window in its middle", node)

    def _is_short_of_n(self, test: ast.expr) -> bool:
        return any(
            isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv) and self.scene.is_window(node.right)
            for node in ast.walk(test)
        )

    # ---- what stands behind the loop

    def _tail(self) -> None:
        """Leave out the step for the rest of an epoch: the last window takes it."""
        block = self.scene.block(self.loop)
        kept = {text_of(each) for guard in self.guards for each in guard.body} | {text_of(each) for each in self.rest}
        for each in block[block.index(self.loop) + 1 :]:
            if isinstance(each, ast.If) and self.scene.holds(each, self.scene.steps | self._helpers()):
                more = [
                    s
                    for s in each.body
                    if s not in self.renderer.dropped and text_of(s) not in kept and not is_plain(s)
                ]
                if more or each.orelse:
                    raise Cannot("the step behind the loop does more than the one inside", each)
                self.drop(each)

    def _helpers(self) -> set[ast.AST]:
        """Return the calls of functions that only step and clear."""
        found = {each for each in self.renderer.dropped if isinstance(each, ast.Expr)}
        return {each.value for each in found if isinstance(each.value, ast.Call)}

    def _inner(self) -> None:
        """Keep what stands between the loop and its step in the window: the end of the window takes the step."""
        landing = self.scene.landing(self.loop)
        if landing is None:
            raise Cannot("its step is in another function", self.loop)
        block = self.scene.block(self.loop)
        late = set[str]()  # the norm is known when the window has ended
        for each in block[block.index(self.loop) + 1 :]:
            if each is landing or any(node is landing for node in ast.walk(each)):
                self.renderer.elsewhere.update(self.between)
                return
            inside = set(ast.walk(each))
            if any(node in inside and "grad_norm" in new for node, new in self.renderer.swaps.items()):
                late |= self.scene.stored(each)
            elif each not in self.renderer.dropped and not late & self.scene.names_of(each):
                self.between.append(each)
        self.between = []

    # ---- the new lines

    def _windows(self, renderer: Renderer, indent: str) -> list[str]:
        """The loop over windows, the loop over microbatches, and what follows each step."""
        loop, names, draft = self.loop, self.names, renderer.draft
        unit = draft.indent(loop.body[0])[len(draft.indent(loop)) :]
        target, source = draft.text(loop.target), draft.text(loop.iter)
        pair = loop.target.elts if isinstance(loop.target, ast.Tuple) else []
        call = loop.iter
        counts = isinstance(call, ast.Call) and last_name(call.func) == "enumerate" and len(pair) == 2
        if counts and isinstance(call, ast.Call) and isinstance(pair[0], ast.Name) and pair[0].id not in self.reads:
            target, source = draft.text(pair[1]), draft.text(call.args[0])
            if isinstance(pair[1], ast.Tuple):
                target = target.removeprefix("(").removesuffix(")")
        comment = re.search(r":(\s*#.*)$", draft.source.lines[(loop.iter.end_lineno or loop.lineno) - 1])
        comment = comment[1] if comment else ""
        lines = [
            f"{indent}for {names.window} in {names.accumulator}.windows({source}, microbatches={self.n}):{comment}",
            f"{indent}{unit}for {target} in {names.window}:",
        ]
        end = loop.body[0].lineno - 1
        while end > loop.lineno and draft.source.lines[end - 1].strip()[:1] in ("", "#"):
            end -= 1
        rest = self.rest
        own = loop.body[: len(loop.body) - len(rest)]
        renderer.dropped.update(self.guards)
        body = renderer.block(own, indent + unit + unit, end)
        if not any(line.strip() for line in body):
            raise Cannot("nothing is left of its body", loop)
        lines += body
        for guard in self.guards if not rest else []:
            lines += self._late(renderer, guard.body, indent + unit)
            lines += renderer.block(guard.body, indent + unit, _head_end(renderer, guard))
        if rest:
            lines += self._late(renderer, rest, indent + unit)
            lines += renderer.block(rest, indent + unit, own[-1].end_lineno or 0)
        return lines

    def _late(self, renderer: Renderer, statements: list[ast.stmt], indent: str) -> list[str]:
        """Return a comment where a learning rate was set right before the step, which is taken earlier now."""
        for each in statements:
            if self.scene.holds(each, self.scene.steps):
                break
            text = renderer.draft.text(each)
            if "param_groups" in text and each not in renderer.dropped:
                return [
                    f"{indent}# The step is taken already: to set its learning rate, do that before the loop above."
                ]
        return []

    def _window_block(self, renderer: Renderer, indent: str) -> list[str]:
        """The loop as it is, inside of a window."""
        draft, names = renderer.draft, self.names
        unit = draft.indent(self.loop.body[0])[len(draft.indent(self.loop)) :]
        lines = renderer.plain(self.loop, indent + unit)
        block = self.scene.block(self.loop)
        for each in self.between:
            floor = block[block.index(each) - 1].end_lineno or 0
            lines += renderer.block([each], indent + unit, floor, moved=True)
        return [f"{indent}with {names.accumulator}.window() as {names.window}:", *lines]

    def _create(self) -> None:
        """Create the accumulator before the outermost loop in which all that it is made of is there."""
        names, place = self.names, self.loop
        outer = [each for each in [self.loop, *self.scene.above(self.loop)] if isinstance(each, Loop)]
        for each in outer:
            made = {dotted(t) for s in ast.walk(each) if isinstance(s, ast.Assign) for t in s.targets}
            if made & names.needed:
                break
            place = each
        if (
            place is self.loop
            and {dotted(t) for s in ast.walk(place) if isinstance(s, ast.Assign) for t in s.targets} & names.needed
        ):
            raise Cannot("its model or optimizer is made inside of the loop", place)
        lines = list(names.creation)
        if len(outer) == 1 and isinstance(self.scene.scope, FunctionNode) and names.per_call:
            lines.insert(
                0, "# Better once for the whole run, where the optimizer is made; then pass it to this function."
            )
        renderer = self.renderer
        renderer.before[place] = [*renderer.before.get(place, []), *lines]


def _head_end(renderer: Renderer, guard: ast.If) -> int:
    row = guard.lineno
    while row < guard.body[0].lineno - 1 and not renderer.source.lines[row - 1].split("#")[0].rstrip().endswith(":"):
        row += 1
    return row


def _of_this_loop(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yield the nodes of a statement, without those of loops inside of it."""
    if isinstance(statement, Loop):
        return
    yield statement
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _of_this_loop(child)  # type: ignore[arg-type]


def _is_range(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and last_name(node.func) in ("range", "trange", "count")
