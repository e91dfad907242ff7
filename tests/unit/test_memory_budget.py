"""Which windows are watched under the default budget, and what is said of a budget that was passed."""

import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import microbatch as mb
from microbatch.errors import OutOfMemoryError
from microbatch.step.cutting import Cut
from microbatch.step.events import SizeChanged
from microbatch.step.parts import memory_budget
from microbatch.step.size.microbatch_size import adapt
from microbatch.step.size.sizing import PATIENCE, Sizing


def accumulator(size: int | str = 4, *, model: nn.Module | None = None, **settings: Any) -> mb.Accumulator:
    model = model or nn.Linear(8, 8)
    optimizer = settings.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=0.01)
    return mb.Accumulator(model, optimizer, microbatch_size=size, **settings)


def fit(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def watched(it: mb.Accumulator, *shapes: tuple[int, ...]) -> list[bool]:
    """Take a step for each shape, and tell which of them were."""
    return [it.step(torch.randn(shape), fit).peak_bytes is not None for shape in shapes]


# -- by default -------------------------------------------------------------------------------------------------------


def test_the_first_two_windows_are_watched_and_then_larger_ones() -> None:
    it = accumulator()
    assert watched(it, (8, 8), (8, 8), (8, 8), (64, 8), (3, 8)) == [True, True, False, False, False]
    assert watched(it, (8, 3, 8), (8, 3, 8), (8, 2, 8)) == [True, False, False]  # longer rows
    assert watched(it, (2, 5, 8), (2, 5, 8), (4, 5, 8), (4, 5, 8)) == [True, False, True, False]


def test_the_first_window_with_the_optimizers_state_is_watched_where_only_one_would_be() -> None:
    stateful = accumulator("auto", optimizer=torch.optim.AdamW)
    peaks = [stateful.step(torch.randn(1, 500, 8), fit).peak_bytes for _ in range(3)]
    weights = (8 * 8 + 8) * 4
    assert peaks[0] is not None
    assert peaks[1] is not None
    assert peaks[1] >= peaks[0] + 2 * weights
    assert peaks[2] is None
    assert watched(accumulator("auto"), (1, 8), (1, 8)) == [True, False]


def test_larger_microbatches_are_watched_also_by_length() -> None:
    it = mb.Accumulator(
        model := nn.Embedding(5, 4), torch.optim.SGD(model.parameters()), microbatch_size=2, lengths="mask"
    )

    def per_token(model: nn.Module, batch: dict[str, Tensor]) -> mb.Loss:
        found = model(batch["tokens"]).square().mean(2) * batch["mask"]
        return mb.Loss(sum=found.sum(), count=batch["mask"].sum())

    def step(*lengths: int) -> bool:
        mask = torch.arange(8) < torch.tensor(lengths).unsqueeze(1)
        batch = {"tokens": torch.ones(len(lengths), 8, dtype=torch.long) * mask, "mask": mask}
        return it.step(batch, per_token).peak_bytes is not None

    assert [step(4, 3, 2), step(4, 3, 2), step(3, 3, 3), step(5, 3, 2), step(5, 5, 5), step(5, 4, 3)] == [
        True,
        True,
        False,
        True,
        True,
        False,
    ]


def test_nobody_watches_where_the_user_wants_no_limit() -> None:
    assert watched(accumulator(memory_budget="none"), (8, 8), (8, 8), (64, 9, 8)) == [False] * 3


def test_a_budget_that_was_given_is_watched_where_memory_may_grow_and_checked_now_and_then() -> None:
    it = accumulator(memory_budget="1 GiB")
    assert watched(it, *[(8, 8)] * 20) == [True, True, *[False] * 14, True, *[False] * 3]
    assert watched(it, (8, 2, 8), (8, 2, 8), (9, 8), (9, 8)) == [True, False, True, False]


def test_a_budget_that_was_given_is_always_watched_where_the_sizes_are_not_known() -> None:
    model = nn.Linear(8, 8)
    it = accumulator(model=model, memory_budget="1 GiB")
    for _ in range(4):
        with it.window() as window:
            window.backward(fit(model, torch.randn(4, 8)), count=4)
        assert window.step.peak_bytes is not None


def test_the_default_is_what_is_there_beside_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "available_bytes", lambda device: 65_536)
    batch = torch.randn(64, 50, 8)  # 100 KiB that are in use already, and no concern of the budget's
    step = accumulator(64).step(batch, fit)
    assert step.microbatch_size < 64
    assert step.peak_bytes is not None
    assert 102_400 < step.peak_bytes <= 102_400 + 288 + 65_536


def test_what_fitted_is_watched_again_once_memory_ran_out() -> None:
    it = accumulator(8)
    assert watched(it, (8, 8), (8, 8), (8, 8)) == [True, True, False]
    calls: list[int] = []

    def once(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return fit(model, x)

    assert it.step(torch.randn(8, 8), once).peak_bytes is not None
    assert calls == [8, 4, 4]
    grown = [it.step(torch.randn(8, 8), fit) for _ in range(PATIENCE)]
    assert [(step.microbatch_size, step.peak_bytes is not None) for step in grown[-2:]] == [(4, False), (8, True)]


def test_the_processes_of_a_machine_share_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "available_bytes", lambda device: 4_000_000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return fit(model, x) * torch.ones(300_000).mean()

    with pytest.raises(OutOfMemoryError):
        accumulator().step(torch.randn(4, 8), loss_fn)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert accumulator().step(torch.randn(4, 8), loss_fn).applied


def test_where_nothing_tells_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "available_bytes", lambda device: None)
    assert watched(accumulator(), (8, 8)) == [False]


