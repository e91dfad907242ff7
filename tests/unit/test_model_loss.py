"""`from_model`: the count is found by asking, or refused; asking leaves everything as before."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb
from microbatch.errors import LossError
from microbatch.loss.model_loss import ModelLoss

EXACT = 1e-9
CLASSES = 5


class Tokens(nn.Module):
    """A model that predicts a class for each token, with a head that one may choose."""

    def __init__(self, head: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(9, 6), nn.Linear(6, CLASSES)
        self.drop, self.norm, self.head = nn.Dropout(0.5), nn.BatchNorm1d(6, dtype=torch.float64), head
        self.calls = 0
        self.double()

    def forward(self, ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        self.calls += 1
        x = self.embed(ids)
        logits = self.linear(self.drop(x) if self.training and self.drop.p else x)
        return SimpleNamespace(loss=self.head(logits, labels, **kwargs))


def labelled(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def next_token(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def next_token_of_items(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    if num_items_in_batch is None:
        return next_token(logits, labels)
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def by_row(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (each.sum(1) / (labels != -100).sum(1).clamp(min=1)).mean()


def added(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def squared(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return labelled(logits, labels) ** 2


def weighted(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), torch.arange(1, CLASSES + 1).double())


def blind(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, labels[..., None]).mean()  # knows no label without a target


def by_hand(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    kept = labels != -100
    each = -logits.log_softmax(-1).gather(-1, labels.where(kept, 0)[..., None])[..., 0]
    return (each * kept).sum() / kept.sum()


def other_label(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=4)


def tokens(rows: int = 6, *, full: bool = False) -> dict[str, Tensor]:
    labels = torch.randint(0, CLASSES - 1, (rows, 7))
    if not full:
        labels[torch.arange(7) >= torch.randint(2, 8, (rows, 1))] = -100
    return {"ids": torch.randint(0, 9, (rows, 7)), "labels": labels}


def gradient_of(model: nn.Module, batch: Any, **options: Any) -> list[Tensor]:
    mb.Accumulator(model, **options).gradient(batch, mb.losses.from_model())
    return [each.grad.clone() for each in model.parameters() if each.grad is not None]


@pytest.mark.parametrize(
    ("head", "count"),
    [(labelled, "labels"), (next_token, "next_labels"), (next_token_of_items, "next_labels"), (by_row, "rows")],
)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("size", [1, 4])
def test_the_count_is_found_and_the_gradient_is_the_batchs(
    head: Callable[..., Tensor], count: str, full: bool, size: int
) -> None:
    model, batch = Tokens(head).eval(), tokens(full=full)
    model(**batch).loss.backward()
    expected = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    loss_fn = mb.losses.from_model()
    step = mb.Accumulator(model, microbatch_size=size, batch_norm="frozen").gradient(batch, loss_fn)
    assert loss_fn.found is not None
    assert loss_fn.found.count == count
    torch.testing.assert_close(step.loss, model(**batch).loss.detach(), rtol=EXACT, atol=EXACT)
    for parameter, want in zip([p for p in model.parameters() if p.grad is not None], expected, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=EXACT, atol=EXACT)


def test_the_wrong_count_is_seen_by_the_same_comparison() -> None:
    model, batch = Tokens(labelled).eval(), tokens()
    expected = model(**batch).loss.item()
    step = mb.Accumulator(model, microbatch_size=1, batch_norm="frozen").gradient(batch, mb.losses.from_model("rows"))
    assert abs(step.loss.item() - expected) > 1e-3


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (added, "adds up over the rows"),
        (squared, "not clearly a mean"),
        (weighted, "not clearly a mean"),
        (other_label, r"ignores the label 4"),
        (blind, "not clearly a mean"),  # every count would do, until a label is left out
    ],
)
def test_what_is_no_mean_over_a_count_is_refused_with_the_choices(head: Callable[..., Tensor], match: str) -> None:
    with pytest.raises(LossError, match=match):
        mb.losses.from_model()(Tokens(head), tokens(full=head in {other_label, blind}))


def test_a_function_counts_what_has_no_name() -> None:
    model, batch = Tokens(other_label).eval(), tokens(full=True)
    batch["labels"][0, 1:] = 4
    loss_fn = mb.losses.from_model(lambda microbatch: (microbatch["labels"] != 4).sum())
    step = mb.Accumulator(model, microbatch_size=2, batch_norm="frozen").gradient(batch, loss_fn)
    assert step.loss.item() == pytest.approx(model(**batch).loss.item(), abs=EXACT)


def test_equal_losses_show_nothing() -> None:
    model = Tokens(labelled)
    with torch.no_grad():
        model.linear.weight.zero_()
        model.linear.bias.zero_()
    with pytest.raises(LossError, match="no losses that differ"):
        mb.losses.from_model()(model, tokens())


class Fit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return {"loss": F.mse_loss(self.linear(x), labels)}


def test_equal_rows_are_asked_about_as_changed_copies() -> None:
    row, target, loss_fn = torch.randn(1, 3).double(), torch.randn(1, 2).double(), mb.losses.from_model()
    loss_fn(Fit().double(), {"x": row.repeat(4, 1), "labels": target.repeat(4, 1)})
    assert loss_fn.found is not None
    assert loss_fn.found.count == "rows"


def test_low_precision_is_refused_rather_than_guessed() -> None:
    found: list[str] = []
    for seed in range(8):
        torch.manual_seed(seed)
        loss_fn = mb.losses.from_model()
        try:
            loss_fn.find(Tokens(labelled).bfloat16(), tokens())
        except LossError as error:
            found.append("count=" if 'count="rows"' in str(error) else "")
        else:
            found.append(loss_fn.found.count if loss_fn.found else "")
    assert set(found) <= {"labels", "count="}


def test_rows_are_seen_without_classes() -> None:
    model, batch = Fit().double(), {"x": torch.randn(5, 3).double(), "labels": torch.randn(5, 2).double()}
    expected = model(**batch)["loss"].item()
    step = mb.Accumulator(model, microbatch_size=2).gradient(batch, mb.losses.from_model())
    assert step.loss.item() == pytest.approx(expected, abs=EXACT)


def test_asking_leaves_everything_as_before() -> None:
    model, batch = Tokens(labelled).train(), tokens()
    model.linear.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    loss_fn = mb.losses.from_model()
    expected = torch.get_rng_state(), random.getstate()
    loss_fn.find(model, batch)
    loss_fn.confirm(model, batch)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.training, model.drop.training, model.linear.training) == (True, True, False)
    assert all(each.grad is None for each in model.parameters())


def test_the_model_is_asked_at_microbatches_that_double() -> None:
    model, batch, loss_fn = Tokens(labelled), tokens(), mb.losses.from_model()
    asked: list[int] = []
    for index in range(1, 18):
        before = model.calls
        loss_fn(model, batch)
        asked += [index] if model.calls > before + 1 else []
    assert asked == [1, 2, 4, 8, 16]


WEIGHTS = torch.tensor([1.0, 20.0, 3.0]).double()
Y, FULL = torch.tensor([0, 0, 1, 2, 0, 1, 2, 2]), torch.ones(8, 5).double()
MANY, RAGGED = Y[:, None].add(torch.arange(5)) % 3, (torch.arange(5) < torch.arange(1, 9)[:, None] % 5 + 1).double()


class Odd(nn.Module):
    """A model with a loss that is no mean over rows or labels, whatever its first rows look like."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.loss = nn.Linear(6, 3).double(), loss

    def forward(self, x: Tensor, **given: Tensor) -> Any:
        return SimpleNamespace(loss=self.loss(self.linear(x), **given))


