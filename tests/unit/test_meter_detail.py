"""A detailed meter says what each byte is and who made it, and is the same on fake tensors."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.checkpoint import checkpoint

from microbatch.errors import ConfigError, OutOfMemoryError
from microbatch.memory.meter import MemoryMeter


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def network() -> nn.Module:
    body = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    return nn.Sequential(body, Checkpointed(copy.deepcopy(body)), nn.BatchNorm1d(16), nn.Linear(16, 500))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    for _ in range(2):
        F.cross_entropy(model(batch), batch[:, 0].long()).backward()
    optimizer.step()
    optimizer.zero_grad()


def measured(*, detail: bool = False, timeline: bool = False, rows: int = 32) -> MemoryMeter:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.rand(rows, 16)
    meter = MemoryMeter(detail=detail, timeline=timeline)
    meter.track(model, optimizer, batch)
    with meter:
        step(model, optimizer, batch)
    return meter


WEIGHTS = sum(parameter.numel() * 4 for parameter in network().parameters())
BUFFERS = 2 * 16 * 4 + 8


def test_the_peak_is_its_categories() -> None:
    report = measured(detail=True).report()
    assert sum(report.at_peak.values()) == report.peak_bytes
    assert sum(part.bytes for part in report.parts) == report.peak_bytes
    assert report.at_peak["parameters"] == WEIGHTS
    assert report.at_peak["buffers"] == BUFFERS
    assert report.at_peak["inputs"] == 32 * 16 * 4


def test_the_peak_does_not_depend_on_how_closely_one_looks() -> None:
    peaks = {measured().peak_bytes, measured(detail=True).peak_bytes, measured(timeline=True).peak_bytes}
    assert len(peaks) == 1


def test_gradients_and_the_state_of_the_first_step_are_seen() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with MemoryMeter(detail=True) as meter:
        meter.track(model, optimizer)
        F.cross_entropy(model(torch.rand(8, 16)), torch.arange(8)).backward()
        assert meter.report().live["gradients"] == WEIGHTS
        optimizer.step()
        steps = 4 * len(list(model.parameters()))
        live = meter.report().live
        assert live == {
            "parameters": WEIGHTS,
            "buffers": BUFFERS,
            "gradients": WEIGHTS,
            "optimizer state": 2 * WEIGHTS + steps,
        }
        optimizer.zero_grad()
    assert "gradients" not in meter.report().live


def test_a_gradient_that_is_a_view_counts_with_all_it_holds() -> None:
    weight = nn.Parameter(torch.zeros(10))
    holder = nn.ParameterList([weight])
    meter = MemoryMeter(detail=True)
    meter.track(holder)
    with meter:
        weight.grad = torch.zeros(4, 10)[0]
    assert meter.report().live == {"parameters": 40, "gradients": 160}


def test_a_sum_wider_than_its_parameter_is_a_gradient() -> None:
    model = nn.Linear(10, 10, bias=False, dtype=torch.bfloat16)
    sums: list[Tensor] = []

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        sums.append(parameter.grad.float())
        parameter.grad = None

    model.weight.register_post_accumulate_grad_hook(move)
    meter = MemoryMeter(detail=True)
    meter.track(model)
    with meter:
        model(torch.ones(3, 10, dtype=torch.bfloat16)).sum().backward()
    assert meter.report().live["gradients"] == 400


def test_the_largest_part_names_module_and_operator() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(5000, 8), nn.Linear(8, 5000, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.tokens(ids))

    model, ids = Tied(), torch.arange(64)
    meter = MemoryMeter(detail=True)
    meter.track(model, ids)
    with meter:
        logits = model(ids)
        part = meter.report().parts[0]
    assert (part.category, part.module, part.operator) == ("activations", "head", "aten.mm.default")
    assert part.bytes == 64 * 5000 * 4 == logits.untyped_storage().nbytes()
    assert "activations of aten.mm in head" in meter.report().table()


def test_backward_is_named_after_the_module_whose_forward_it_undoes() -> None:
    model = nn.Sequential(nn.Linear(4, 300, bias=False), nn.Tanh(), nn.Linear(300, 4, bias=False))
    x = torch.ones(200, 4)
    meter = MemoryMeter(detail=True)
    meter.track(model, x)
    with meter:
        model(x).sum().backward()
    made = {(part.category, part.module, part.operator) for part in meter.report().parts}
    # The gradient of the second layer's input, then of tanh's.
    assert ("temporaries", "2", "aten.mm.default") in made
    assert ("temporaries", "1", "aten.tanh_backward.default") in made


def test_what_a_checkpoint_computes_again_is_activations_of_its_module() -> None:
    inner = nn.Sequential(nn.Linear(8, 400), nn.Tanh(), nn.Tanh(), nn.Linear(400, 8))
    model, x = nn.Sequential(Checkpointed(inner), nn.Linear(8, 8)), torch.ones(100, 8)
    meter = MemoryMeter(detail=True)
    meter.track(model, x)
    with meter:
        model(x).sum().backward()
    made = {(part.category, part.module): part.bytes for part in meter.report().parts}
    assert made["activations", "0.inner.1"] == 100 * 400 * 4


def test_a_failed_forward_does_not_confuse_where_one_is() -> None:
    class Fails(nn.Module):
        def forward(self, _x: Tensor) -> Tensor:
            raise ValueError("on purpose")

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Fails()))
    meter = MemoryMeter(detail=True)
    meter.track(model)
    with meter:
        with pytest.raises(ValueError, match="on purpose"):
            model(torch.ones(2, 4))
        kept = torch.zeros(1000)
    part = meter.report().parts[0]
    assert (part.module, part.bytes) == ("", kept.nbytes)


def test_nothing_is_left_in_torchs_hooks() -> None:
    measured(detail=True)
    assert not _global_forward_hooks
    assert not _global_forward_pre_hooks


def test_the_report_is_plain_json() -> None:
    report = measured(detail=True).report()
    read = json.loads(json.dumps(report.as_dict()))
    assert read["peak_bytes"] == report.peak_bytes
    assert read["parts"][0]["bytes"] == report.parts[0].bytes


def test_a_plain_meter_reports_its_totals() -> None:
    meter = measured()
    report = meter.report()
    assert (report.peak_bytes, report.at_peak, list(report.parts)) == (meter.peak_bytes, {}, [])
    assert meter.timeline.live == []


def test_a_category_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer state"):
        MemoryMeter().track(torch.zeros(1), category="weights")


# -- the timeline -----------------------------------------------------------------------------------------------------


def test_the_timeline_is_every_operator_with_what_was_alive_after_it() -> None:
    meter = MemoryMeter(timeline=True)
    with meter:
        a = torch.zeros(10)
        b = a + 1
        del a
        c = b * 2
    timeline = meter.timeline
    assert list(timeline.operators) == ["aten.zeros.default", "aten.add.Tensor", "aten.mul.Tensor"]
    assert list(timeline.live) == [40, 80, 80]
    assert len(c) == 10


def test_every_moment_of_the_timeline_is_its_categories() -> None:
    meter = measured(timeline=True)
    timeline = meter.timeline
    assert timeline.peak_bytes == meter.peak_bytes
    assert all(sum(timeline.parts(i).values()) == live for i, live in enumerate(timeline.live))


def fake_of(run: Callable[..., object], *things: object) -> MemoryMeter:
    """Run the same on fake copies."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        copies = copy.deepcopy(things)
    meter = MemoryMeter(timeline=True)
    meter.track(*copies)
    with mode, meter:
        run(*copies)
    return meter


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_fake_tensors_take_what_real_ones_take_to_the_byte(optimizer_class: Any) -> None:
    model = network()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    batch = torch.rand(32, 16)
    fake = fake_of(step, model, optimizer, batch)
    real = MemoryMeter(timeline=True)
    real.track(model, optimizer, batch)
    with real:
        step(model, optimizer, batch)
    assert list(fake.timeline.operators) == list(real.timeline.operators)
    assert list(fake.timeline.live) == list(real.timeline.live)
    assert fake.report().at_peak == real.report().at_peak


