"""Nothing raw comes out of a public call: every argument, loss, count and batch of a wrong kind is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "wrong_values.py"
CALLS = [
    "Accumulator( step( window( backward( windows( load_state_dict( Sums( Ranks( LinearState(",
    "Lengths( Loss( Spill( Batches( cut( divide_batch( convert_batch_norm( linear_cross_entropy(",
    "scale_hyperparameters( Hyperparameters( check( plan(",
    "loss: counts:",
]


def raw_errors(*parts: str, least: int) -> dict[str, str]:
    """Run the calls whose names contain one of the parts, in a process without a checker of types."""
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--some", *parts], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout)
    assert told["calls"] >= least
    return told["raw"]


@pytest.mark.parametrize(("parts", "least"), list(zip(CALLS, [700, 500, 300, 60], strict=True)))
def test_no_call_ends_in_a_raw_error(parts: str, least: int) -> None:
    assert raw_errors(*parts.split(), least=least) == {}


def test_a_raw_error_would_be_found() -> None:
    # The negative control: the user's own error is one that the library did not raise.
    sys.path.insert(0, str(SCRIPT.parents[1]))
    from tests import wrong_values

    assert "ZeroDivisionError" in str(wrong_values.raw(lambda: wrong_values._step(loss_fn=lambda m, x: 1 / 0)))
    assert wrong_values.raw(lambda: wrong_values._accumulator(microbatch_size=0)) is None
