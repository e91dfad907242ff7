"""What must hold on an accelerator with as little as MPS: ``python -m tests.devices.small_scenarios [NAME ...]``."""

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.devices.scenario_parts import (
    Classifier,
    apart,
    batch_of,
    entropy,
    events,
    gradients,
    limited,
    on_device,
    peak_of,
    reference,
    run,
    scenario,
    trained,
)
from tests.devices.simulated_device import DEVICE, GIB, Small
from torch import Tensor, nn

import microbatch as mb
from microbatch.batch.prefetch import feed
from microbatch.devices import available_devices, backend, device_memory
from microbatch.errors import ConfigError, CountError, OutOfMemoryError
from microbatch.ranks.process_group import RankGroup
from microbatch.step.host_numbers import numbers_of


@scenario
def a_step_without_float64_is_as_exact_as_float32_is() -> None:
    rows, model, host = batch_of(18, torch.float32), on_device(torch.float32), Classifier(torch.float32)
    step = trained(model, 4).gradient(rows, entropy)
    entropy(host, rows).backward()
    own = apart(gradients(host), reference(rows))
    assert apart(gradients(model), reference(rows)) <= own + 2**-23
    assert step.loss.dtype is torch.float32
    assert abs(step.loss.item() - entropy(host, rows).item()) < 1e-6
    with pytest.raises(TypeError):
        torch.ones(2, dtype=torch.float64, device=DEVICE)
    assert backend.wide_dtype(DEVICE) is torch.float32


@scenario
def counts_are_exact_above_what_float32_holds() -> None:
    large = (1 << 24) + 1
    counts = [torch.tensor(large + index, device=DEVICE) for index in range(4)] + [torch.tensor(-5, device=DEVICE)]
    assert numbers_of(counts, DEVICE) == [large, large + 1, large + 2, large + 3, -5]
    assert float(torch.tensor(large, dtype=torch.float32)) != large  # what would be read

    def loss(model: nn.Module, piece: dict[str, Tensor]) -> mb.Loss:
        count = (piece["y"] >= 0).sum() * large
        return mb.Loss(sum=F.cross_entropy(model(piece["x"]), piece["y"], reduction="sum"), count=count)

    rows = batch_of(15, torch.float32)
    step = trained(on_device(torch.float32), 4).step(rows, loss)
    assert step.count == 15 * large, step


@scenario
def a_negative_count_is_refused() -> None:
    def loss(model: nn.Module, piece: dict[str, Tensor]) -> mb.Loss:
        count = torch.tensor(-1 if len(piece["x"]) < 4 else 9, device=DEVICE)
        return mb.Loss(sum=model(piece["x"]).sum(), count=count)

    with pytest.raises(CountError) as caught:
        trained(on_device(torch.float32), 4).step(batch_of(15, torch.float32), loss)
    assert "is -1" in str(caught.value)


@scenario
def a_budget_is_held_by_counting_tensors() -> None:
    rows, model = batch_of(256, torch.float32), on_device(torch.float32)
    step = trained(model, "auto", memory_budget=48 << 10).step(rows, entropy)
    assert step.microbatch_size < 256
    assert 0 < peak_of(step) <= 48 << 10
    assert apart(gradients_after(rows), reference(rows)) < 1e-5


def gradients_after(rows: dict[str, Tensor]) -> list[Tensor]:
    model = on_device(torch.float32)
    trained(model, "auto", memory_budget=48 << 10).gradient(rows, entropy)
    return gradients(model)


@scenario
def memory_that_ends_is_recovered_from() -> None:
    rows, model = batch_of(64, torch.float32), on_device(torch.float32, dropout=0.5)

    def loss(model: nn.Module, piece: dict[str, Tensor]) -> Tensor:
        return entropy(model, piece) + torch.zeros(len(piece["x"]), 1 << 14, device=DEVICE).sum() * 0

    torch.manual_seed(5)
    accumulator = trained(model, "auto")
    with limited(1_200_000):
        step = accumulator.step(rows, loss)
    assert step.microbatch_size < 64
    again = on_device(torch.float32, dropout=0.5)
    torch.manual_seed(5)
    trained(again, step.microbatch_size).step(rows, loss)
    assert all(
        torch.equal(one.cpu(), other.cpu()) for one, other in zip(model.parameters(), again.parameters(), strict=True)
    )


@scenario
def a_row_that_does_not_fit_names_the_bytes_in_use() -> None:
    model = on_device(torch.float32)
    with limited(100):  # in forward: an error of a meter in the device's own thread would end this process
        with pytest.raises(OutOfMemoryError) as caught:
            trained(model, "auto").step(batch_of(8, torch.float32), entropy)
        assert caught.value.in_use is not None


@scenario
def memory_is_known_as_far_as_the_backend_tells() -> None:
    assert device_memory.allocator_of(DEVICE) is None
    assert device_memory.bytes_in_use(DEVICE) == Small.live
    assert device_memory.total_bytes(DEVICE) == GIB
    assert device_memory.free_bytes(DEVICE) == (GIB) - Small.live


@scenario
def what_is_lacking_is_said() -> None:
    found = " ".join(available_devices.lacking(DEVICE))
    for each in ("peak memory", "streams", "pinned", "float64"):
        assert each in found, found
    assert "random state" not in found


@scenario
def microbatches_are_copied_when_their_turn_comes() -> None:
    Small.log.clear()
    arrived = feed([torch.ones(3), torch.ones(3)], DEVICE)
    next(arrived)
    assert len(events("copy")) == 1
    next(arrived)
    assert len(events("copy")) == 2


@scenario
def what_cannot_be_offloaded_stays() -> None:
    model, x = on_device(torch.float32, width=256), torch.randn(256, 8).to(DEVICE)
    with pytest.warns(mb.MicrobatchWarning, match="sim stay there, and offloading frees nothing"):
        spill = mb.Spill(model, x)
    with spill:
        loss = model(x).sum()
    assert spill.bytes_held == 0
    loss.backward()


@scenario
def autocast_that_is_not_there_is_refused() -> None:
    rows, model = batch_of(8, torch.float32), on_device(torch.float32)
    trained(model, 4, autocast=torch.bfloat16).step(rows, entropy)
    Small.bfloat16 = False
    with pytest.raises(ConfigError, match="sim:0 has no bfloat16"):
        trained(model, 4, autocast=torch.bfloat16).step(rows, entropy)
    trained(model, 4, autocast=torch.float16).step(rows, entropy)
    Small.bfloat16 = True


@scenario
def a_check_goes_through_the_host() -> None:
    model, rows = on_device(torch.float32), batch_of(16, torch.float32)
    report = mb.check(model, entropy, rows, microbatch_size=4)
    assert report.equal, report

    def divided(model: nn.Module, piece: dict[str, Tensor]) -> Tensor:
        return entropy(model, piece) * len(piece["x"])

    assert not mb.check(model, divided, rows, microbatch_size=4).equal


@scenario
def ranks_talk_through_the_host() -> None:

    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        assert RankGroup(None, DEVICE).device == torch.device("cpu")
        dist.destroy_process_group()


if __name__ == "__main__":
    run(Small, dict(globals()))
