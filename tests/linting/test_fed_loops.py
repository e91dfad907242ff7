"""Generators, lists and queues that feed a loop are run with it."""

import pytest
from tests.linting.fed_loops import PAIRS, right, wrong

from microbatch.linting.doctor import doctor


def certain(source: str) -> set[str]:
    return {each.rule for each in doctor(source) if each.confidence == "certain" and each.rule < "MB5"}


@pytest.mark.parametrize("name", list(PAIRS))
def test_the_wrong_loop_is_certain(name: str) -> None:
    assert certain(wrong(name)) == {PAIRS[name][2]}


@pytest.mark.parametrize("name", list(PAIRS))
def test_nothing_is_certain_in_the_right_loop(name: str) -> None:
    assert certain(right(name)) == set()


@pytest.mark.parametrize(
    "use", ["Accelerator(gradient_accumulation_steps=args.{})", "fit(args.{})", "weight = 0.1 / args.{}"]
)
def test_an_option_that_may_have_an_effect_is_not_blamed(use: str) -> None:
    source = wrong("an option that nothing uses")
    assert certain(source + use.format("gradient_accumulation_steps") + "\n") == set()


def test_generators_that_feed_each_other_in_a_circle_end() -> None:
    source = """
def one():
    yield from two()
def two():
    yield from one()
for i, x in enumerate(one()):
    (model(x) / accum_steps).backward()
    if (i + 1) % accum_steps == 0:
        optimizer.step()
"""
    assert all(each.rule != "MB000" for each in doctor(source))
