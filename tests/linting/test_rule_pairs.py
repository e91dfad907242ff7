"""The doctor finds each rule in its wrong loop, that rule alone, and nothing in the right one."""

import pytest

from microbatch.linting.rules.table import RULES

doctor = pytest.importorskip("microbatch.linting.doctor").doctor


@pytest.mark.parametrize("code", list(RULES))
def test_the_wrong_loop_has_this_fault_alone(code: str) -> None:
    found = doctor(RULES[code].wrong)
    assert {each.rule for each in found} == {code}, [(each.rule, each.line, each.message) for each in found]
    judged = {"note"} if RULES[code].severity == "input" else {"certain", "depends"}
    assert {each.confidence for each in found} <= judged


@pytest.mark.parametrize("code", list(RULES))
def test_the_right_loop_has_none(code: str) -> None:
    found = doctor(RULES[code].right)
    assert [(each.rule, each.line, each.message) for each in found] == []
