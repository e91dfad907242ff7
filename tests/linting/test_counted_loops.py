"""What counts microbatches and what counts steps; helpers, outputs and measures that are no microbatches."""

import pytest
from tests.linting.counted_loops import PAIRS, RIGHT, pieces, right, wrong

from microbatch.linting.doctor import doctor


def certain(source: str) -> set[str]:
    return {each.rule for each in doctor(source) if each.confidence == "certain" and each.rule < "MB5"}


@pytest.mark.parametrize("name", list(PAIRS))
def test_the_wrong_loop_is_certain(name: str) -> None:
    assert certain(wrong(name)) == PAIRS[name][2]


@pytest.mark.parametrize("name", list(PAIRS))
def test_nothing_is_certain_in_the_right_loop(name: str) -> None:
    assert certain(right(name)) == set()


@pytest.mark.parametrize("name", list(RIGHT))
def test_nothing_is_certain_in_right_loops_of_unusual_shape(name: str) -> None:
    assert certain("import torch\nimport torch.nn.functional as F\n" + RIGHT[name]) == set()


def test_the_step_may_stand_in_the_caller_of_the_loop() -> None:
    assert "MB101" in certain(pieces(divided=False))
    assert "MB101" not in certain(pieces(divided=True))
