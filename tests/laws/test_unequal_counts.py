"""A plain mean over unequal numbers of targets is said once, by name: law S1."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.laws.test_silence import X, accumulator, network, square
from torch import Tensor, nn
from torch.optim import SGD

import microbatch as mb
from microbatch.errors import BatchError
from microbatch.step.parts.target_counts import mean_behind


def said(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    ours = [each for each in caught if each.category is mb.MicrobatchWarning]
    assert all(each.filename == __file__ for each in ours)  # the user's own line
    return [str(each.message) for each in ours]


def tokens(ignored: int) -> dict[str, Tensor]:
    labels = torch.arange(12 * 4).view(12, 4) % 3
    labels[0, :ignored] = -100
    return {"x": X[:, None].expand(12, 4, 6), "labels": labels}


def token_mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]).mT, batch["labels"])


def test_s1_a_plain_mean_over_unequal_labels_is_said_once_with_what_mends_it() -> None:
    it = accumulator(network())
    (text,) = said(lambda: [it.step(tokens(3), token_mean) for _ in range(3)])
    assert "batch['labels']" in text
    assert "between 3.4 and 4 targets a row" in text

    def mended(model: nn.Module, batch: dict[str, Tensor]) -> mb.Loss:
        loss = token_mean(model, batch)
        n = (batch["labels"] != -100).sum()  # as the text says
        return mb.Loss(sum=loss * n, count=n)

    model = network()
    token_mean(model, tokens(3)).backward()
    twin = network()
    assert said(lambda: accumulator(twin).gradient(tokens(3), mended)) == []
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_s1_a_mask_counts_only_where_no_tensor_has_one_target_a_row() -> None:
    mask = (torch.arange(4)[None] < torch.tensor([1] * 6 + [4] * 6)[:, None]).long()
    batch = {"x": tokens(0)["x"], "attention_mask": mask}

    def masked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]).sum(2) * batch["attention_mask"]).sum() / batch["attention_mask"].sum()

    (text,) = said(lambda: accumulator(network()).step(batch, masked))
    assert "attention_mask" in text
    assert said(lambda: accumulator(network()).step(batch | {"y": torch.zeros(12)}, masked)) == []


@pytest.mark.parametrize("size", [12, 4])
def test_s1_equal_counts_and_whole_batches_say_nothing(size: int) -> None:
    batch = tokens(3 if size == 12 else 0)
    model = network()
    it = mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=size)
    assert said(lambda: it.step(batch, token_mean)) == []


def segmentation(ignored: int) -> dict[str, Tensor]:
    maps = torch.arange(12 * 16).view(12, 4, 4) % 3
    maps[0, :3] = ignored
    return {"x": X[:, :, None, None].expand(12, 6, 4, 4), "target": maps}


@pytest.mark.parametrize("ignored", [-100, -1, 255])
def test_s1_every_usual_label_for_no_target_is_counted(ignored: int) -> None:
    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"].movedim(1, -1)).movedim(-1, 1), batch["target"], ignore_index=ignored)

    (text,) = said(lambda: accumulator(network()).step(segmentation(ignored), loss_fn))
    assert f"batch['target'] != {ignored}).sum()" in text
    assert said(lambda: accumulator(network()).step(segmentation(0), loss_fn)) == []


@pytest.mark.parametrize(
    "other",
    [
        {"y": torch.tensor([-1, 1] * 5 + [1, 1])},  # two classes
        {"missing": torch.tensor([-1] + [5] * 11), "z": X},  # no target
        {"target": torch.tensor([255] + [254] * 11)[:, None, None].expand(12, 2, 2)},  # pictures
    ],
)
def test_s1_other_integers_are_no_labels_for_no_target(other: dict[str, Tensor]) -> None:
    it = accumulator(network())
    assert said(lambda: it.step({"x": X} | other, lambda model, batch: square(model, batch["x"]))) == []


def classified(labels: Tensor) -> dict[str, Any]:
    return {"x": X, "labels": labels}


PARTLY = torch.tensor([1, -100, 2, -100, -100, 0, 1, 2, 0, 1, 2, 0])  # 2, 4 and 2 targets in microbatches of 5, 5 and 2


def class_mean(model: nn.Module, batch: dict[str, Any], **options: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), torch.as_tensor(batch["labels"]), **options)


@pytest.mark.parametrize("counted", [False, True])
def test_s1_microbatches_of_a_loader_are_counted_too(counted: bool) -> None:
    def run(labels: Tensor) -> None:
        model = network()
        loader = [{"x": X[i : i + 4], "labels": labels[i : i + 4]} for i in (0, 4, 8)]
        for window in accumulator(model).windows(loader, microbatches=3):
            for batch in window:
                loss, n = class_mean(model, batch), (batch["labels"] != -100).sum()
                window.backward(mb.Loss(sum=loss * n, count=n) if counted else loss)

    found = said(lambda: run(PARTLY))
    assert len(found) == (not counted)
    assert all(
        "batch['labels']" in text and "window.backward(mb.Loss(sum=loss * n, count=n))" in text for text in found
    )
    assert said(lambda: run(PARTLY.clamp(min=0))) == []


def test_s1_a_count_that_is_given_for_each_microbatch_says_nothing() -> None:
    def run(count: Callable[[dict[str, Tensor]], float]) -> None:
        model = network()
        it = accumulator(model)
        with it.window() as window:
            for i in (0, 4, 8):
                batch = {"x": X[i : i + 4], "labels": PARTLY[i : i + 4]}
                window.backward(class_mean(model, batch), count=count(batch))

    assert said(lambda: run(lambda batch: float((batch["labels"] != -100).sum()))) == []
    assert len(said(lambda: run(lambda batch: len(batch["labels"])))) == 1


@pytest.mark.parametrize(
    "labels", [PARTLY.numpy(), mb.Rows(PARTLY), mb.Rows(PARTLY.tolist()), mb.Rows(PARTLY[None], dim=1)]
)
def test_s1_labels_in_arrays_and_marks_are_counted(labels: Any) -> None:
    def loss_fn(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        kept = torch.as_tensor(batch["labels"]).flatten() != -100
        return model(batch["x"])[kept].square().mean()

    (text,) = said(lambda: accumulator(network()).step(classified(labels), loss_fn))
    assert "batch['labels'] != -100" in text


def test_s1_batches_of_several_paddings_are_counted() -> None:
    parts = [classified(PARTLY), classified(PARTLY.clamp(min=0))]
    (text,) = said(lambda: accumulator(network()).step(mb.Batches(parts), class_mean))
    assert "batch['labels']" in text
    assert said(lambda: accumulator(network()).step(mb.Batches(parts[1:] * 2), class_mean)) == []


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
@pytest.mark.parametrize("name", ["mask", "valid", "keep"])
def test_s1_a_mask_of_rows_is_counted(kind: torch.dtype, name: str) -> None:
    def masked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]).sum(1) * batch[name]).sum() / batch[name].sum()

    unequal, equal = (PARTLY >= 0).to(kind), torch.ones(12, dtype=kind)
    (text,) = said(lambda: accumulator(network()).step({"x": X, name: unequal, "y": X[:, 0]}, masked))
    assert f"(batch['{name}']).sum()" in text
    assert said(lambda: accumulator(network()).step({"x": X, name: equal}, masked)) == []
    weights = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)  # no mask
    assert said(lambda: accumulator(network()).step({"x": X, name: weights}, masked)) == []


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"autocast": torch.bfloat16}])
@pytest.mark.parametrize("ignored", [0, 255])
def test_s1_the_label_that_cross_entropy_left_out_is_read_from_its_graph(ignored: int, options: dict[str, Any]) -> None:
    autocast, labels = options.get("autocast"), torch.where(PARTLY < 0, ignored, PARTLY.clamp(min=1))
    smoothing = options.get("label_smoothing", 0.0)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor], **more: Any) -> Any:
        options: dict[str, Any] = {"ignore_index": ignored, "label_smoothing": smoothing} | more
        return F.cross_entropy(model(batch["x"]), batch["t"], **options)

    def counted(model: nn.Module, batch: dict[str, Tensor]) -> mb.Loss:
        loss, n = loss_fn(model, batch), (batch["t"] != ignored).sum()  # as the text says
        return mb.Loss(sum=loss * n, count=n)

    def run(function: Any) -> list[str]:
        return said(lambda: accumulator(network(), autocast=autocast).step({"x": X, "t": labels, "z": X}, function))

    (text,) = run(loss_fn)
    assert f"n = (labels != {ignored}).sum()" in text
    assert run(counted) == []
    # A sum over the rows of a microbatch is a mean over rows, and nobody counts the labels.
    assert run(lambda model, batch: loss_fn(model, batch, reduction="sum") / len(batch["t"])) == []


def test_s1_each_term_of_a_loss_of_several_is_looked_at() -> None:
    labels = torch.where(PARTLY < 0, 255, PARTLY)

    def two(model: nn.Module, batch: dict[str, Tensor], *, ignored: int) -> dict[str, Tensor]:
        out = model(batch["x"])
        return {"size": out.square().mean(), "class": F.cross_entropy(out, batch["t"], ignore_index=ignored)}

    def run(labels: Tensor, *, ignored: int) -> list[str]:
        batch = {"x": X, "t": labels, "z": X}
        return said(lambda: accumulator(network()).step(batch, lambda m, b: two(m, b, ignored=ignored)))

    (text,) = run(labels, ignored=255)
    assert "n = (labels != 255).sum()" in text
    assert run(PARTLY.clamp(min=0), ignored=255) == []


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": lambda out, t: F.cross_entropy(out, t, reduction="sum"),
    "two terms in one": lambda out, t: F.cross_entropy(out, t, reduction="sum") + out.square().sum(),
    "squares": lambda out, t: F.mse_loss(out[:, 0], t.double(), reduction="sum"),
    "binary": lambda out, t: F.binary_cross_entropy_with_logits(out[:, 0], (t > 0).double(), reduction="sum"),
}


@pytest.mark.parametrize("name", SUMS)
def test_s1_a_plain_sum_is_said_once_with_what_mends_it(name: str) -> None:
    labels = torch.arange(12) % 3

    def summed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return SUMS[name](model(batch["x"]), batch["t"])

    def run(function: Any, **options: Any) -> list[str]:
        it = accumulator(network(), **options)
        return said(lambda: [it.step({"x": X, "t": labels}, function) for _ in range(2)])

    (text,) = run(summed)
    assert "mb.Loss(sum=loss, count=len(labels))" in text
    assert run(lambda m, b: mb.Loss(sum=summed(m, b), count=len(b["t"]))) == []
    assert run(lambda m, b: summed(m, b) / len(b["t"])) == []
    whole = mb.Accumulator(network(), microbatch_size=12)
    assert said(lambda: whole.gradient({"x": X, "t": labels}, summed)) == []

    model, cut, mended = network(), network(), network()
    (summed(model, {"x": X, "t": labels}) / 12).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accumulator(cut).gradient({"x": X, "t": labels}, summed)
    accumulator(mended).gradient({"x": X, "t": labels}, lambda m, b: mb.Loss(sum=summed(m, b), count=len(b["t"])))
    for p, q in zip(model.parameters(), mended.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
    shares = [off(model, cut, factor) for factor in (1, 12)]  # neither the mean's gradient nor the sum's
    assert min(shares) > 1e-2


def off(model: nn.Module, cut: nn.Module, factor: float) -> float:
    pairs = list(zip(model.parameters(), cut.parameters(), strict=True))
    wrong = [q.grad - factor * p.grad for p, q in pairs if p.grad is not None and q.grad is not None]
    return float(torch.cat([each.flatten() for each in wrong]).norm())


def test_s1_tensors_without_values_are_refused_by_name() -> None:
    with pytest.raises(BatchError, match="meta tensor"):
        accumulator(network()).step({"x": X.to("meta"), "labels": torch.zeros(12).long().to("meta")}, square)


def test_s1_class_weights_are_read_from_the_graph_of_cross_entropy() -> None:
    weight = torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)
    labels = torch.tensor([0] * 5 + [1] * 5 + [2] * 2)

    def counted(model: nn.Module, batch: dict[str, Tensor]) -> mb.Loss:
        loss, n = class_mean(model, batch, weight=weight), weight[batch["labels"]].sum()
        return mb.Loss(sum=loss * n, count=n)

    it = accumulator(network())
    (text,) = said(lambda: it.step(classified(labels), lambda m, b: class_mean(m, b, weight=weight)))
    assert "between 1 and 9 targets a row by the class weights" in text
    assert said(lambda: accumulator(network()).step(classified(labels), counted)) == []


def test_s1_saved_values_that_hooks_hold_are_not_read() -> None:
    def refuse(_: Any) -> Any:
        pytest.fail("reading it may recompute a layer")

    logits = torch.zeros(3, 4, requires_grad=True)
    assert mean_behind(F.cross_entropy(logits, torch.tensor([1, 2, -100])), 3.0) is not None
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, refuse):
        assert mean_behind(F.cross_entropy(logits, torch.tensor([1, 2, -100])), 3.0) is None
