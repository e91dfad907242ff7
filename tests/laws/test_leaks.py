"""Steps of every kind leave nothing behind: objects, threads and open files are as many after 80 as after 20."""

import pytest
import torch
from tests.kinds import Job
from tests.leaks import LEAKS, leaked

FEW = 20
"""Objects that a test may make for itself. A leak of one object a step is above that."""
STEPS = {"retry": 25}  # each of these collects garbage several times


@pytest.mark.parametrize("kind", LEAKS)
def test_many_steps_leave_nothing_behind(kind: str) -> None:
    growth = leaked(kind, steps=STEPS.get(kind, 60))
    assert growth["objects"] < FEW, growth
    assert (growth["threads"], growth["files"]) == (0, 0), growth
    assert growth["resident_bytes"] < 16 << 20, growth


def test_a_leak_of_one_object_a_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # The negative control: every step's rows are kept.
    kept: list[list[torch.Tensor]] = []

    def keeping(job: Job) -> None:
        kept.append([job.batch.clone()])
        job.step()

    monkeypatch.setitem(LEAKS, "plain", ("plain", keeping))
    assert leaked("plain", steps=50)["objects"] > FEW
