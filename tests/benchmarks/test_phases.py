"""The phases of a window: their times add up to the window's, and the clocks are taken away again."""

from benchmarks import contenders
from benchmarks.phases import PHASES, phases, table
from torch import autograd

from microbatch.gradients import autograd_engine


def test_every_phase_of_both_contenders_is_timed_and_the_clocks_leave() -> None:
    before = contenders.loss_sum, autograd.backward.__globals__["_engine_run_backward"]
    loop, ours = phases("tiny", 2, windows=1)  # of one window the medians add up
    for each in (loop, ours):
        parts = [getattr(each, phase) for phase in PHASES]
        assert all(part > 0 for part in parts)
        assert abs(sum(parts) + each.rest - each.window) < 1e-9
    assert before == (contenders.loss_sum, autograd_engine._engine_run_backward)
    assert f"| {ours.contender} |" in table([loop, ours])
