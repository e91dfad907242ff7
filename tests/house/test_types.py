"""The types of the package really are checked while the tests run."""

from contextlib import ExitStack
from typing import Any, cast

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation

import microbatch as mb
from microbatch.step.part import Part


def test_an_argument_of_the_wrong_type_is_refused_by_its_annotation() -> None:
    with pytest.raises(BeartypeCallHintParamViolation):
        mb.cut(torch.ones(4, 2), cast("Any", "2"))


def test_an_argument_of_the_right_type_is_not() -> None:
    assert len(mb.cut(torch.ones(4, 2), 2)) == 2


def test_a_value_without_what_a_protocol_asks_for_is_refused_also_after_one_that_has_it() -> None:
    model = torch.nn.Linear(2, 1)
    mb.Accumulator(model, microbatch_size=2).gradient(torch.ones(4, 2), lambda model, x: model(x).mean())
    for _ in range(2):
        with pytest.raises(BeartypeCallHintParamViolation):
            Part().open(cast("Any", object()), ExitStack())
