"""Nothing raw comes out of a public call: every argument, loss, count and batch of a wrong kind is refused by name."""

import copy
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.forked import completed

import microbatch as mb
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


def test_a_raw_error_would_be_found() -> None:
    # The negative control: the user's own error is one that the library did not raise.
    sys.path.insert(0, str(SCRIPT.parents[1]))
    from tests import wrong_values

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
