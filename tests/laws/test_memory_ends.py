"""Law F2: memory ends at any operator, the opening's included: as at the small size, or an error of the library."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from tests.faults import FULL, EndsAt
from tests.kinds import SMALL, Job, differences, make
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import microbatch as mb
from microbatch.errors import MicrobatchError, OutOfMemoryError
from microbatch.step import optimizer_step


def states(kind: str) -> tuple[Any, Any, int]:
    """Return the states before and after a step at the small size, and the operators of a step."""
    job = make(kind)
    before = job.state()
    job.accumulator._it.size.sizing.asked = SMALL
    job.step()
    after = job.state()
    whole = make(kind)
    with EndsAt(-1) as count:
        whole.step()
    return before, after, count.operators


def outcome(kind: str, at: int, *, before: Any, after: Any) -> str:
    """End the memory at an operator of a step, and tell how the step ended."""
    job, told = make(kind), ""
    try:
        with EndsAt(at):
            job.step()
    except MicrobatchError as error:
        told = str(error)
    except Exception as error:  # noqa: BLE001 - what is not to happen
        return f"raw: {type(error).__name__}"
    now = job.state()
    if not told:
        return "small" if not differences(after, now) else "mixed, in silence"
    if not differences(before, now):
        return "before"
    return "said" if "weights may be partly updated" in told else "mixed, in silence"


# A kind, and how many operators lie between two that fail: prime numbers, so that loops are hit everywhere.
@pytest.mark.parametrize(("kind", "stride"), [("plain", 7), ("unfused", 17), ("momentum", 19), ("coupled", 23)])
def test_f2_as_at_the_small_size_or_an_error_by_name(kind: str, stride: int) -> None:
    before, after, operators = states(kind)
    assert operators > 100
    found = Counter(outcome(kind, at, before=before, after=after) for at in range(0, operators, stride))
    assert found.keys() <= {"small", "before", "said"}, found
    assert found["small"] > found.total() / 2
    assert outcome(kind, 0, before=before, after=after) == "small"  # the very first, before the window is open


def test_f2_an_opening_that_is_not_undone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # The negative control: gradients and buffers are set aside, and not put back when the opening fails.
    from contextlib import ExitStack

    before, after, _ = states("plain")
    monkeypatch.setattr(ExitStack, "close", lambda self: None)
    found = {outcome("plain", at, before=before, after=after) for at in range(30, 60, 3)}
    assert found - {"small", "before", "said"}


class Limited(TorchDispatchMode):
    """Refuse new tensors once a number of bytes is alive; only the optimizer's step is inside."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        new = isinstance(out, torch.Tensor) and not (func._schema.is_mutable or func.is_view)
        if new and func.overloadpacket in {torch.ops.aten.clone, torch.ops.aten.empty_like}:
            self.room -= out.nbytes
            if self.room < 0:
                raise copy.copy(FULL)
        return out


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_f2_the_memory_of_new_state_is_made_sure_of_before_the_first_step_writes(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    weights = [each.detach().clone() for each in model.parameters()]
    optimizer = kind(model.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    job = Job(model, optimizer, mb.Accumulator(model, optimizer, microbatch_size=2), torch.ones(4, 4), lambda job: None)
    reserved = optimizer_step._reserved

    def limited(*args: Any) -> None:
        with Limited(300):  # a half of the state of the first layer
            reserved(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_step, "_reserved", limited)
        with pytest.raises(OutOfMemoryError, match="no weight was changed"):
            job.accumulator.step(job.batch, lambda model, x: model(x).mean())
    assert all(map(torch.equal, weights, model.parameters()))
    assert not optimizer.state
    assert job.accumulator.step(job.batch, lambda model, x: model(x).mean()).applied
