"""A job's data may be torchdata's loader: a resumed run goes on where its own state says it stood."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from microbatch.train.config import load_settings
from microbatch.train.job import Job
from microbatch.train.resolve import resolve
from microbatch.train.rundir import RunDirectory
from microbatch.train.training_loop import TrainingLoop

stateful = pytest.importorskip("torchdata.stateful_dataloader")
# torchdata calls a name that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")


class Seen(TensorDataset):
    read = 0

    def __getitem__(self, index: Any) -> Any:
        self.read += 1
        return super().__getitem__(index)


def loop_of(folder: Path, steps: int = 8) -> tuple[TrainingLoop, Seen]:
    torch.manual_seed(0)
    data, model = Seen(torch.randn(22, 4), torch.randn(22, 1)), nn.Linear(4, 1)
    job = Job(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        data=stateful.StatefulDataLoader(data, batch_size=4, shuffle=True),
        batch_size=8,
        microbatch_size=3,
    )
    config = resolve(load_settings({"steps": steps, "schedule": "constant"}), job, device=torch.device("cpu"))
    directory = RunDirectory(folder)
    if not directory.config.exists():
        directory.start(config="", files={})
    return TrainingLoop(job, config=config, run=directory), data


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in RunDirectory(folder).metrics.read_text().splitlines()]


def test_a_resumed_run_goes_on_where_the_loader_stood(tmp_path: Path) -> None:
    loop_of(tmp_path / "whole")[0].run()
    for stop in (1, 3, 5):
        folder = tmp_path / str(stop)
        loop_of(folder, stop)[0].run()
        loop, data = loop_of(folder)
        torch.manual_seed(5)
        loop.restore()
        assert data.read == 0
        loop.run()
        assert losses(folder) == losses(tmp_path / "whole")
