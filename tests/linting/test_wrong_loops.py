"""Wrong loops in forms that no pattern finds: each is off by running it, and the doctor names what is wrong."""

import pytest
from tests.linting.rule_loops import EPOCHS, apart, full, regression, run, windows
from tests.linting.wrong_loops import WRONG_LOOPS


@pytest.mark.parametrize("name", list(WRONG_LOOPS))
def test_it_is_not_the_full_batch(name: str) -> None:
    codes, length, source = WRONG_LOOPS[name]
    batches = regression(length)
    clip = 0.5 if codes == {"MB201"} else None
    assert apart(run(source, batches), full(windows(batches) * EPOCHS, clip=clip)) > 1e-3


@pytest.mark.parametrize("name", list(WRONG_LOOPS))
def test_the_doctor_names_it(name: str) -> None:
    doctor = pytest.importorskip("microbatch.linting.doctor").doctor
    codes, _, source = WRONG_LOOPS[name]
    found = [each for each in doctor(source) if each.rule < "MB5"]
    assert {each.rule for each in found} == codes, [(each.rule, each.line, each.message) for each in found]
