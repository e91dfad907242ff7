"""A hand-written loss that compares the rows of one microbatch is warned of, and a classifier's loss is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb

BATCH = {
    "a": torch.randn(12, 6, generator=torch.Generator().manual_seed(0)),
    "b": torch.randn(12, 6, generator=torch.Generator().manual_seed(1)),
    "y": torch.arange(12) % 4,
}


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)
        self.prototypes = nn.Parameter(torch.randn(4, 5))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return F.normalize(self.a(batch["a"]), dim=1), F.normalize(self.b(batch["b"]), dim=1)


def one_way(model: Any, batch: Any) -> Tensor:
    a, b = model(batch)
    return F.cross_entropy(a @ b.T, torch.arange(len(a)))


def both_ways(model: Any, batch: Any) -> Tensor:
    a, b = model(batch)
    similar, own = model.scale.exp() * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2


def with_negatives(model: Any, batch: Any) -> Tensor:
    a, b = model(batch)
    return F.cross_entropy(a @ torch.cat([b, b.flip(1)]).T / 0.1, torch.arange(len(a)))


def two_views(model: Any, batch: Any) -> Tensor:
    z, n = torch.cat(model(batch)), len(batch["a"])
    similar = z @ z.T - 1e9 * torch.eye(2 * n)
    return F.cross_entropy(similar, torch.cat([torch.arange(n, 2 * n), torch.arange(n)]))


def einsum(model: Any, batch: Any) -> Tensor:
    a, b = model(batch)
    return F.cross_entropy(torch.einsum("nd,md->nm", a, b), torch.arange(len(a)), label_smoothing=0.1)


def classifier(model: Any, batch: Any) -> Tensor:
    """Four classes, and in each microbatch of four rows each of them once, in order."""
    return F.cross_entropy(model.head(model(batch)[0]), batch["y"])


def cosine_classifier(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(10 * model(batch)[0] @ F.normalize(model.prototypes, dim=1).T, batch["y"])


def orthogonal_classifier(model: Any, batch: Any) -> Tensor:
    """The weights of the classes are themselves a product."""
    return F.cross_entropy(model(batch)[0] @ (model.prototypes @ model.a.weight[:, :5]).T, batch["y"].flip(0))


def fixed_classes(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(10 * model(batch)[0] @ torch.eye(4, 5).T, batch["y"])


def within_a_row(model: Any, batch: Any) -> Tensor:
    """Compare the parts of each row alone, as a pointer network does."""
    a, b = (each.view(len(each), 5, 1) for each in model(batch))
    return F.cross_entropy((a @ b.mT).flatten(0, 1), torch.arange(5).repeat(len(a)))


def take(loss: Callable[[Any, Any], Tensor], size: int = 4) -> None:
    model = Towers()
    it = mb.Accumulator(model, mb_optimizer(model), microbatch_size=size)
    for _ in range(3):
        it.step(BATCH, loss)  # pytest turns an unexpected warning into an error


def mb_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


@pytest.mark.parametrize("loss", [one_way, both_ways, with_negatives, two_views, einsum])
@pytest.mark.parametrize("size", [3, 4, 5])
def test_a_loss_over_the_microbatchs_own_rows_is_warned_of_once(loss: Any, size: int) -> None:
    with pytest.warns(mb.MicrobatchWarning, match="compares the samples of one microbatch") as caught:
        take(loss, size)
    assert [each.category for each in caught].count(mb.MicrobatchWarning) == 1


@pytest.mark.parametrize("loss", [classifier, cosine_classifier, orthogonal_classifier, fixed_classes, within_a_row])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_classifier_is_silent_even_where_its_labels_look_alike(loss: Any, size: int) -> None:
    take(loss, size)


@pytest.mark.parametrize("loss", [one_way, both_ways])
def test_the_whole_batch_or_encode_is_silent(loss: Any) -> None:
    take(loss, 12)
    model = Towers()
    it = mb.Accumulator(model, mb_optimizer(model), microbatch_size=4)

    def encode(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch)

    it.step(BATCH, lambda model, encoded: F.cross_entropy(encoded[0] @ encoded[1].T, torch.arange(12)), encode=encode)
