"""Right loops that look wrong are the full batch, by running them; and the doctor finds nothing in them."""

import pytest
from tests.linting.right_loops import RIGHT_LOOPS
from tests.linting.rule_loops import EPOCHS, apart, full, regression, run, windows


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("name", list(RIGHT_LOOPS))
def test_it_is_the_full_batch(name: str) -> None:
    length, source = RIGHT_LOOPS[name]
    batches = regression(length)
    loop, right = run(source, batches), full(windows(batches) * EPOCHS)
    assert len(loop.gradients) == len(right.gradients)
    assert all((a - b).norm() <= 1e-12 * b.norm() for a, b in zip(loop.gradients, right.gradients, strict=True))
    assert apart(loop, right) < 1e-12


@pytest.mark.parametrize("name", list(RIGHT_LOOPS))
def test_the_doctor_finds_nothing(name: str) -> None:
    doctor = pytest.importorskip("microbatch.linting.doctor").doctor
    _, source = RIGHT_LOOPS[name]
    found = [each for each in doctor(source) if each.confidence == "certain"]
    assert [(each.rule, each.line, each.message) for each in found] == []
