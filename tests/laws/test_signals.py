"""A time limit of the user's own: the error of its signal handler reaches the caller, wherever it comes."""

import functools
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb
from microbatch.memory.signal_errors import is_from_signal, suppress_errors


class TimeIsUpError(Exception):
    """What the user's handler raises."""


def handler(_signal: int, _frame: FrameType | None) -> None:
    raise TimeIsUpError


class Handler:
    """A handler that is a method, or an object that can be called."""

    def method(self, _signal: int, _frame: FrameType | None) -> None:
        raise TimeIsUpError

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        raise TimeIsUpError


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, handler)
    yield
    signal.signal(signal.SIGUSR1, before)


class Timed:
    """A loss function whose time is up at one of its calls."""

    def __init__(self, last: int) -> None:
        self.calls, self.last = 0, last

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        if self.calls == self.last:
            signal.raise_signal(signal.SIGUSR1)
        return F.mse_loss(model(batch["x"]), batch["y"])

    def __deepcopy__(self, memo: object) -> "Timed":
        return self  # so that a dry run's calls count too


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*blocks, nn.Linear(8, 1))


def step(loss_fn: Any, **settings: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mb.Accumulator(model, optimizer, **settings).step(batch(), loss_fn)


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(16, 8), "y": torch.randn(16, 1)}


def planned(loss_fn: Any) -> None:
    model = network()
    mb.plan(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn, batch=batch())


def checked(loss_fn: Any) -> None:
    mb.check(network(), loss_fn, batch(), microbatch_size=5)


WAYS: dict[str, Callable[[Any], None]] = {
    "checkpoints": functools.partial(step, microbatch_size=4, checkpoint="auto", memory_budget="40 KiB"),
    "plan": planned,
    "check": checked,
}


@pytest.mark.parametrize("way", WAYS)
def test_time_is_up_at_whichever_call(way: str) -> None:
    calls = Timed(0)
    WAYS[way](calls)
    assert calls.calls > 4  # more than the step's own
    for last in sorted({1, 2, 3, calls.calls // 3, calls.calls // 2, calls.calls}):
        timed = Timed(last)
        try:
            WAYS[way](timed)
        except TimeIsUpError:
            continue
        # a plan measures times, and these decide how many calls it makes: this one may have ended before the last
        assert way == "plan"
        assert last > 3
        assert timed.calls < last


@pytest.mark.parametrize("kind", ["function", "method", "object", "partial"])
def test_handlers_of_every_kind_are_recognised(kind: str) -> None:
    made: dict[str, Any] = {
        "function": handler,
        "method": Handler().method,
        "object": Handler(),
        "partial": functools.partial(handler),
    }
    signal.signal(signal.SIGUSR1, made[kind])
    with pytest.raises(TimeIsUpError) as caught, suppress_errors():
        signal.raise_signal(signal.SIGUSR1)
    assert is_from_signal(caught.value)
    with pytest.raises(KeyError) as wrapped, suppress_errors():
        wrap(caught.value)
    assert is_from_signal(wrapped.value)


def wrap(error: Exception) -> None:
    raise KeyError("another one") from error


def test_other_errors_are_not_taken_for_a_handlers() -> None:
    with suppress_errors():
        raise TimeIsUpError
    with pytest.raises(TimeIsUpError) as caught:
        raise TimeIsUpError
    assert not is_from_signal(caught.value)
