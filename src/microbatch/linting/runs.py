"""The runs of one file: every way that its settings allow, each for several window sizes and loader lengths."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from microbatch.linting.machine import Machine
from microbatch.linting.module import Module
from microbatch.linting.simulated import Run
from microbatch.linting.slices import cut
from microbatch.linting.trace import Trace

__all__ = ["Outcome", "Root", "simulate"]

_FIRST = re.compile(
    r"amp\b|fp16|float16|half|precision|scaler|autocast|distributed|ddp|no_sync|clip|grad_norm|max_norm", re.IGNORECASE
)
FORKS = 16  # settings of one root that are judged
OTHERS = 6  # functions that are begun at too, because no root came to their backward
PROBES = 32  # settings of one root that are tried
STATEMENTS = 300_000  # of all runs of one file together
OVERHEAD = 50  # what a run costs besides, in statements


@dataclass
class Outcome:
    """One run with its trace."""

    run: Run
    trace: Trace
    fork: int
    used_window: bool

    @property
    def clean(self) -> bool:
        """Whether the loader's length is a multiple of N, so that there is no remainder."""
        return self.run.length % self.run.microbatches == 0

    @cached_property
    def seen(self) -> set[ast.AST]:
        """The places of the file that this run came to with an effect."""
        trace = self.trace
        found: set[ast.AST] = {b.node for b in trace.backwards}
        found.update(s.node for s in trace.steps)
        found.update(m.node for m in trace.marks)
        return found


@dataclass
class Root:
    """One place to start from, with all its runs."""

    name: str
    outcomes: list[Outcome] = field(default_factory=list)
    survey: Outcome | None = None
    skips: list[Outcome] = field(default_factory=list)
    questions: dict[int, dict[str, bool]] = field(default_factory=dict)
    complete: bool = True
    spent: int = 0  # statements of all its runs


def simulate(module: Module) -> list[Root]:
    """Run every root of a file."""
    if not module.roots:
        return []
    runner = _Runner(module)
    roots: list[Root] = []
    covered: set[ast.AST] = set()
    waiting = list(module.roots)
    tried: set[str] = set()
    left = OTHERS
    while waiting:
        name = waiting.pop(0)
        if name in tried:
            continue
        tried.add(name)
        if runner.left <= 0:
            for root in roots[-1:]:
                root.complete = False
            break
        root = runner.runs_of(name)
        sites = {b.node for o in root.outcomes for b in o.trace.backwards}
        if sites - covered or not root.outcomes:
            roots.append(root)
        covered |= sites
        if not waiting:
            holders = (key for key in module.holders_of_backward() if key not in tried)
            unseen = [key for key in holders if not module.backward_sites(key) <= covered]
            waiting = unseen[: min(3, left)]
            left -= len(waiting)
            if unseen and not waiting and roots:
                roots[-1].complete = False
    return [root for root in roots if root.outcomes]


@dataclass(frozen=True, slots=True)
class _Turn:
    """Settings to try: those of a run before, whose signature is `before`, with one more answer turned.

    `is_new` says that this run asked for the answer as the first one.
    """

    decisions: dict[str, bool]
    key: str
    before: Any
    is_new: bool

    @property
    def order(self) -> tuple[int, bool]:
        """Few settings come first; of these, precision and ranks, for loops differ by them most."""
        return len(self.decisions), _FIRST.search(self.key) is None