def of_mask(z: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return (F.cross_entropy(z.transpose(1, 2), labels, reduction="none") * mask).sum() / mask.sum()


def of_weights(z: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return (F.cross_entropy(z, labels, reduction="none") * weight).sum() / weight.sum()


def of_labels(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z, labels)


def of_classes(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z, labels, WEIGHTS)


def of_one_class(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z, labels) + (z[labels == 2].square().mean() if (labels == 2).any() else 0 * z.sum())


def of_numbers(z: Tensor, labels: Tensor) -> Tensor:
    return (z[..., 0] - labels)[labels != -100].square().mean()


def of_targets(z: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(z.transpose(1, 2), targets)


def of_places(z: Tensor, start_positions: Tensor) -> Tensor:
    return F.cross_entropy(z[..., 0], start_positions.clamp(0, 5), ignore_index=5)


def of_the_hardest(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z, labels, reduction="none").topk(max(1, len(z) // 2)).values.mean()


def of_the_batchs_mean(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z, labels) + 1e-3 * z.mean(0).square().sum()


def of_pairs(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z @ z.T, torch.arange(len(z))) + 0 * labels.sum()


ODD: list[tuple[Callable[..., Tensor], list[dict[str, Tensor]], str]] = [
    (of_classes, [{"labels": 0 * Y}, {"labels": Y}], "function that returns"),
    (of_classes, [{"labels": Y}], "function that returns"),
    (of_mask, [{"labels": MANY, "mask": FULL}, {"labels": MANY, "mask": RAGGED}], "function that returns"),
    (of_weights, [{"labels": Y, "weight": torch.tensor([1, 1, 1, 5, 0.1, 2, 3, 4]).double()}], "function that returns"),
    (of_numbers, [{"labels": RAGGED.where(torch.arange(8)[:, None] < 4, -100.0).where(RAGGED > 0, 1)}], "rows: "),
    (of_targets, [{"targets": MANY.where((torch.arange(8)[:, None] < 4) | (torch.arange(5) == 0), -100)}], "rows: "),
    (of_places, [{"start_positions": torch.tensor([0, 1, 2, 3, 9, 9, 1, 2])}], "rows: "),
    (of_one_class, [{"labels": Y}], "several terms"),
    (of_the_hardest, [{"labels": Y}], "compares rows with one another"),
    (of_the_batchs_mean, [{"labels": Y}], "compares rows with one another"),
    (of_pairs, [{"labels": Y}], "compares rows with one another"),
]


@pytest.mark.parametrize(("loss", "batches", "match"), ODD)
@pytest.mark.parametrize("size", [2, 4])
def test_a_count_that_fits_the_first_rows_by_chance_is_refused(
    loss: Callable[..., Tensor], batches: list[dict[str, Tensor]], match: str, size: int
) -> None:
    model, loss_fn = Odd(loss), mb.losses.from_model()
    before, accumulator = model.linear.weight.detach().clone(), mb.Accumulator(model, microbatch_size=size)
    random = torch.Generator().manual_seed(1)
    with pytest.raises(LossError, match=match if size > 2 else None) as caught:  # noqa: PT012
        for batch in batches:
            shape = (8, 5, 6) if any(each.ndim == 2 for each in batch.values()) or loss is of_places else (8, 6)
            accumulator.gradient({"x": torch.randn(shape, generator=random).double(), **batch}, loss_fn)
    assert 'count="rows"' not in str(caught.value)
    assert torch.equal(model.linear.weight, before)


def test_one_row_is_enough_where_a_copy_of_it_shows_the_count() -> None:
    for labels, loss, count in ((Y[:1], F.cross_entropy, "labels"), (FULL[:1, :3], F.mse_loss, "rows")):
        loss_fn = mb.losses.from_model()
        loss_fn(Odd(lambda z, labels, of=loss: of(z, labels)), {"x": torch.randn(1, 6).double(), "labels": labels})
        assert loss_fn.found is not None
        assert loss_fn.found.count == count


@pytest.mark.parametrize("head", [by_hand, next_token_of_items])
@pytest.mark.parametrize("first", [True, False])
def test_a_microbatch_without_labels_contributes_nothing(head: Callable[..., Tensor], first: bool) -> None:
    model, batch = Tokens(head).eval(), tokens(full=True)
    batch["labels"][slice(0, 2) if first else slice(2, 4)] = -100
    expected = model(**batch).loss.item()
    step = mb.Accumulator(model, microbatch_size=2, batch_norm="frozen").gradient(batch, mb.losses.from_model())
    assert step.loss.item() == pytest.approx(expected, abs=EXACT)
    assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)


class Routed(nn.Module):
    """Two experts and a balancing loss, as in Mixtral."""

    def __init__(self, formula: Callable[[Tensor, Tensor], Tensor] | None = None, *, reachable: bool = True) -> None:
        super().__init__()
        self.embed, self.gate, self.linear = nn.Embedding(9, 6), nn.Linear(6, 2), nn.Linear(6, CLASSES)
        self.router_aux_loss_coef, self.num_experts_per_tok = 0.5, 1
        self.formula, self.reachable = formula or (lambda f, p: 2 * (f * p).sum()), reachable

    def forward(self, ids: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Any:
        x = self.embed(ids)
        router = self.gate(x).flatten(0, 1)
        weights = router.softmax(-1)
        chosen = F.one_hot(weights.argmax(-1), 2).float().mean(0)
        aux = self.formula(chosen, weights.mean(0))
        logits = self.linear(x * weights.amax(-1).view(*ids.shape, 1))
        loss = next_token_of_items(logits, labels, num_items_in_batch) + self.router_aux_loss_coef * aux
        return SimpleNamespace(loss=loss, aux_loss=aux, router_logits=(router,) if self.reachable else None)


def test_the_balancing_loss_of_experts_is_exact_with_shared_statistics() -> None:
    model, batch = Routed(), tokens()
    model(**batch).loss.backward()
    expected = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    step = mb.Accumulator(model, microbatch_size=2, batch_norm="exact").gradient(batch, mb.losses.from_model())
    torch.testing.assert_close(step.loss.float(), model(**batch).loss.detach(), rtol=1e-6, atol=1e-6)
    for parameter, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Routed(), 'batch_norm="exact"'),
        (Routed(reachable=False), "router_logits are not reachable"),
        (Routed(lambda f, p: (f * p).square().sum()), "another formula"),
    ],
)
def test_the_balancing_loss_of_experts_is_refused_by_name_elsewhere(model: nn.Module, match: str) -> None:
    with pytest.raises(LossError, match=match):
        mb.Accumulator(model, microbatch_size=2).gradient(tokens(), mb.losses.from_model())


@pytest.mark.parametrize(
    ("batch", "match"), [((torch.ones(2, 3),), "must be a dict"), ({"ids": torch.zeros(2, 3).long()}, "labels")]
)
def test_batches_without_names_or_losses_are_refused(batch: Any, match: str) -> None:
    def call(model: Any, batch: Any, items: Any) -> Any:
        raise LossError(f"no labels for {model} {batch} {items}")

    with pytest.raises(LossError, match=match):
        ModelLoss(call, "auto", takes_items=lambda _: False)(nn.Linear(1, 1), batch)


def test_an_unknown_count_is_refused() -> None:
    with pytest.raises(LossError, match=r"'tokens'.*next_labels"):
        mb.losses.from_model("tokens")


def test_a_trained_models_small_losses_are_not_taken_for_another_count() -> None:
    model, loss_fn, x = (
        Odd(of_labels).float(),
        mb.losses.from_model(),
        torch.randn(8, 6),
    )
    labels = model.linear(x).argmax(1)
    loss_fn(model, {"x": x, "labels": labels})
    with torch.no_grad():
        model.linear.weight.mul_(60)
        model.linear.bias.mul_(60)
    for first in range(0, 8, 2):
        loss_fn.confirm(model, {"x": x[first:], "labels": labels[first:]})
