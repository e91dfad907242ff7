"""Sparse and dense gradients of one parameter in one window, and complex weights: as one full-batch backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microbatch.errors import ConfigError
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Ranks, Sums

SUMS = {"default": Sums(), "float64": Sums(dtype=torch.float64), "not fused": Sums(fuse=False)}
ORDERS = ["sparse, dense", "dense, sparse", "sparse, sparse", "both, sparse"]


class Tied(nn.Module):
    """A table that is looked up with a sparse gradient, and multiplied with a dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, sparse=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return a number for each row; all rows of a microbatch take the same way."""
        kind, x = int(batch["kind"][0]), self.table(batch["ids"])
        looked_up = x.sin().sum((1, 2))
        multiplied = self.head(batch["x"].to(x.dtype)).sin().sum(1)
        return [looked_up, multiplied, looked_up + multiplied][kind]


def make_batch(order: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    kinds = [["sparse", "dense", "both"].index(each) for each in order.split(", ")]
    return {
        "ids": torch.randint(7, (6, 3)),
        "x": torch.randn(6, 4),
        "kind": torch.tensor(kinds).repeat_interleave(3),
    }


def total(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch).double().mean()


def reference(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the gradient in float64, without a line of ours."""
    table = model.get_parameter("table.weight").detach().double().requires_grad_()
    looked_up = table[batch["ids"]].sin().sum((1, 2))
    multiplied = (batch["x"].to(model.get_parameter("table.weight").dtype).double() @ table.T).sin().sum(1)
    rows = torch.stack([looked_up, multiplied, looked_up + multiplied])[batch["kind"], torch.arange(6)]
    return torch.autograd.grad(rows.mean(), table)[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sparse_and_dense_gradients_of_one_weight_add_up(dtype: torch.dtype, sums: str, order: str) -> None:
    torch.manual_seed(1)
    model, batch = Tied().to(dtype), make_batch(order)
    Accumulator(model, microbatch_size=3, sums=SUMS[sums]).gradient(batch, total)
    found, expected = model.table.weight.grad, reference(model, batch)
    assert found is not None
    assert found.dtype == dtype
    assert found.is_sparse == (order == "sparse, sparse")
    off = float((found.to_dense().double() - expected).norm() / expected.norm())
    assert off <= {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]


def test_the_comparison_sees_a_lost_microbatch() -> None:
    torch.manual_seed(1)
    model, batch = Tied().double(), make_batch("sparse, dense")
    Accumulator(model, microbatch_size=3).gradient({name: value[:3] for name, value in batch.items()}, total)
    assert model.table.weight.grad is not None
    expected = reference(model, batch)
    assert float((model.table.weight.grad.to_dense() - expected).norm() / expected.norm()) > 0.1


@pytest.mark.parametrize("sums", SUMS)
def test_complex_weights_keep_their_imaginary_part(sums: str) -> None:
    torch.manual_seed(1)
    model, x = nn.Linear(3, 2, dtype=torch.complex64), torch.randn(6, 3, dtype=torch.complex64)
    expected = nn.Linear(3, 2, dtype=torch.complex128)
    expected.load_state_dict(model.state_dict())
    (expected(x.to(torch.complex128)).abs() ** 2).mean().backward()
    Accumulator(model, microbatch_size=2, sums=SUMS[sums]).gradient(x, lambda model, x: (model(x).abs() ** 2).mean())
    for name, parameter in model.named_parameters():
        wanted = expected.get_parameter(name).grad
        assert parameter.grad is not None
        assert wanted is not None
        assert parameter.grad.imag.abs().max() > 0.01
        assert float((parameter.grad - wanted).norm() / wanted.norm()) <= 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": Ranks(deterministic=True)}, r"Ranks\(deterministic=True\)"),
        ({"ranks": Ranks(overlap=True)}, r"Ranks\(overlap=True\)"),
    ],
)
def test_an_optimizer_of_sparse_gradients_alone_is_refused_where_gradients_become_dense(
    options: dict[str, Any], words: str
) -> None:
    model = nn.Embedding(5, 2, sparse=True)
    with pytest.raises(ConfigError, match=f"{words} does not go with SparseAdam"):
        Accumulator(model, torch.optim.SparseAdam(model.parameters()), microbatch_size=2, **options)
