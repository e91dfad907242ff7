"""Steps of every kind leave nothing behind: objects, threads and open files are as many after 80 as after 20."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.leaks import KEPT, LEAKS

FEW = 20
"""Objects that a process may make for itself. A leak of one object a step is above that."""


@pytest.fixture(scope="module")
def growth() -> dict[str, dict[str, float]]:
    """Take the steps of every kind, in one fresh process."""
    command = [sys.executable, "-W", "error", "-m", "tests.leaks"]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", LEAKS)
def test_many_steps_leave_nothing_behind(kind: str, growth: dict[str, dict[str, float]]) -> None:
    found = growth[kind]
    assert found["objects"] < FEW, found
    assert (found["threads"], found["files"]) == (0, 0), found
    assert found["resident_bytes"] < 16 << 20, found


def test_a_leak_of_one_object_a_step_is_found(growth: dict[str, dict[str, float]]) -> None:
    # The negative control: every step's rows are kept.
    assert growth[KEPT]["objects"] > FEW