def test_the_comparison_of_fake_and_real_sees_one_row_more() -> None:
    assert measured(rows=33).peak_bytes != measured(rows=32).peak_bytes


def test_storages_are_rounded_up_to_the_allocators_blocks() -> None:
    meter = MemoryMeter(block=512)
    with meter:
        held = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
    assert meter.live_bytes == 512 + 512 + 1024
    assert len(held) == 3


# -- the error --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detail", [False, True])
def test_the_error_says_which_module_asked_for_how_much(detail: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 1000)))
    x = torch.ones(50, 4)
    meter = MemoryMeter(budget=100_000, detail=detail)
    meter.track(model, x)
    with meter, pytest.raises(OutOfMemoryError, match=r"in '1\.1'") as caught:
        model(x)
    error = caught.value
    assert error.module == "1.1"
    assert error.operator == "aten.addmm.default"
    assert (error.asked, error.budget) == (50 * 1000 * 4, 100_000)
    assert error.in_use is not None
    assert error.in_use <= 100_000 < error.in_use + 200_000


def test_the_error_in_backward_says_the_module_to_a_detailed_meter() -> None:
    model = nn.Sequential(nn.Linear(4, 1000), nn.Tanh(), nn.Linear(1000, 4))
    x = torch.ones(50, 4)
    loss = model(x).sum()
    del loss
    static = MemoryMeter()
    static.track(model, x)
    meter = MemoryMeter(budget=static.live_bytes + 2 * 200_000 + 10_000, detail=True)
    meter.track(model, x)
    with meter, pytest.raises(OutOfMemoryError) as caught:
        model(x).sum().backward()
    assert caught.value.module == "2"


# -- on a device ------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_on_cuda_the_live_bytes_are_the_allocators() -> None:
    torch.empty(1, device="cuda")
    model = network().cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.rand(32, 16, device="cuda")
    step(model, optimizer, batch)  # cuBLAS takes its workspace
    meter = MemoryMeter(detail=True, block=512)
    meter.track(model, optimizer, batch)
    torch.cuda.reset_peak_memory_stats()
    before, held = torch.cuda.memory_allocated(), meter.live_bytes
    with meter:
        step(model, optimizer, batch)
    assert meter.live_bytes - held == torch.cuda.memory_allocated() - before
    assert meter.peak_bytes - held == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.02)
