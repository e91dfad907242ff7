"""The losses over targets: sum over count is PyTorch's own mean, over any cut of the batch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import microbatch as mb
from microbatch.errors import LossError

EXACT = 1e-12


def joined(losses: list[mb.Loss]) -> Tensor:
    return torch.stack([each.sum for each in losses]).sum() / sum(float(each.count) for each in losses)


@given(
    rows=st.integers(2, 6),
    shape=st.sampled_from([(), (4,), (2, 3)]),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    ignored=st.sampled_from([-100, 1]),
    cut=st.integers(1, 5),
)
def test_cross_entropy_is_torchs_mean(
    rows: int, shape: tuple[int, ...], weighted: bool, smoothing: float, ignored: int, cut: int
) -> None:
    logits = torch.randn(rows, 3, *shape, dtype=torch.float64)
    labels = torch.randint(0, 3, (rows, *shape))
    labels[torch.rand(labels.shape) < 0.3] = ignored
    labels.flatten()[0] = 2
    options: dict[str, Any] = {"ignore_index": ignored, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.rand(3, dtype=torch.float64) + 0.5
    parts = zip(logits.split(cut), labels.split(cut), strict=True)
    found = joined([mb.losses.cross_entropy(x, y, **options) for x, y in parts])
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, **options), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_probabilities_is_torchs_mean(weighted: bool) -> None:
    logits, labels = torch.randn(5, 3, 4, dtype=torch.float64), torch.rand(5, 3, 4, dtype=torch.float64)
    weight = torch.rand(3, dtype=torch.float64) if weighted else None
    parts = zip(logits.split(2), labels.split(2), strict=True)
    found = joined([mb.losses.cross_entropy(x, y, weight=weight) for x, y in parts])
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, weight), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("shift", [True, False])
def test_causal_lm_counts_the_tokens_that_are_predicted(shift: bool) -> None:
    logits, labels = torch.randn(5, 6, 7, dtype=torch.float64), torch.randint(0, 7, (5, 6))
    labels[0, 1:], labels[2, 4:] = -100, -100
    moved = F.pad(labels[:, 1:], (0, 1), value=-100) if shift else labels
    expected = F.cross_entropy(logits.flatten(0, 1), moved.flatten())
    found = joined([mb.losses.causal_lm(logits[i : i + 2], labels[i : i + 2], shift=shift) for i in (0, 2, 4)])
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    means = [
        F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in zip(logits.split(2), moved.split(2), strict=True)
    ]
    assert abs(torch.stack(means).mean() - expected) > 1e-3  # the mean of means is another number


@pytest.mark.parametrize("pos_weight", [None, torch.tensor([2.0, 0.5, 1.0])])
def test_mse_and_bce_are_torchs_means(pos_weight: Tensor | None) -> None:
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    weight = torch.rand(3, dtype=torch.float64)
    parts = list(zip(x.split(2), y.split(2), strict=True))
    torch.testing.assert_close(joined([mb.losses.mse(*each) for each in parts]), F.mse_loss(x, y))
    found = joined([mb.losses.bce(*each, weight=weight, pos_weight=pos_weight) for each in parts])
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(x, y, weight, pos_weight=pos_weight))


def test_low_precision_is_summed_in_float32() -> None:
    assert mb.losses.mse(torch.ones(3).bfloat16(), torch.zeros(3)).sum.dtype == torch.float32
    assert mb.losses.causal_lm(torch.ones(1, 3, 4).bfloat16(), torch.ones(1, 3).long()).sum.dtype == torch.float32


def test_nothing_to_predict_is_a_sum_of_nothing() -> None:
    loss = mb.losses.causal_lm(torch.ones(2, 3, 4, requires_grad=True), torch.full((2, 3), -100))
    assert (loss.sum.item(), int(loss.count)) == (0.0, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mb.losses.mse(torch.ones(3, 1), torch.ones(3)),
        lambda: mb.losses.bce(torch.ones(3), torch.ones(3, 1)),
        lambda: mb.losses.cross_entropy(torch.ones(3), torch.ones(3).long()),
        lambda: mb.losses.cross_entropy(torch.ones(3, 2), torch.ones(4).long()),
        lambda: mb.losses.causal_lm(torch.ones(3, 2, 5), torch.ones(3, 4).long()),
    ],
)
def test_shapes_that_would_be_broadcast_are_refused(call: Any) -> None:
    with pytest.raises(LossError, match="shape"):
        call()
