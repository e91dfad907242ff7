"""Data that is read in its own order trains as a list does, and a resumed run goes on where it stood."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import microbatch as mb
from microbatch.errors import CheckpointError, ConfigError, DataError
from microbatch.train.config import load_settings
from microbatch.train.data import Position
from microbatch.train.job import Job
from microbatch.train.place import Place
from microbatch.train.rank_batches import StreamBatches
from microbatch.train.resolve import resolve
from microbatch.train.rundir import RunDirectory
from microbatch.train.training_loop import TrainingLoop

CPU = torch.device("cpu")


def samples(number: int) -> list[dict[str, Tensor]]:
    """Rows with very different numbers of real targets."""
    generator = torch.Generator().manual_seed(0)
    made: list[dict[str, Tensor]] = []
    for _ in range(number):
        x = torch.randn(5, 4, generator=generator)
        real = torch.arange(5) < torch.randint(1, 6, (), generator=generator)
        made.append({"x": x, "y": torch.where(real, (x.sum(1) > 0).long(), -100)})
    return made


def token_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> mb.Loss:
    logits, labels = model(microbatch["x"]).flatten(0, 1), microbatch["y"].flatten()
    return mb.Loss(sum=F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), count=(labels >= 0).sum())


def a_job(model: nn.Module | None = None, **changes: Any) -> Job:
    model = model or nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    values: dict[str, Any] = {"batch_size": 8, "microbatch_size": 3, "steps": 7, "validation": None}
    return Job(model=model, optimizer=optimizer, loss_fn=token_loss, **(values | changes))


ROWS = samples(22)


class Plain(IterableDataset[dict[str, Tensor]]):
    """Rows in the order of a shuffle that random numbers of the whole process decide, as shuffle buffers do."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = list(range(len(ROWS)))
        for _ in range(len(ROWS)):
            at = random.randrange(len(order))  # noqa: S311 - an order, not a secret
            yield ROWS[order.pop(at)]


class Counting(IterableDataset[dict[str, Tensor]]):
    """Rows from where its state says, and how many were read in all."""

    def __init__(self) -> None:
        self.at, self.read = 0, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        first, self.at = self.at, 0
        for index in range(first, len(ROWS)):
            self.at, self.read = index + 1, self.read + 1
            yield ROWS[index]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Epochs(IterableDataset[dict[str, Tensor]]):
    """Rows in an order of the epoch that it was told."""

    epoch = -1

    def __len__(self) -> int:
        return len(ROWS)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(self.epoch))
        return (ROWS[index] for index in order.tolist())


