"""The parts of a step's time follow each other, whatever order its microbatches go through in."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from microbatch.step.accumulator import Accumulator
from microbatch.step.events import Event, MicrobatchDone
from microbatch.train.baselines import take_step
from microbatch.train.job import Job
from microbatch.train.timeline import StepTimeline

REST = 0.002


def encode(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    time.sleep(REST)
    return model(rows)


def job(**more: Any) -> Job:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = list(torch.randn(6, 4))
    return Job(model=model, optimizer=optimizer, data=data, batch_size=6, **more)


def timed(made: Job, **settings: Any) -> tuple[dict[str, Any], float]:
    timeline = StepTimeline([made.optimizer] if isinstance(made.optimizer, torch.optim.Optimizer) else [])

    def listen(event: Event) -> None:
        if isinstance(event, MicrobatchDone):
            timeline.microbatch_done()

    accumulator = Accumulator(made.model, made.optimizer, microbatch_size=2, listeners=[listen], **settings)
    began = time.perf_counter()
    take_step(accumulator, timeline.of(made, plain=False), torch.randn(6, 4))
    took, record = time.perf_counter() - began, timeline.record()
    assert record is not None
    return record, took


@pytest.mark.parametrize(
    ("made", "settings"),
    [
        ({"loss_fn": lambda model, rows: encode(model, rows).square().mean()}, {"batch_norm": "microbatch"}),
        ({"loss_fn": lambda model, rows: encode(model, rows).square().mean()}, {"batch_norm": "exact"}),
        ({"loss_fn": lambda _, z: (z @ z.T).mean(), "encode": encode}, {"batch_norm": "frozen", "coupled": "twice"}),
    ],
    ids=["one after the other", "in turns", "encoded twice"],
)
def test_the_parts_add_up_to_no_more_than_the_step(made: dict[str, Any], settings: dict[str, Any]) -> None:
    record, took = timed(job(**made), **settings)
    assert len(record["forward"]) == len(record["backward"]) == 3
    spent = sum(record["forward"]) + sum(record["backward"]) + record["finish"] + record["optimizer"]
    assert min(record["forward"] + record["backward"]) >= 0
    passes = 6 if settings.get("coupled") == "twice" else 3
    assert passes * REST <= sum(record["forward"]) <= spent <= took + 1e-5
    assert record["optimizer"] > 0
    # In turns all go forward before any goes backward, and else each before its own backward.
    assert [seconds >= REST for seconds in record["forward"]] == [True, *2 * [settings["batch_norm"] != "exact"]]