def test_fake_tensors_may_be_as_large_as_they_like() -> None:
    with FakeTensorMode():
        model = nn.Linear(1 << 20, 1 << 20)  # 4 TiB
        it = accumulator(model=model)
        with suppress(KeyError), it.window():
            assert it._it.budget.budget is None
            raise KeyError  # what is fake has no step to take


COMPILED_INSIDE = """
import torch
import microbatch as mb

graphs = []


def backend(graph, _):
    graphs.append(1)
    return graph.forward


inner = torch.compile(lambda x: x.square() + 1, backend=backend)
model = torch.nn.Linear(8, 8)
accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=8)
for _ in range(4):
    accumulator.step(torch.randn(8, 8), lambda model, x: inner(model(x)).mean())
    print(len(graphs))
"""


def test_what_is_compiled_inside_is_compiled_after_the_watched_windows() -> None:
    # In a Python of its own: what else was compiled in this one decides on what the compiler still takes on.
    run = subprocess.run([sys.executable, "-c", COMPILED_INSIDE], capture_output=True, text=True, check=True)
    counted = [int(line) for line in run.stdout.split()]
    assert counted[1] == 0
    assert counted[2] > 0


# -- passed where nothing can be refused ------------------------------------------------------------------------------


def needs(optimizer: Any) -> int:
    peak = accumulator(2, memory_budget="1 GiB", model=nn.Linear(64, 64), optimizer=optimizer)
    told = peak.step(torch.randn(2, 64), fit).peak_bytes
    assert told is not None
    return told


class OfOnesOwn(torch.optim.AdamW):
    """An optimizer whose state nobody knows before its first step."""


def test_a_budget_passed_inside_the_optimizer_is_told_and_the_step_is_whole() -> None:
    events: list[Any] = []
    budget = needs(torch.optim.SGD)
    models = [nn.Linear(64, 64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batch = torch.randn(2, 64)
    limited = accumulator(2, model=models[0], optimizer=OfOnesOwn, memory_budget=budget, listeners=[events.append])
    free = accumulator(2, model=models[1], optimizer=torch.optim.AdamW, memory_budget="none")
    step, _ = limited.step(batch, fit), free.step(batch, fit)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    (told,) = [event for event in events if isinstance(event, mb.BudgetPassed)]
    assert (told.step, told.peak_bytes, told.budget) == (0, step.peak_bytes, budget)
    assert told.peak_bytes > budget


def test_a_warning_that_is_an_error_comes_after_a_whole_step() -> None:
    model = nn.Linear(64, 64)
    it = accumulator(2, model=model, optimizer=OfOnesOwn, memory_budget=needs(torch.optim.SGD))
    before = model.weight.detach().clone()
    with pytest.raises(UserWarning, match="inside the optimizer"):
        it.step(torch.randn(2, 64), fit)
    assert not torch.equal(model.weight, before)
    assert it.state_dict()["windows"] == 1


def test_without_listeners_there_is_one_warning() -> None:
    it = accumulator(2, model=nn.Linear(64, 64), optimizer=OfOnesOwn, memory_budget=needs(torch.optim.SGD))
    with pytest.warns(UserWarning, match="inside the optimizer"):
        it.step(torch.randn(2, 64), fit)


# -- too tight --------------------------------------------------------------------------------------------------------

ROOMY = Cut(allowed=8, used=8, rows=8, row_bytes=1.0, bytes=8.0)


def test_an_allocator_that_has_to_ask_again_makes_the_next_window_smaller() -> None:
    sizing, cut = Sizing(asked=8), ROOMY
    assert adapt(sizing, cut, step=3, retries=0) == []
    (event,) = adapt(sizing, cut, step=4, retries=2)
    assert isinstance(event, SizeChanged)
    assert (event.step, event.before, event.after) == (4, 8, 4)
    assert "2 times" in event.reason
    assert sizing.rows == 4


def test_one_row_cannot_be_made_less() -> None:
    sizing, cut = Sizing(asked=8, halvings=3), replace(ROOMY, used=1, rows=1)
    assert adapt(sizing, cut, step=0, retries=2) == []
    assert sizing.rows == 1


@pytest.mark.cuda
def test_thrashing_on_a_device_is_seen() -> None:
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)]).cuda()
    it = mb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.0), microbatch_size=4096, memory_budget="400 MiB"
    )
    steps = [it.step(torch.randn(8192, 1024), fit) for _ in range(3)]
    assert steps[-1].microbatch_size < 4096
    assert all(step.peak_bytes is not None and step.peak_bytes <= 400 * 1024**2 for step in steps)
