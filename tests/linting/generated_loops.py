"""Random loops with at most one fault each, and the weight that each microbatch has in each step, by running them.

The model has one parameter for each microbatch of the run, and the loss of a microbatch is its own parameter. So the
gradient that a step is handed is the list of weights with which the microbatches enter it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

# What may be wrong, and the rule that names it.
FAULTS = {
    "": "",
    "not divided": "MB101",
    "divided twice": "MB102",
    "cleared inside": "MB103",
    "stepped inside": "MB104",
    "phase": "MB105",
    "backward at the boundary": "MB106",
    "leaks": "MB110",
    "dropped": "MB111",
    "short window divided by N": "MB112",
}
TAIL_FAULTS = {"leaks", "dropped", "short window divided by N"}


@dataclass(frozen=True)
class Loop:
    """One generated loop."""

    source: str
    fault: str


def generate(seed: int) -> Loop:
    """Write a loop: how it counts, where it divides, clears and steps, what helpers it has, and its fault."""
    draw = random.Random(seed)  # noqa: S311 - the same loops every time
    fault = draw.choice(["", "", *FAULTS])
    counter = draw.choice(["from 0", "from 1", "own", "global", "pending", "inner range"])
    if fault == "phase" and counter in {"pending", "inner range"}:
        counter = draw.choice(["from 0", "from 1", "own", "global"])
    if fault in TAIL_FAULTS and counter in {"global", "inner range"}:
        counter = draw.choice(["from 0", "from 1", "own", "pending"])
    if fault in {"stepped inside", "backward at the boundary"} and counter == "pending":
        counter = "from 0"
    return Loop(_inner_range(draw, fault) if counter == "inner range" else _guarded(draw, fault, counter), fault)


def _inner_range(draw: random.Random, fault: str) -> str:
    """A loop of N microbatches for each step."""
    head, tell, step = _helpers(draw, fault, "N")
    zero_first = draw.random() < 0.5
    inner = ["x, y = next(batches)", *(["optimizer.zero_grad()"] if fault == "cleared inside" else []), *tell]
    if fault == "backward at the boundary":
        inner = [*inner[:-1], "if k == N - 1:", f"    {inner[-1]}"]
    after = [each for each in step if not (zero_first and each == "optimizer.zero_grad()")]
    body = ["for step in range(steps):"]
    body += ["    optimizer.zero_grad()"] if zero_first else []
    body += ["    for k in range(N):", *(f"        {line}" for line in inner)]
    body += [f"        {line}" if fault == "stepped inside" else f"    {line}" for line in after]
    return "\n".join([*head, *body]) + "\n"


def _guarded(draw: random.Random, fault: str, counter: str) -> str:
    """A loop over the loader, with a condition for the step."""
    index = {"from 0": "i", "from 1": "i", "own": "count", "global": "count", "pending": "pending"}[counter]
    starts_at_1 = counter == "from 1"
    # Whether a counter of the loop's own is increased before the test, so that it counts from 1 there.
    early = counter == "pending" or (counter in {"own", "global"} and draw.random() < 0.5)
    ends_at = index if starts_at_1 or early else f"{index} + 1"  # the number of microbatches so far
    tail = {"leaks": "none", "dropped": "none"}.get(fault) or _tail(draw, fault, counter)
    divisor = "N"
    if tail == "or last" and fault not in {"short window divided by N", "phase"}:
        divisor = "size"
    head, tell, step = _helpers(draw, fault, divisor)
    test = _test(draw, fault, index, ends_at, counter=counter)
    if tail == "or last":
        test += f" or {ends_at} == len(loader)"
    source = list(head)
    source += ["count = 0"] if counter == "global" else []
    source += ["for epoch in range(epochs):"]
    source += ["    optimizer.zero_grad()"] if fault == "dropped" else []
    source += ["    count = 0"] if counter == "own" else []
    source += ["    pending = 0"] if counter == "pending" else []
    loop = {"from 0": "i, (x, y) in enumerate(loader)", "from 1": "i, (x, y) in enumerate(loader, start=1)"}
    source += [f"    for {loop.get(counter, 'x, y in loader')}:"]
    lines = _body(draw, fault, counter, index, tail=tail, divisor=divisor, tell=tell, step=step, test=test, early=early)
    source += [f"        {line}" for line in lines]
    if tail == "after":
        scale = [] if fault in {"short window divided by N", "not divided"} else _rescale()
        rest = "pending" if counter == "pending" else "len(loader) % N"
        source += [f"    if {rest}:", *(f"        {line}" for line in [f"rest = {rest}", *scale, *step])]
    return "\n".join(source) + "\n"


def _tail(draw: random.Random, fault: str, counter: str) -> str:
    """How the rest of an epoch is dealt with."""
    if counter == "global" or fault == "phase":
        return "none"
    if counter == "pending":
        return "after"
    if fault in {"stepped inside", "backward at the boundary"}:
        return "stop"
    ways = ["or last", "after"] if fault == "short window divided by N" else ["or last", "after", "stop"]
    return draw.choice(ways)


def _test(draw: random.Random, fault: str, index: str, ends_at: str, *, counter: str) -> str:
    """The condition of the step."""
    if counter == "pending":
        return draw.choice([f"{index} == N", f"{index} >= N"])
    if fault == "phase":
        if ends_at == index:  # counts from 1
            return f"({index} + 1) % N == 0"
        return draw.choice([f"{index} % N == 0", f"{index} > 0 and {index} % N == 0"])
    if ends_at == index:
        return draw.choice([f"{index} % N == 0", f"not {index} % N"])
    return draw.choice([f"({ends_at}) % N == 0", f"{index} % N == N - 1", f"not ({ends_at}) % N"])


def _body(
    draw: random.Random,
    fault: str,
    counter: str,
    index: str,
    *,
    tail: str,
    divisor: str,
    tell: list[str],
    step: list[str],
    test: str,
    early: bool,
) -> list[str]:
    lines: list[str] = []
    before = f"{index} - 1" if counter == "from 1" else index
    if tail == "stop":
        lines += [f"if {before} >= len(loader) // N * N:", "    break"]
    if divisor == "size":
        first = f"({before})" if " " in before else before
        lines += [f"size = min(N, len(loader) - {first} // N * N)"]
    lines += ["optimizer.zero_grad()"] if fault == "cleared inside" else []
    if fault == "backward at the boundary":
        step, tell = [tell[-1], *step], tell[:-1]
    lines += tell
    own = counter in {"own", "global", "pending"}
    lines += [f"{index} += 1"] if own and early else []
    inside = [*step, *(["pending = 0"] if counter == "pending" else [])]
    if fault == "stepped inside":
        lines += inside
    elif (not own or early) and draw.random() < 0.3:
        lines += [f"if not ({test}):", "    continue", *inside]
    else:
        lines += [f"if {test}:", *(f"    {line}" for line in inside)]
    return lines + ([f"{index} += 1"] if own and not early else [])


def _rescale() -> list[str]:
    return ["for p in model.parameters():", "    p.grad *= N / rest"]


def _helpers(draw: random.Random, fault: str, divisor: str) -> tuple[list[str], list[str], list[str]]:
    """Return functions, the lines from forward to backward (backward is the last), and the lines of the step."""
    divided = "" if fault == "not divided" else f" / {divisor}"
    head: list[str] = []
    way = draw.choice(["one line", "two lines", "in place", "helper"])
    if fault == "backward at the boundary" and way == "helper":
        way = "two lines"
    if way == "helper":
        head = ["def add_gradient(x, y, divisor):", "    loss = criterion(model(x), y)"]
        head += [f"    (loss{divided and ' / divisor'}).backward()", "", ""]
        tell = [f"add_gradient(x, y, {divisor})"]
    elif way == "one line":
        tell = [f"loss = criterion(model(x), y){divided}", "loss.backward()"]
    elif way == "in place" and divided:
        tell = ["loss = criterion(model(x), y)", f"loss = loss{divided}", "loss.backward()"]
    else:
        tell = ["loss = criterion(model(x), y)", f"(loss{divided}).backward()"]
    again = ["for p in model.parameters():", "    p.grad /= N"] if fault == "divided twice" else []
    step = [*again, "optimizer.step()", "optimizer.zero_grad()"]
    if draw.random() < 0.3 and not again:
        head += ["def take_step():", *(f"    {line}" for line in step), "", ""]
        step = ["take_step()"]
    return head, tell, step


# -- the truth --------------------------------------------------------------------------------------------------------

EPOCHS = 2


class Numbered:
    """A loader of `length` microbatches of one row, which is a number that no other one of the run has."""

    def __init__(self, length: int) -> None:
        self.length, self.drawn = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.length):
            self.drawn += 1
            yield torch.tensor([self.drawn - 1]), torch.zeros(1)


class OneEach(nn.Module):
    """One parameter for each microbatch; which ones were asked for is kept."""

    def __init__(self, microbatches: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(microbatches))
        self.seen: set[int] = set()

    def forward(self, microbatch: Tensor) -> Tensor:
        self.seen.add(int(microbatch))
        return self.values[microbatch]


def weights_of(loop: Loop, microbatches: int, length: int) -> tuple[list[dict[int, float]], set[int]]:
    """Run a loop, and return the weights of the microbatches in each step, and the microbatches that were computed."""
    loader = Numbered(length)
    model = OneEach(EPOCHS * length)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    steps: list[dict[int, float]] = []

    def before(*_: Any) -> None:
        gradient = torch.zeros(1) if model.values.grad is None else model.values.grad
        steps.append({int(i): gradient[i].item() for i in gradient.nonzero().flatten()})

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(EPOCHS):
            yield from loader

    names = {
        "N": microbatches,
        "epochs": EPOCHS,
        "steps": EPOCHS * length // microbatches,
        "loader": loader,
        "batches": batches(),
        "model": model,
        "optimizer": optimizer,
        "criterion": lambda value, _: value.mean(),
    }
    handle = register_optimizer_step_pre_hook(before)
    try:
        exec(compile(loop.source, "loop", "exec"), names)  # noqa: S102 - generated above
    finally:
        handle.remove()
    return steps, model.seen


def is_right(steps: list[dict[int, float]], seen: set[int], microbatches: int, length: int) -> bool:
    """Return whether each step is the mean of a whole window, and every microbatch that was computed is in one.

    A window has N microbatches that follow one another; at the end of an epoch it may have fewer. Where windows go on
    over epochs, the last microbatches of the run may be left.
    """
    stepped = [i for step in steps for i in step]
    for step in steps:
        ids = sorted(step)
        if ids != list(range(ids[0], ids[0] + len(ids))) if ids else True:
            return False
        if any(abs(weight * len(ids) - 1) > 1e-6 for weight in step.values()):
            return False
        if len(ids) != microbatches and (len(ids) > microbatches or (ids[-1] + 1) % length):
            return False
    left = seen - set(stepped)
    across = any(min(step) // length != max(step) // length for step in steps)
    allowed = set(range(EPOCHS * length - EPOCHS * length % microbatches, EPOCHS * length)) if across else set[int]()
    return len(stepped) == len(set(stepped)) and left <= allowed
