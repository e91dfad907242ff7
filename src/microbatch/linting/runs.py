"""The runs of one file: every way that its settings allow, each for several window sizes and loader lengths."""

import ast
from dataclasses import dataclass, field, replace
from typing import Any

from microbatch.linting.machine import Machine, Run
from microbatch.linting.module import Module
from microbatch.linting.slices import Slice, cut
from microbatch.linting.trace import Trace

__all__ = ["Outcome", "Root", "simulate"]

FORKS = 12
PROBES = 32
STATEMENTS = 900_000  # of all runs of one file together


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

    @property
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


def simulate(module: Module) -> list[Root]:
    """Run every root of a file."""
    relevant = cut(module)
    budget = [STATEMENTS]
    roots: list[Root] = []
    covered: set[ast.AST] = set()
    waiting = list(module.roots)
    tried: set[str] = set()
    while waiting:
        name = waiting.pop(0)
        if name in tried:
            continue
        tried.add(name)
        root = _runs_of(module, name, relevant, budget)
        sites = {b.node for o in root.outcomes for b in o.trace.backwards}
        if sites - covered or not root.outcomes:
            roots.append(root)
        covered |= sites
        if not waiting:
            waiting = [key for key in module.holders_of_backward() if key not in tried and not module.backward_sites(key) <= covered][:3]
    return [root for root in roots if root.outcomes]


def _runs_of(module: Module, name: str, relevant: Slice, budget: list[int]) -> Root:
    root = Root(name)
    sizes = _sizes(module)
    first = sizes[0][0]
    root.survey = _one(module, name, Run(first, 2 * first + 1), None, 0, budget)
    for index, probe in enumerate(_forks(module, name, relevant, first, root, budget)):
        decisions = probe.run.decisions
        root.questions[index] = decisions
        outcomes = [replace(probe, fork=index)]
        for microbatches, lengths in sizes if index == 0 else [(first, sizes[0][1][:1])]:
            for length in lengths:
                if budget[0] <= 0:
                    root.complete = False
                    break
                outcomes.append(_one(module, name, Run(microbatches, length, decisions), relevant, index, budget))
        root.outcomes += [outcome for outcome in outcomes if outcome.trace.backwards]
    for skip in (first + 1, first + 2):
        root.skips.append(_one(module, name, Run(first, 2 * first, {}, skip=skip), relevant, 0, budget))
    return root


def _forks(module: Module, name: str, relevant: Slice, microbatches: int, root: Root, budget: list[int]) -> list[Outcome]:
    """The settings that make a difference: one answer of an unknown condition is turned at a time, and kept if the run changes."""
    forks: list[Outcome] = []
    signatures: set[Any] = set()
    waiting: list[dict[str, bool]] = [{}]
    known = {frozenset[str]()}
    probes = 0
    while waiting:
        if probes >= PROBES or len(forks) >= FORKS or budget[0] <= 0:
            root.complete = False
            break
        decisions = waiting.pop(0)
        probes += 1
        outcome = _one(module, name, Run(microbatches, 2 * microbatches + 1, decisions), relevant, 0, budget)
        signature = _signature(outcome.trace)
        if signature in signatures:
            continue
        signatures.add(signature)
        forks.append(outcome)
        for key in outcome.run.asked:
            path = frozenset({*decisions, key})
            if path not in known:
                known.add(path)
                waiting.append({**decisions, key: True})
    return forks


def _signature(trace: Trace) -> Any:
    """What a run did to the gradients, to compare two runs."""
    steps = tuple((s.node, s.tick, tuple(s.weights.items()), tuple(s.since), s.prior, s.scaled) for s in trace.steps)
    losses = {(b.node, b.loss.reduction, b.loss.tokens, b.loss.coupled, b.loss.divided, b.loss.opaque, b.synced) for b in trace.backwards}
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


def _one(module: Module, name: str, run: Run, relevant: Slice | None, fork: int, budget: list[int]) -> Outcome:
    machine = Machine(module, run, relevant)
    trace = machine.start(name)
    budget[0] -= machine.spent
    return Outcome(run, trace, fork, machine.used_window)