class ListSet(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return ROWS[index]


class Short(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(ROWS[:9])


class Ragged:
    """Collates each batch to another width than the one before."""

    width = 6

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.width -= 1
        return {"x": torch.stack([row["x"][: self.width] for row in rows])}


def shuffled_loader() -> DataLoader[Any]:
    return DataLoader(ListSet(), batch_size=4, shuffle=True)


STREAMS: dict[str, Callable[[], Any]] = {
    "samples": Plain,
    "with a state": Counting,
    "with epochs": Epochs,
    "loader": shuffled_loader,
    "loader of a stream": lambda: DataLoader(Plain(), batch_size=8),
}


def loop_of(data: Any, folder: Path, **flags: Any) -> TrainingLoop:
    torch.manual_seed(3)
    job = a_job(data=data)
    settings = {"steps": 8, "checkpoint_every": 99, "schedule": "constant", **flags}
    config = resolve(load_settings(settings), job, device=CPU)
    directory = RunDirectory(folder)
    if not directory.config.exists():
        directory.start(config="", files={})
    return TrainingLoop(job, config=config, run=directory)


def learned(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in RunDirectory(folder).metrics.read_text().splitlines()]
    return [tuple(line[key] for key in ("step", "epoch", "loss", "grad_norm", "count", "samples")) for line in lines]


@pytest.mark.parametrize("kind", STREAMS)
def test_a_resumed_run_is_the_one_that_was_not_interrupted(kind: str, tmp_path: Path) -> None:
    make = STREAMS[kind]
    assert loop_of(make(), tmp_path / "whole").run() is None
    whole = learned(tmp_path / "whole")
    assert [line[5] for line in whole] == [8, 8, 6, 8, 8, 6, 8, 8]
    assert [line[1] for line in whole] == [0, 0, 0, 1, 1, 1, 2, 2]
    for stop in (1, 3, 5):  # inside the first pass, at its end, inside the second
        folder = tmp_path / f"cut {stop}"
        assert loop_of(make(), folder, steps=stop).run() is None
        loop = loop_of(make(), folder)
        random.seed(0)
        torch.manual_seed(0)
        loop.restore()
        assert loop.run() is None
        assert learned(folder) == whole


def test_a_stream_with_a_state_reads_nothing_again(tmp_path: Path) -> None:
    assert loop_of(Counting(), tmp_path, steps=5).run() is None
    data = Counting()
    loop = loop_of(data, tmp_path, steps=6)
    loop.restore()
    assert data.read == 0
    assert loop.run() is None
    assert data.read == 6  # the rest of its pass


def test_a_shorter_stream_cannot_be_resumed(tmp_path: Path) -> None:
    assert loop_of(Plain(), tmp_path, steps=2).run() is None
    loop = loop_of(DataLoader(Short(), batch_size=8), tmp_path, steps=3)
    with pytest.raises(CheckpointError, match=r"had read 16 samples of this pass.*ends after 9"):
        loop.restore()


def test_a_stream_trains_as_the_list_does(tmp_path: Path) -> None:
    class InOrder(IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            return iter(ROWS)

    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    whole = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    whole.load_state_dict(model.state_dict())
    job = a_job(model, data=InOrder())
    config = resolve(load_settings({"steps": 3, "schedule": "constant"}), job, device=CPU)
    directory = RunDirectory(tmp_path)
    directory.start(config="", files={})
    TrainingLoop(job, config=config, run=directory).run()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    for start, stop in [(0, 8), (8, 16), (16, 22)]:
        batch = torch.utils.data.default_collate(ROWS[start:stop])
        loss = token_loss(whole, batch)
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["samples", "loader", "loader of a stream"])
def test_ranks_share_each_batch_of_the_same_stream(kind: str) -> None:
    """Every rank reads with the same random numbers, so that their shares are of one batch."""
    shares: list[list[Any]] = []
    config = resolve(load_settings({"steps": 4}), a_job(data=STREAMS[kind]()), device=CPU)
    for rank in range(3):
        job = a_job(data=STREAMS[kind]())
        reader = StreamBatches(job, config=config, place=Place(ranks=3, shares=3, share=rank), rank=rank)
        shares.append(taken(reader, 4))
    job = a_job(data=STREAMS[kind]())
    alone = StreamBatches(job, config=config, place=Place(), rank=0)
    for step, whole in enumerate(taken(alone, 4)):
        assert torch.equal(torch.cat([shares[rank][step] for rank in range(3)]), whole)


def taken(reader: StreamBatches, steps: int) -> list[Tensor]:
    found, position = list[Tensor](), Position()
    for step in range(steps):
        reader.seed(step)
        batch, position = reader.take(step, position)
        parts = batch.batches if isinstance(batch, mb.Batches) else [batch]
        found.append(torch.cat([part["x"] for part in parts]))
    return found


def test_a_stream_of_unknown_length_needs_steps() -> None:
    job = a_job(data=Plain(), steps=None, epochs=2.0)
    with pytest.raises(ConfigError, match="has no known number of samples; pass --steps"):
        resolve(load_settings({}), job, device=CPU)
    assert resolve(load_settings({}), a_job(data=Epochs(), steps=None, epochs=2.0), device=CPU).steps == 6


def test_batches_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch_size is 8, and its loader's batches have 3 rows"):
        loop_of(DataLoader(ListSet(), batch_size=3), tmp_path).run()


def test_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="--deterministic: the job's data is read in its own order"):
        resolve(load_settings({"deterministic": True, "microbatch_size": 2}), a_job(data=Plain()), device=CPU)
    with pytest.raises(ConfigError, match="a generator, which can be read once only"):
        resolve(load_settings({}), a_job(data=(row for row in ROWS)), device=CPU)
    with pytest.raises(ConfigError, match="has no batch_size"):
        resolve(load_settings({}), a_job(data=DataLoader(ListSet(), batch_size=None)), device=CPU)


def test_the_first_batch_of_a_job() -> None:
    def rows(job: Job) -> int:
        return len(job.first_batch()["x"])

    assert [rows(a_job(data=data)) for data in (ROWS, Plain(), DataLoader(ListSet(), batch_size=8))] == [8, 8, 8]
    assert rows(a_job(data=DataLoader(ListSet(), batch_size=4))) == 8
    ragged = DataLoader(ListSet(), batch_size=4, collate_fn=Ragged())
    assert rows(a_job(data=ragged)) == 4  # batches of other widths are not one batch
    with pytest.raises(DataError, match="0 samples"):
        a_job(data=DataLoader(ListSet(), batch_size=8, sampler=[])).first_batch()


def test_a_loader_of_smaller_batches_is_compared_with_the_full_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microbatch.train.start import prepare

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text(
        "import torch, microbatch as mb\n"
        "def job():\n"
        "    torch.manual_seed(0)\n"
        "    model, rows = torch.nn.Linear(2, 1), torch.utils.data.TensorDataset(torch.randn(24, 2))\n"
        "    return mb.Job(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),\n"
        "                  loss_fn=lambda m, x: m(x[0]).square().mean(), batch_size=8, microbatch_size=2, steps=2,\n"
        "                  data=torch.utils.data.DataLoader(rows, batch_size=4))\n"
    )
    summary = prepare({"job": "a.py:job"}, run=tmp_path / "run").train()
    assert summary["comparison"]["samples"] == 8
