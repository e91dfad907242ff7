"""What a check says is never luck, and what it cannot know it says; mistakes that no gradient shows are named."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb


def rows(number: int = 12) -> dict[str, Tensor]:
    torch.manual_seed(4)
    return {"x": torch.randn(number, 6), "y": torch.randint(0, 3, (number,))}


def classify(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def network(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


def kinds(found: mb.Check) -> list[str]:
    return [cause.kind for cause in found.causes]


# -- luck --------------------------------------------------------------------------------------------------------------


class Depth(nn.Module):
    """Leave out a branch for some rows, as stochastic depth does, so rarely that a batch may have none."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.branch = p, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(len(x), 1) >= self.p
        return x + self.branch(x) * kept.to(x.dtype) / (1 - self.p)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_rarely_drawn_is_not_missed_by_luck(seed: int) -> None:
    model, batch = network(Depth(0.03)), rows(8)
    torch.manual_seed(seed)
    assert kinds(mb.check(model, classify, batch, microbatch_size=3)) == ["randomness"]


class Rare(nn.Module):
    """Draw numbers that hardly ever make a difference."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(()) >= 1e-9).to(x.dtype)


def test_random_numbers_that_made_no_difference_are_said() -> None:
    found = mb.check(network(Rare()), classify, rows(), microbatch_size=4)
    assert found.ok
    assert any("random numbers are drawn (in 1)" in note for note in found.notes)
    assert mb.check(network(), classify, rows(), microbatch_size=4).notes == ()


class Attention(nn.Module):
    """Attention with a probability of dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(len(x), 1, 2, 3)
        return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=self.p).flatten(1)


@pytest.mark.parametrize(("p", "where"), [(0.0, ("1",)), (0.5, ("1", "2"))])
def test_dropout_of_nothing_is_not_random(p: float, where: tuple[str, ...]) -> None:
    found = mb.check(network(nn.Dropout(0.5), Attention(p)), classify, rows(), microbatch_size=4)
    assert [(cause.kind, cause.where) for cause in found.causes] == [("randomness", where)]


def test_a_recurrent_layer_without_dropout_is_not_random() -> None:
    found = mb.check(network(Recurrent()), classify, rows(), microbatch_size=4)
    assert (found.ok, found.notes) == (True, ())


class Recurrent(nn.Module):
    """A recurrent network over a row's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(2, 6, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x.view(len(x), 3, 2))[0][:, -1]


# -- state -------------------------------------------------------------------------------------------------------------


class Redrawn(nn.Module):
    """Turn a projection in every third forward pass, and count them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("projection", torch.eye(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 3 == 0:
            self.projection = self.projection.roll(1, 0)
        return x @ self.projection


def test_a_state_that_moves_every_few_passes_is_called_state() -> None:
    found = mb.check(network(Redrawn()), classify, rows(), microbatch_size=3)
    assert kinds(found) == ["state"]
    assert found.causes[0].where == ("1.calls",)  # which alone decides whether the next pass turns it


class Odd(tuple[int, ...]):
    """A tuple that has no length, and that cannot be compared."""

    __slots__ = ()
    __hash__ = tuple.__hash__

    def __len__(self) -> int:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        raise NotImplementedError


class Keeping(nn.Module):
    """Keep objects that cannot be compared, and depend on the other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.odd: Any = (Odd((1, 2)),)
        self.named: Any = {"odd": Odd((1,))}

    def forward(self, x: Tensor) -> Tensor:
        self.odd = Odd((3,))
        return x - x.mean(0)


def test_values_that_cannot_be_compared_are_left_out() -> None:
    found = mb.check(network(Keeping()), classify, rows(), microbatch_size=4)
    assert kinds(found) == ["coupling"]


# -- mistakes that the whole batch's loss has too ----------------------------------------------------------------------


def divided(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return classify(model, batch) / 3


def divided_in_a_term(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    out = model(batch["x"])
    return {"one": F.cross_entropy(out, batch["y"]) / 3, "other": out.square().mean()}


def divided_sum(model: nn.Module, batch: dict[str, Tensor]) -> mb.Loss:
    return mb.Loss(sum=F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum") / 3, count=len(batch["y"]))


@pytest.mark.parametrize(
    ("loss_fn", "where"), [(divided, "the loss"), (divided_in_a_term, "one"), (divided_sum, "the loss")]
)
def test_a_division_by_the_number_of_microbatches_is_named(loss_fn: Any, where: str) -> None:
    found = mb.check(network(), loss_fn, rows(), microbatch_size=4)
    assert [(cause.kind, cause.where) for cause in found.causes] == [("divided", (where,))]
    assert found.equal
    assert not found.ok


def test_a_division_by_another_number_is_a_note() -> None:
    found = mb.check(network(), divided, rows(), microbatch_size=6)
    assert found.ok
    assert any("divides it by 3" in note for note in found.notes)


def mean_by_rows(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum") / len(batch["y"])


def mean_of_terms(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(batch["x"])
    return (F.cross_entropy(out, batch["y"]) + out.square().mean() + out.abs().mean()) / 3


@pytest.mark.parametrize(("loss_fn", "size"), [(mean_by_rows, 1), (mean_of_terms, 4)])
def test_other_divisions_are_no_mistake(loss_fn: Any, size: int) -> None:
    found = mb.check(network(), loss_fn, rows(), microbatch_size=size)
    assert (found.ok, found.notes) == (True, ())


def mean_as_sum(model: nn.Module, batch: dict[str, Tensor]) -> mb.Loss:
    return mb.Loss(sum=classify(model, batch), count=len(batch["y"]))


@pytest.mark.parametrize("number", [12, 10])
def test_a_mean_given_as_a_sum_is_named(number: int) -> None:
    found = mb.check(network(), mean_as_sum, rows(number), microbatch_size=4)
    assert kinds(found) == ["counts"]
    assert "is a mean" in found.causes[0].words
