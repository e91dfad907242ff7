"""What listeners are told, in which order, and that telling them changes nothing."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from microbatch.loss.loss import Loss
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import Event, MicrobatchDone, StepDone


def setup(listeners: list[Any], **settings: Any) -> tuple[nn.Module, Accumulator]:
    torch.manual_seed(3)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, Accumulator(model, optimizer, microbatch_size=3, listeners=listeners, **settings)


def mean(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) ** 2).mean()


def test_a_step_tells_each_microbatch_in_order_and_then_itself() -> None:
    events: list[Event] = []
    _, accumulator = setup([events.append])
    steps = [accumulator.step(torch.randn(7, 2), mean) for _ in range(2)]
    expected: list[Event] = []
    for number, step in enumerate(steps):
        expected += [
            MicrobatchDone(step=number, index=index, microbatches=3, rows=rows) for index, rows in enumerate([3, 3, 1])
        ]
        expected.append(StepDone(step=step))
    assert events == expected
    assert [step.index for step in steps] == [0, 1]


def test_every_listener_is_told_before_the_next_thing_happens() -> None:
    order: list[str] = []

    def first(_: Event) -> None:
        order.append("first")

    def second(_: Event) -> None:
        order.append("second")

    _, accumulator = setup([first, second])

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        order.append("loss")
        return mean(model, x)

    accumulator.step(torch.randn(4, 2), loss_fn)
    assert order == ["loss", "first", "second"] * 2 + ["first", "second"]


def test_a_window_tells_what_is_known() -> None:
    events: list[Event] = []
    model, accumulator = setup([events.append])
    with accumulator.window() as window:
        window.backward(mean(model, torch.ones(2, 2)), count=2)
        window.backward(Loss(sum=model(torch.ones(2, 2)).sum(), count=2))
        for microbatch in window.split(torch.ones(4, 2)):
            window.backward(mean(model, microbatch))
    assert events[:-1] == [
        MicrobatchDone(step=0, index=0, microbatches=None, rows=2),
        MicrobatchDone(step=0, index=1, microbatches=None, rows=None),
        MicrobatchDone(step=0, index=2, microbatches=4, rows=3),
        MicrobatchDone(step=0, index=3, microbatches=4, rows=1),
    ]
    assert events[-1] == StepDone(step=window.step)


def test_windows_over_a_loader_tell_the_short_last_one() -> None:
    events: list[Event] = []
    model, accumulator = setup([events.append])
    for window in accumulator.windows([torch.ones(2, 2)] * 5, microbatches=3):
        for microbatch in window:
            window.backward(mean(model, microbatch))
    told = [(e.step, e.index, e.microbatches, e.rows) for e in events if isinstance(e, MicrobatchDone)]
    assert told == [(0, 0, 3, 2), (0, 1, 3, 2), (0, 2, 3, 2), (1, 0, 2, 2), (1, 1, 2, 2)]
    assert [type(e) for e in events].count(StepDone) == 2
    assert isinstance(events[3], StepDone)
    assert isinstance(events[-1], StepDone)


def test_the_step_has_been_taken_when_it_is_told() -> None:
    seen: list[Tensor] = []
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)

    def listener(event: Event) -> None:
        seen.append(model.weight.detach().clone().flatten()[0])

    accumulator = Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.5), microbatch_size=1, listeners=[listener]
    )
    accumulator.step(torch.ones(2, 1), lambda model, x: model(x).mean())
    assert [weight.item() for weight in seen] == [1.0, 1.0, 0.5]


def test_a_microbatch_that_contributes_nothing_is_told_too() -> None:
    events: list[Event] = []
    _, accumulator = setup([events.append])
    accumulator.step(torch.randn(7, 2), lambda model, x: mean(model, x) if len(x) == 1 else None)
    assert [type(event) for event in events] == [MicrobatchDone] * 3 + [StepDone]


def test_a_dropped_window_is_told_as_one() -> None:
    events: list[Event] = []
    _, accumulator = setup([events.append], nonfinite="skip")
    accumulator.step(torch.full((2, 2), float("nan")), mean)
    step = events[-1]
    assert isinstance(step, StepDone)
    assert not step.step.applied
    assert [type(event) for event in events].count(StepDone) == 1


@pytest.mark.parametrize("bad", [0, 1])
def test_a_window_that_failed_tells_no_step(bad: int) -> None:
    events: list[Event] = []
    _, accumulator = setup([events.append])

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        if len(events) == bad:
            raise ValueError("mine")
        return mean(model, x)

    with pytest.raises(ValueError, match="mine"):
        accumulator.step(torch.randn(7, 2), loss_fn)
    assert events == [MicrobatchDone(step=0, index=index, microbatches=3, rows=3) for index in range(bad)]


def test_looking_for_the_microbatch_at_fault_tells_nothing_twice() -> None:
    events: list[Event] = []
    _, accumulator = setup([events.append])

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - the signature is autograd's
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> Any:  # noqa: ARG004 - likewise
            return grad_outputs[0] * float("nan")

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        return (Poison.apply(y) if len(x) == 1 else y).mean()

    with pytest.raises(ArithmeticError, match="microbatch 2"):
        accumulator.step(torch.randn(7, 2), loss_fn)
    assert [event.index for event in events if isinstance(event, MicrobatchDone)] == [0, 1, 2]
    assert len(events) == 3


@given(rows=st.integers(1, 12))
def test_listeners_do_not_change_the_result(rows: int) -> None:
    batch = torch.randn(rows, 2)
    seen: list[Event] = []

    def busy(event: Event) -> None:
        seen.append(event)
        with torch.no_grad():  # a validation, say
            watched(batch)
        if isinstance(event, StepDone):
            event.step.loss.item()

    watched, accumulator = setup([busy])
    alone, quiet = setup([])
    ours, theirs = accumulator.step(batch, mean), quiet.step(batch, mean)
    assert torch.equal(ours.loss, theirs.loss)
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(seen) == -(-rows // 3) + 1


def test_what_listeners_are_given_cannot_be_written_to() -> None:
    events: list[Event] = []
    _, accumulator = setup([events.append])
    accumulator.step(torch.randn(2, 2), mean)
    for event in events:
        with pytest.raises(AttributeError):
            event.step = None  # type: ignore[misc, assignment]
        assert copy.copy(event) == event


def test_a_list_of_listeners_that_grows_later_changes_nothing() -> None:
    listeners: list[Any] = []
    events: list[Event] = []
    _, accumulator = setup(listeners)
    listeners.append(events.append)
    accumulator.step(torch.randn(2, 2), mean)
    assert events == []
