"""The stand-in with which the doctor's loops for Accelerate are measured does what Accelerate does."""

from collections.abc import Iterator

import pytest
import torch
from tests.linting import rule_loops
from tests.linting.test_rules_measured import UNORDERED, apart, case_of

from microbatch.linting.rules.table import RULES

accelerate = pytest.importorskip("accelerate")
pytestmark = [pytest.mark.filterwarnings(UNORDERED), pytest.mark.filterwarnings("ignore:.*set_vital.*deprecated")]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate's state is the process's own: each test begins without, and leaves none."""
    forget()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    forget()


def forget() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerate.state.PartialState._reset_state()


@pytest.mark.parametrize("code", ["MB102", "MB302"])
@pytest.mark.parametrize("name", ["wrong", "right"])
def test_the_stand_in_is_accelerate(code: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = getattr(RULES[code], name)
    stand_in = case_of(code).run(source, "SGD")
    monkeypatch.setattr(rule_loops, "ACCELERATE", accelerate)
    real = case_of(code).run(source, "SGD")
    assert len(real.gradients) == len(stand_in.gradients)
    assert apart(real, stand_in) == 0.0


def test_another_loop_would_be_seen() -> None:
    right = case_of("MB102").right("SGD")
    assert apart(case_of("MB102").run(RULES["MB102"].right, "SGD"), right) < 1e-9
    assert apart(case_of("MB102").run(RULES["MB102"].wrong, "SGD"), right) > 0.1