class _Runner:
    """Runs the roots of one file, and counts the statements of all runs."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.relevant = cut(module)
        self.left = STATEMENTS

    def runs_of(self, name: str) -> Root:
        """Run one root: with every setting, and with the default setting for several sizes."""
        root, before = Root(name), self.left
        sizes = _sizes(self.module)
        first = sizes[0][0]
        root.survey = self.one(name, Run(first, 2 * first + 1), surveys=True)
        for index, probe in enumerate(self._forks(root, first)):
            root.questions[index] = probe.run.decisions
            outcomes = [replace(probe, fork=index)]
            for microbatches, lengths_of_size in sizes if index == 0 else [(first, [2 * first])]:
                outcomes += self._lengths(root, probe, microbatches, lengths=lengths_of_size, fork=index)
            root.outcomes += [outcome for outcome in outcomes if outcome.trace.backwards]
            if index == 0 and probe.run.may_skip:
                root.skips = [self.one(name, Run(first, 2 * first, skip=skip)) for skip in (first + 1, first + 2)]
        trains = next((outcome for outcome in root.outcomes if outcome.trace.backwards), None)
        if trains is not None and not root.survey.trace.backwards:  # with the default setting, it only evaluates
            root.survey = self.one(name, Run(first, 2 * first + 1, trains.run.decisions), surveys=True)
        root.spent = before - self.left
        return root

    def _lengths(
        self, root: Root, probe: Outcome, microbatches: int, *, lengths: list[int], fork: int
    ) -> Iterator[Outcome]:
        """Run with loaders of several lengths; once, where the loop does not ask for the length."""
        known = None if probe.run.reads_length or probe.run.microbatches != microbatches else probe
        for length in lengths:
            if known is not None:
                yield replace(known, run=known.run.of_length(length), fork=fork)
                return
            if self.left <= 0:
                root.complete = False
                return
            outcome = self.one(root.name, Run(microbatches, length, probe.run.decisions), fork=fork)
            known = None if outcome.run.reads_length else outcome
            yield outcome

    def _forks(self, root: Root, microbatches: int) -> list[Outcome]:
        """Find the settings that make a difference.

        One answer of an unknown condition is turned at a time. Two are turned together where each of them changes a
        run, or where the second is asked for the first time after the first one was turned.

        Returns:
            One run for each of these settings, the default first.
        """
        forks: list[Outcome] = []
        signatures: set[Any] = set()
        waiting = [_Turn({}, "", None, is_new=True)]
        known, asked, matters, spare = {frozenset[str]()}, set[str](), set[str](), 6
        probes = 0
        while waiting:
            turn = waiting.pop(min(range(len(waiting)), key=lambda place: waiting[place].order))
            if not turn.is_new and turn.key not in matters:
                continue
            if probes >= PROBES or len(forks) >= FORKS or self.left <= 0:
                root.complete = False
                break
            probes += 1
            outcome = self.one(root.name, Run(microbatches, 2 * microbatches + 1, turn.decisions))
            signature = _signature(outcome.trace)
            fresh = set(outcome.run.asked) - asked
            asked |= fresh
            if signature != turn.before:
                matters.add(turn.key)
            is_fork = signature not in signatures
            if is_fork:
                signatures.add(signature)
                forks.append(outcome)
            elif fresh and (spare := spare - 1) < 0:
                continue
            # Where nothing changed, the second half of `a and b` may still: it is asked for the first time.
            for key in (key for key in outcome.run.asked if is_fork or key in fresh):
                path = frozenset({*turn.decisions, key})
                if path not in known:
                    known.add(path)
                    waiting.append(_Turn({**turn.decisions, key: True}, key, signature, is_new=key in fresh))
        return forks

    def one(self, name: str, run: Run, *, fork: int = 0, surveys: bool = False) -> Outcome:
        """Run a root once; a survey runs all statements, not only those that matter to gradients."""
        machine = Machine(self.module, run, None if surveys else self.relevant)
        trace = machine.start(name)
        self.left -= machine.spent + OVERHEAD
        return Outcome(run, trace, fork, machine.used_window)


def _signature(trace: Trace) -> Any:
    """What a run did to the gradients, to compare two runs."""
    steps = tuple((s.node, s.tick, tuple(s.weights.items()), tuple(s.since), s.prior, s.scaled) for s in trace.steps)
    losses = {
        (b.node, b.loss.reduction, b.loss.tokens, b.loss.coupled, b.loss.divided, b.loss.opaque, b.synced)
        for b in trace.backwards
    }
    marks = {(m.kind, m.node, m.tick, m.name, m.detail) for m in trace.marks if m.kind not in ("log", "sync", "slice")}
    return steps, frozenset(losses), frozenset(marks), frozenset(trace.opaque), len(trace.backwards)


def _sizes(module: Module) -> list[tuple[int, list[int]]]:
    """Window sizes, each with loader lengths; the first length has no remainder."""
    names, literals = module.windows
    if literals and not names:
        n = max(literals)
        if n > 64:
            return [(n, [2 * n])]
        return [(n, [3 * n, 3 * n - 1] if n > 2 else [3 * n])]
    return [(4, [12, 11]), (3, [6]), (2, [6])]
