"""What an accumulator keeps from one window to the next: it is right after any change that a user makes in between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microbatch as mb
from microbatch.gradients.parameters import Trainable, first_parameter, trainable

WIDTH, ROWS = 3, 6


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()


def freeze(model: Any, optimizer: Any) -> None:
    model[0].weight.requires_grad_(False)


def thaw(model: Any, optimizer: Any) -> None:
    model[0].weight.requires_grad_(True)


def new_layer(model: Any, optimizer: Any) -> None:
    model[2] = nn.Linear(WIDTH, WIDTH).double()
    optimizer.add_param_group({"params": list(model[2].parameters())})


def new_weight(model: Any, optimizer: Any) -> None:
    model[0].bias = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))


def other_name(model: Any, optimizer: Any) -> None:
    model._modules["renamed"] = model._modules.pop("2")


def other_parameter_name(model: Any, optimizer: Any) -> None:
    model[2]._parameters["renamed"] = model[2]._parameters.pop("bias")


def other_order(model: Any, optimizer: Any) -> None:
    model[0], model[2] = model[2], model[0]


def tied(model: Any, optimizer: Any) -> None:
    model[0].weight = model[2].weight


def outside(model: Any, optimizer: Any) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones((), dtype=torch.float64))]})


def unheld(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].pop()


CHANGES = [
    freeze,
    thaw,
    new_layer,
    new_weight,
    other_name,
    other_parameter_name,
    other_order,
    tied,
    outside,
    unheld,
]


def told(found: Any) -> list[tuple[str, int, bool]]:
    return [(each.name, id(each.parameter), each.held) for each in found]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", [None, freeze])
def test_parameters_are_listed_again_after_any_change(change: Callable[..., None], before: Any) -> None:
    model = network()
    optimizer, kept = torch.optim.SGD(model.parameters(), lr=0.1), Trainable()
    if before is not None:
        before(model, optimizer)
    first = kept(model, [optimizer], list(model.modules()))
    assert kept(model, [optimizer], list(model.modules())) is first  # nothing has changed
    assert told(first) == told(trainable(model, [optimizer]))
    change(model, optimizer)
    assert told(kept(model, [optimizer], list(model.modules()))) == told(trainable(model, [optimizer]))
    assert first_parameter(model) is next(model.parameters())


def test_a_layer_that_moves_into_the_one_before_it_has_another_name() -> None:
    model: Any = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    kept = Trainable()
    assert [each.name for each in kept(model, [], list(model.modules()))] == ["1.weight", "1.bias"]
    key = list(model._modules)[1]
    model[0].add_module(key, model._modules.pop(key))  # the same modules, parameters and names, in the same order
    assert [each.name for each in kept(model, [], list(model.modules()))] == ["0.1.weight", "0.1.bias"]


def mean(model: Any, x: Tensor) -> Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize("change", [freeze, new_layer, tied])
def test_the_step_after_a_change_is_that_of_plain_torch(change: Callable[..., None]) -> None:
    results = list[dict[str, Tensor]]()
    for plain in (True, False):
        model, batch = network(), torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        accumulator = mb.Accumulator(model, optimizer, microbatch_size=2)
        for step in range(3):
            if step == 1:
                torch.manual_seed(1)
                change(model, optimizer)
            if plain:
                optimizer.zero_grad()
                mean(model, batch).backward()
                optimizer.step()
            else:
                accumulator.step(batch, mean)
        results.append({name: value.detach() for name, value in model.named_parameters()})
    theirs, ours = results
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-14)


def test_a_state_that_is_loaded_after_a_step_counts() -> None:
    model = network()
    accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
    batch = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    assert accumulator.step(batch, mean).index == 0
    accumulator.load_state_dict(accumulator.state_dict() | {"windows": 7})
    assert accumulator.step(batch, mean).index == 7
    assert accumulator.gradient(batch, mean).index == 8


class Counted(torch.optim.SGD):
    """Count the calls of a `zero_grad` of its own."""

    calls = 0

    def zero_grad(self, *arguments: Any, **options: Any) -> None:
        self.calls += 1
        super().zero_grad(*arguments, **options)


def test_zero_grad_of_an_optimizer_of_ones_own_is_called() -> None:
    model, batch = network(), torch.ones(ROWS, WIDTH, dtype=torch.float64)
    optimizer = Counted(model.parameters(), lr=0.1)
    mb.Accumulator(model, optimizer, microbatch_size=2).step(batch, mean)
    assert optimizer.calls == 1
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = list[bool]()
    plain.zero_grad = lambda set_to_none=True: calls.append(set_to_none)
    mb.Accumulator(model, plain, microbatch_size=2).step(batch, mean)
    assert len(calls) == 1


def test_the_gradient_of_a_frozen_parameter_is_zeroed_as_torch_does() -> None:
    model, batch = network(), torch.ones(ROWS, WIDTH, dtype=torch.float64)
    model[0].weight.grad = torch.ones(WIDTH, WIDTH, dtype=torch.float64)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mb.Accumulator(model, optimizer, microbatch_size=2).step(batch, mean)
    assert model[0].weight.grad is None
    torch.testing.assert_close(model[0].weight.detach(), before - 0.1)  # its old gradient was applied, as torch does


def test_the_norm_has_no_graph_even_if_a_gradient_has_one() -> None:
    model, batch = network(), torch.ones(ROWS, WIDTH, dtype=torch.float64)

    def with_graph(parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.enable_grad():
            parameter.grad = parameter.grad * parameter

    model.register_parameter("own", nn.Parameter(torch.ones((), dtype=torch.float64)))
    own: Any = model.own
    own.register_post_accumulate_grad_hook(with_graph)
    accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=ROWS)
    assert not accumulator.step(batch, lambda model, x: mean(model, x) * own).grad_norm.requires_grad
