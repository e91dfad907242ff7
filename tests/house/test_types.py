"""The types of the package really are checked while the tests run."""

from typing import Any, cast

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation

import microbatch as mb


def test_an_argument_of_the_wrong_type_is_refused_by_its_annotation() -> None:
    with pytest.raises(BeartypeCallHintParamViolation):
        mb.cut(torch.ones(4, 2), cast("Any", "2"))


def test_an_argument_of_the_right_type_is_not() -> None:
    assert len(mb.cut(torch.ones(4, 2), 2)) == 2
