"""A function mode that is off in modules: what it sees, and that it is never lost or left behind."""

import copy
import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from microbatch.gradients.paused_mode import enter_outside, parts_without


class Seen(TorchFunctionMode):
    """Record the names of the functions that pass through."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def layers(*more: nn.Module) -> Any:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), *more)


class Fails(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


class Net(nn.Module):
    def __init__(self, *more: nn.Module) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 4)
        self.blocks: Any = nn.ModuleList([layers(*more), layers(*more)])
        self.head = nn.Linear(4, 16)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x).exp()


def run(model: Net, mode: TorchFunctionMode) -> torch.Tensor:
    with ExitStack() as stack:
        enter_outside(mode, parts_without(model, {id(model.table.weight)}), stack)
        return model(torch.arange(4)).sum()


def test_sees_only_calls_outside_of_the_modules() -> None:
    seen = Seen()
    model = Net()
    run(model, seen).backward()
    assert seen.names == ["arange", "embedding", "linear", "exp", "sum"]
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_parts_are_the_largest_that_run() -> None:
    model: Any = Net()
    table = {id(model.table.weight)}
    assert parts_without(model, table) == list(model.blocks)  # a ModuleList does not run
    assert parts_without(model, {id(model.blocks[1][0].weight)}) == [model.blocks[0]]
    assert parts_without(model, set()) == [model]
    model.loss = nn.Sequential(*(nn.ReLU() for _ in range(4)))  # without parameters, it may be a loss
    model.again, model.blocks[0].scripted = model.blocks[0], torch.jit.script(layers())
    model.blocks[0].owner = [model]
    assert parts_without(model, table) == list(model.blocks)
    model.head.add_module("circle", model)
    assert parts_without(model, table) == list(model.blocks)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_inside_leaves_other_modes_as_they_were(error: type[BaseException]) -> None:
    with Seen() as outer:
        with pytest.raises(error):
            run(Net(Fails(error)), Seen())
        assert _get_current_function_mode_stack() == [outer]
    assert not _get_current_function_mode_stack()


def test_error_that_the_model_catches_turns_the_mode_on_again() -> None:
    class Forgives(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            try:
                return super().forward(ids)
            except ValueError:
                return self.table.weight.exp()

    seen = Seen()
    run(Forgives(Fails(ValueError)), seen)
    assert seen.names[:2] == ["arange", "embedding"]
    assert seen.names[-2:] == ["exp", "sum"]


def test_another_hook_that_raises_first_is_no_second_error(recwarn: pytest.WarningsRecorder) -> None:
    def fail(*_: object) -> None:
        raise ValueError("first")

    model, seen = Net(), Seen()
    with ExitStack() as stack:
        enter_outside(seen, parts_without(model, {id(model.table.weight)}), stack)
        model.blocks[0].register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(ValueError, match="first"):
            model(torch.arange(4))
        assert _get_current_function_mode_stack() == [seen]
    assert not recwarn.list


def test_mode_on_top_stays() -> None:
    class Inner(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            with Seen() as self.on_top:
                return super().forward(ids)

    seen, model = Seen(), Inner()
    run(model, seen)
    assert model.on_top.names.count("linear") == 5
    assert seen.names.count("linear") == 5


def test_threads_and_copies() -> None:
    seen = Seen()
    model = Net()

    class Elsewhere(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: list[Any] = []

            def work() -> None:
                copied = copy.deepcopy(model.blocks[0])
                found.append(copied(x.detach()))
                found.append(_get_current_function_mode_stack())

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert found[1] == []
            return x + found[0]

    model.blocks[1].append(Elsewhere())
    run(model, seen)
    assert seen.names == ["arange", "embedding", "linear", "exp", "sum"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_compute_again(*, reentrant: bool) -> None:
    class Again(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x).exp()

    torch.manual_seed(0)
    model: Any = Again()
    plain = copy.deepcopy(model)
    plain(torch.arange(4)).sum().backward()
    with ExitStack() as stack:
        enter_outside(Seen(), parts_without(model, {id(model.table.weight)}), stack)
        model(torch.arange(4)).sum().backward()
        assert len(_get_current_function_mode_stack()) == 1
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_fused_window_rests_in_small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microbatch.gradients.fused_matmul.SMALLEST", 64)
    monkeypatch.setattr("microbatch.step.parts.fused.has_compiled", lambda _: False)  # other tests may have
    torch.manual_seed(0)
    model: Any = Net().double()
    plain = copy.deepcopy(model)
    hooks: list[int] = []

    def loss_fn(model: Any, ids: torch.Tensor) -> torch.Tensor:
        hooks.append(sum(len(each._forward_hooks) for each in model.modules()))
        return nn.functional.cross_entropy(model(ids), ids)

    accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
    fused: list[int] = []
    for _ in range(5):
        fused.append(accumulator.step(torch.arange(6), loss_fn).fused)
        loss_fn(plain, torch.arange(6)).backward()
        with torch.no_grad():
            for each in plain.parameters():
                each.sub_(0.1 * each.grad)
                each.grad = None
    assert fused == [1] * 5
    assert hooks == [0, 0, 0, 0] * 3 + [2, 2, 2, 0] * 2
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_are_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr("microbatch.gradients.fused_matmul.SMALLEST", 64)
    torch._dynamo.reset()
    counters.clear()
    model = Net()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
    outer = nn.Sequential(model)
    accumulator = mb.Accumulator(outer, torch.optim.SGD(outer.parameters(), lr=0.1), microbatch_size=2)
    made = []
    for _ in range(6):
        accumulator.step(torch.arange(6), lambda model, ids: model(ids).mean())
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] == 0  # a meter is on
    assert made[2:] == [1] * 4
