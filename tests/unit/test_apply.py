"""An optimizer that runs out of memory: tried once more while nothing is written, and never half a step in silence."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microbatch as mb
from microbatch.errors import OutOfMemoryError

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Greedy(torch.optim.SGD):
    """Run out of memory in some steps: before or after writing its state, or a weight."""

    def __init__(self, parameters: Any, *, fails: dict[int, str]) -> None:
        super().__init__(parameters, lr=0.5)
        self.fails, self.calls = fails, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        where, self.calls = self.fails.get(self.calls, ""), self.calls + 1
        parameters = [each for group in self.param_groups for each in group["params"]]
        if where == "before":
            raise FULL
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["seen"] = torch.zeros(())
            if where == "made":
                raise FULL
            state["seen"] += 1
            if where == "state":
                raise FULL
            state["sum"] = state.get("sum", 0.0) + parameter.grad
            parameter.sub_(parameter.grad, alpha=0.5)
            if where == "weights":
                raise FULL
        return None


def fit(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mean()


def setup(fails: dict[int, str], **settings: Any) -> tuple[nn.Module, Greedy, mb.Accumulator]:
    torch.manual_seed(3)
    model = nn.Linear(4, 1)
    optimizer = Greedy(model.parameters(), fails=fails)
    return model, optimizer, mb.Accumulator(model, optimizer, microbatch_size=2, **settings)


@pytest.mark.parametrize("fails", [{0: "before"}, {0: "made"}, {0: "state"}, {2: "before"}, {0: "before", 3: "before"}])
def test_it_is_tried_once_more_while_nothing_is_written(fails: dict[int, str]) -> None:
    # In the first step all state is new, and can be taken away again.
    (model, optimizer, it), (twin, other, calm) = setup(fails), setup({})
    for _ in range(3):
        batch = torch.randn(4, 4)
        step, theirs = it.step(batch, fit), calm.step(batch, fit)
        assert (step.retries, step.microbatch_size) == (0, theirs.microbatch_size)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    ours = [value for state in optimizer.state.values() for value in state.values()]
    assert all(map(torch.equal, ours, [value for state in other.state.values() for value in state.values()]))
    assert optimizer.calls == 3 + len(fails)


@pytest.mark.parametrize(("fails", "calls"), [({1: "weights"}, 2), ({1: "state"}, 2), ({0: "weights"}, 1)])
def test_once_it_has_written_there_is_one_clear_error(fails: dict[int, str], calls: int) -> None:
    model, optimizer, it = setup(fails)
    batch = torch.randn(4, 4)
    for _ in range(calls - 1):
        it.step(batch, fit)
    with pytest.raises(OutOfMemoryError, match=r"weights may be partly updated.*checkpoint") as caught:
        it.step(batch, fit)
    assert optimizer.calls == calls
    assert "Greedy.step()" in str(caught.value)
    assert it.state_dict()["size"]["sizing"]["halvings"] == 0  # a smaller microbatch would not help
    assert all(parameter.grad is None for parameter in model.parameters())


def test_twice_in_a_row_is_an_error_and_no_weight_has_changed() -> None:
    model, optimizer, it = setup({0: "made", 1: "before"})
    before = [each.detach().clone() for each in model.parameters()]
    with pytest.raises(OutOfMemoryError, match="no weight was changed"):
        it.step(torch.randn(4, 4), fit)
    assert all(map(torch.equal, before, model.parameters()))
    assert not optimizer.state
    assert it.step(torch.randn(4, 4), fit).applied


def test_a_scalers_step_is_tried_once_more_too() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    (model, _, it), (twin, _, calm) = setup({0: "before"}, grad_scaler=scaler), setup({})
    batch = torch.randn(4, 4)
    assert it.step(batch, fit).applied
    calm.step(batch, fit)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("watched", [None, "1 GiB"])
def test_writes_by_lists_are_seen_under_the_meter(watched: str | None) -> None:
    class Lists(Greedy):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            parameters = [each for group in self.param_groups for each in group["params"]]
            torch._foreach_sub_(parameters, [each.grad for each in parameters])  # pyright: ignore[reportPrivateImportUsage]
            raise FULL

    model = nn.Linear(4, 1)
    it = mb.Accumulator(model, Lists(model.parameters(), fails={}), microbatch_size=2, memory_budget=watched)
    with pytest.raises(OutOfMemoryError, match="partly updated"):
        it.step(torch.randn(4, 4), fit)


def test_in_a_hand_written_window_the_next_one_is_not_smaller_for_it() -> None:
    model, _, it = setup({0: "weights"})

    def loop() -> None:
        with it.window() as window:
            for microbatch in window.split(torch.ones(4, 4)):
                window.backward(fit(model, microbatch))

    with pytest.raises(OutOfMemoryError, match="partly updated"):
        loop()
    assert it.state_dict()["size"]["sizing"]["halvings"] == 0
