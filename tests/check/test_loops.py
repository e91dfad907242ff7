"""The classic mistakes in a loop of one's own are named, and a loop without them is let through."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import microbatch as mb
from microbatch.errors import CheckError, ConfigError

from .loops import LOOPS, Written, scheduling
from .programs import SIZE, batch, network, squared


def found_in(written: Written, **more: Any) -> mb.Check:
    model = written.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return mb.check(model, written.loss_fn, batch(), loop=written.loop, optimizer=optimizer, **more)


@pytest.mark.parametrize("name", LOOPS)
def test_all_mistakes_are_named_and_no_other(name: str) -> None:
    written = LOOPS[name]
    found = found_in(written)
    assert {cause.kind for cause in found.causes} == written.planted, str(found)
    assert found.ok == (written.planted <= {"host_reads"}), str(found)
    assert (found.microbatch_size, found.microbatches) == (SIZE, 4)


@pytest.mark.parametrize("every_microbatch", [False, True])
def test_a_scheduler_is_stepped_once_a_window(every_microbatch: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    loop = scheduling(scheduler, every_microbatch=every_microbatch)
    found = mb.check(model, squared, batch(), loop=loop, optimizer=optimizer)
    assert [cause.kind for cause in found.causes] == ["scheduler"] * every_microbatch
    assert found.equal
    assert found.ok is not every_microbatch
    assert (scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (0, 0.1)


def test_the_amounts_are_what_each_mistake_makes() -> None:
    zeroed = {cause.kind: cause for cause in found_in(LOOPS["zeroed inside and not divided"]).causes}
    only_zeroed, only_undivided = (found_in(LOOPS[name]).causes[0] for name in ("zeroed inside", "not divided"))
    assert zeroed["zeroed_inside"].alone == pytest.approx(only_zeroed.alone)
    assert zeroed["not_divided"].alone == pytest.approx(only_undivided.alone)
    assert only_undivided.alone == pytest.approx(3)  # four times the gradient
    assert zeroed["zeroed_inside"].without == pytest.approx(3)
    assert zeroed["not_divided"].without == pytest.approx(only_zeroed.alone)


@pytest.fixture
def one_rank() -> Iterator[None]:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] - public by name, and in torch's own pages
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def synchronising(model: Any, optimizer: Any, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        (squared(model, microbatch) * len(microbatch["x"]) / len(batch["x"])).backward()
    optimizer.step()
    optimizer.zero_grad()


def synchronising_once(model: Any, optimizer: Any, batch: Any) -> None:
    *first, last = mb.cut(batch, SIZE)
    with model.no_sync():
        for microbatch in first:
            (squared(model, microbatch) * len(microbatch["x"]) / len(batch["x"])).backward()
    (squared(model, last) * len(last["x"]) / len(batch["x"])).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("loop", "kinds"), [(synchronising, ["reductions"]), (synchronising_once, [])])
def test_reductions_are_counted(loop: Any, kinds: list[str]) -> None:
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = mb.check(model, squared, batch(), loop=loop, optimizer=optimizer)
    assert [cause.kind for cause in found.causes] == kinds, str(found)
    assert found.ok


def test_a_loop_that_takes_no_step_is_said() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CheckError, match="took no optimizer step"):
        mb.check(model, squared, batch(), loop=lambda model, optimizer, batch: None, optimizer=optimizer)
    with pytest.raises(ConfigError, match="together"):
        mb.check(model, squared, batch(), loop=lambda model, optimizer, batch: None)


def test_a_loop_that_minimises_something_else_is_not_explained_away() -> None:
    def other(model: nn.Module, optimizer: Any, batch: Any) -> None:
        for microbatch in mb.cut(batch, SIZE):
            (model(microbatch["x"]).abs().mean() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = mb.check(model, squared, batch(), loop=other, optimizer=optimizer)
    assert [cause.kind for cause in found.causes] == ["unexplained"]
