"""Nothing raw comes out of a public call: every argument, loss, count and batch of a wrong kind is refused by name."""

import copy
import json
import pickle
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import wrong_values
from tests.forked import completed

import microbatch as mb
from microbatch.arguments import attribute, whole
from microbatch.errors import ConfigError, CountError, LossError
from microbatch.loss.loss import Loss, check_number, shares_of

SCRIPT = Path(__file__).parents[1] / "wrong_values.py"
CALLS = [
    "Accumulator( step( window( backward( windows( load_state_dict( Sums( Ranks( LinearState(",
    "Lengths( Loss( Spill( Batches( Rows( Whole( cut( divide_batch( convert_batch_norm( linear_cross_entropy(",
    "scale_hyperparameters( Hyperparameters( check( plan(",
    "loss: counts:",
    "batch:",
]


def raw_errors(*parts: str, least: int) -> dict[str, str]:
    """Run the calls whose names contain one of the parts, in a process without a checker of types."""
    result = completed([str(SCRIPT), "--some", *parts])
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout)
    assert told["calls"] >= least
    return told["raw"]


@pytest.mark.parametrize(("parts", "least"), list(zip(CALLS, [700, 400, 250, 60, 50], strict=True)))
def test_no_call_ends_in_a_raw_error(parts: str, least: int) -> None:
    assert raw_errors(*parts.split(), least=least) == {}


def test_every_whole_number_may_be_one_of_numpy_and_none_may_be_a_bool() -> None:
    result = completed([str(SCRIPT), "--whole"])
    assert result.returncode == 0, result.stderr[-2000:]
    plain, int64, uint32, truth = json.loads(result.stdout)
    assert plain == int64 == uint32 == []
    assert len(truth) == 24


def test_a_number_of_numpy_becomes_an_int() -> None:
    model = torch.nn.Linear(2, 1)
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=np.int64(2))
    assert type(it.microbatch_size) is int
    assert [len(piece) for piece in mb.cut(torch.ones(5, 2), np.int32(3))] == [3, 2]
    assert len(it.windows([torch.ones(2, 2)] * 4, microbatches=np.int64(2))) == 2
    assert whole(np.array(3)) is None  # an array is no number, and a tensor would be read from its device
    assert whole(torch.tensor(3)) is None
    assert [whole(each) for each in (True, np.True_, torch.tensor(True), 3.0, "3", None, np.ones(2))] == [None] * 7


def test_an_attribute_that_raises_is_not_there() -> None:
    with pytest.raises(RuntimeError):  # the negative control
        hasattr(wrong_values.Refusing(), "shape")
    assert attribute(wrong_values.Refusing(), "shape") is None
    assert attribute(wrong_values.Entries(x=3), "x") == 3
    assert attribute(wrong_values.Entries(x=3), "y", 4) == 4


@pytest.mark.parametrize("entries", [lambda **it: it, wrong_values.Entries])
def test_a_dict_whose_entries_are_attributes_is_a_dict(entries: Any) -> None:
    x, model = torch.arange(12.0).view(6, 2), torch.nn.Linear(2, 1)
    loss_fn = lambda model, batch: (model(batch["x"]) * batch["y"]).mean()  # noqa: E731 - short
    batch = entries(x=x, y=x[:, :1])
    loss_fn(model, batch).backward()
    assert model.weight.grad is not None
    expected = model.weight.grad.clone()
    mb.Accumulator(model, microbatch_size=2).gradient(batch, loss_fn)
    torch.testing.assert_close(model.weight.grad, expected)
    assert mb.check(model, loss_fn, batch, microbatch_size=2).ok


@pytest.mark.parametrize("form", ["coo", "csr", "lil", "dok", "bsr", "csc"])
def test_sparse_matrices_of_scipy_are_cut_or_refused_by_name(form: str) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    x, model = torch.ones(6, 2), torch.nn.Linear(2, 1)
    it, seen = mb.Accumulator(model, microbatch_size=2), list[int]()

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        seen.append(batch["s"].shape[0])
        return model(batch["x"]).mean()

    matrix = sparse.random(6, 6, density=0.5, format=form)
    if form in {"coo", "bsr"}:
        with pytest.raises(mb.MicrobatchError, match=r"batch\['s'\].*tocsr\(\).*mb\.Whole"):
            it.gradient({"x": x, "s": matrix}, loss_fn)
    else:
        it.gradient({"x": x, "s": matrix}, loss_fn)
        assert seen == [2, 2, 2]
    seen.clear()
    it.gradient({"x": x, "s": mb.Whole(matrix)}, loss_fn)  # as the text says
    assert seen == [6, 6, 6]


def test_a_raw_error_would_be_found() -> None:
    # The negative control: the user's own error is one that the library did not raise.
    assert "ZeroDivisionError" in str(wrong_values.raw(lambda: wrong_values._step(loss_fn=lambda m, x: 1 / 0)))
    assert wrong_values.raw(lambda: wrong_values._accumulator(microbatch_size=0)) is None


@pytest.mark.parametrize("stepped", [False, True])
def test_an_accumulator_is_neither_pickled_nor_copied(stepped: bool) -> None:
    model = torch.nn.Linear(2, 1)
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
    if stepped:
        it.step(torch.ones(4, 2), lambda model, x: model(x).mean())
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(ConfigError, match="state_dict"):
            duplicate(it)


class Output(dict[str, Any]):
    """What a Transformers model returns: a mapping whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        """Return an entry."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@pytest.mark.parametrize(
    "make",
    [
        lambda y: Output(loss=y.mean(), logits=y),
        lambda y: Output(loss=y.mean()),
        lambda y: {"loss": y.mean(), "logits": y},
        lambda y: types.SimpleNamespace(loss=y.mean(), logits=y),
        lambda y: (y.mean(), y),
    ],
)
def test_s2_a_whole_model_output_is_no_loss(make: Any) -> None:
    with pytest.raises(LossError) as caught:
        shares_of(make(torch.ones(3, requires_grad=True)), rows=3)
    assert all(word in str(caught.value) for word in ("mb.losses.from_model", "return mb.Loss(sum=output", "count=n)"))


def test_s2_terms_named_loss_and_others_are_terms() -> None:
    y = torch.ones(3, requires_grad=True)
    assert [share.name for share in shares_of({"loss": y.mean(), "router": y.sum()}, rows=3)] == ["loss", "router"]


@pytest.mark.parametrize("count", [np.int64(4), np.float32(4), 4])
def test_numbers_of_numpy_are_counts(count: Any) -> None:
    assert check_number(count, "count") == 4.0


def test_a_count_beyond_a_float_is_refused() -> None:
    with pytest.raises(CountError, match="finite"):
        Loss(torch.ones(()), 10**400)
