"""Blocks that are computed again in backward: the same gradient, with less kept until then."""

import copy
import inspect
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from microbatch.errors import ConfigError, OutOfMemoryError
from microbatch.memory.recompute import blocks_of, checkpointed
from microbatch.step.size.auto_checkpoint import Weight, by_worth, fewest, weigh
from microbatch.step.size.dry_run import dry_run_at

pytestmark = pytest.mark.filterwarnings("ignore:buffers move")  # counters, to see how often forward runs

WIDTH = 32


class Block(nn.Module):
    """Everything that a second forward pass might do differently."""

    def __init__(self, width: int = WIDTH, *, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.up = nn.utils.parametrizations.spectral_norm(nn.Linear(width, 2 * width))
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.calls: Tensor

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        self.calls += 1
        noise = 1 + random.random() + float(np.random.rand())  # noqa: NPY002, S311 - the global generators are meant
        wave = torch.sin(scale * self.calls)
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x))))) * noise * wave


class Net(nn.Module):
    def __init__(self, blocks: int = 3, **how: Any) -> None:
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block(**how) for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = block(h, scale=self.scale)
        return self.head(h)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def start_over() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global generator is meant


def after(model: nn.Module, x: Tensor, *, steps: int = 2, **options: Any) -> tuple[dict[str, Tensor], Tensor, mb.Step]:
    """Return weights and buffers after a few steps, a number drawn then, and the last step."""
    twin = copy.deepcopy(model)
    start_over()
    accumulator = mb.Accumulator(
        twin, SGD(twin.parameters(), lr=0.1), microbatch_size=4, batch_norm="microbatch", **options
    )
    step = [accumulator.step(x, loss_fn) for _ in range(steps)][-1]
    return dict(twin.state_dict()), torch.rand(1), step


# -- the same ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("blocks", ["all", ["blocks.1"], ("blocks.0.down", "head")])
def test_every_step_is_the_same_to_the_last_bit(
    fuse: bool, blocks: Any, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microbatch.gradients.fused_matmul.SMALLEST", 1)
    model, x = Net(), torch.randn(10, 8)
    expected, drawn, plain = after(model, x, sums=mb.Sums(fuse=fuse), autocast=autocast)
    found, drawn_too, again = after(model, x, sums=mb.Sums(fuse=fuse), autocast=autocast, checkpoint=blocks)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(drawn, drawn_too)  # whatever comes next draws the same
    assert again.fused == plain.fused
    assert (again.fused > 0) == fuse
    assert int(found["blocks.1.calls"]) == 2 * 3


class Usual(Net):
    """The negative control: torch's own checkpoint, around the same blocks."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h: Any = checkpoint(block, h, scale=self.scale, use_reentrant=False)
        return self.head(h)


def test_a_checkpoint_that_forgets_buffers_is_told_apart() -> None:
    model, usual, x = Net(), Usual(), torch.randn(10, 8)
    usual.load_state_dict(model.state_dict())
    expected, _, _ = after(model, x)
    found, _, _ = after(usual, x)
    assert int(found["blocks.1.calls"]) == 2 * int(expected["blocks.1.calls"])
    for name in ("blocks.0.norm.running_var", "blocks.2.down.weight", "first.weight"):
        assert not torch.allclose(found[name], expected[name]), name


@pytest.mark.parametrize("frozen", ["first.", "blocks.0.", "blocks.", "scale"])
def test_frozen_parameters_stay_out_of_it(frozen: str) -> None:
    model, x = Net(), torch.randn(10, 8)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    expected, _, _ = after(model, x)
    found, _, _ = after(model, x, checkpoint="all")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_hooks_are_called_and_the_model_is_as_it_was() -> None:
    model, x = Net(), torch.randn(4, 8)
    called: list[str] = []
    names = list(model.state_dict())
    handles: list[Any] = []
    for name in ("blocks.0", "blocks.1"):
        block = model.get_submodule(name)
        handles += [
            block.register_forward_pre_hook(lambda *_, name=name: called.append(f"{name} in")),
            block.register_forward_hook(lambda *_, name=name: called.append(f"{name} out")),
            block.register_full_backward_hook(lambda *_, name=name: called.append(f"{name} back")),
        ]
    handles.append(model.get_submodule("blocks.0.down").register_forward_hook(lambda *_: called.append("inside")))
    with checkpointed(model, ["blocks.0"]):
        assert list(model.state_dict()) == names
        loss = loss_fn(model, x)
    assert called == ["blocks.0 in", "inside", "blocks.0 out", "blocks.1 in", "blocks.1 out"]
    called.clear()
    loss.backward()
    # Only what is inside is called twice.
    assert called == ["blocks.1 back", "inside", "blocks.0 back"]
    for handle in handles:
        handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_copy_made_meanwhile_is_of_its_own() -> None:
    model, x = Net(norm=False), torch.randn(4, 8)
    with checkpointed(model):
        twin = copy.deepcopy(model)
        assert inspect.signature(model.blocks[0].forward) == inspect.signature(Net(1).blocks[0].forward)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loss_fn(twin, x).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_an_instance_that_has_a_forward_of_its_own_keeps_it() -> None:
    model = Net(norm=False)
    block = model.blocks[0]
    own: Callable[..., Tensor] = lambda x, *, scale: x * scale  # noqa: E731 - what a library that wraps forwards leaves
    vars(block)["forward"] = own
    with checkpointed(model, ["blocks.0"]):
        assert block(torch.ones(2, WIDTH), scale=torch.ones(())).sum() == 2 * WIDTH
    assert vars(block)["forward"] is own
    with pytest.raises(ZeroDivisionError), checkpointed(model, ["blocks.0"]):
        raise ZeroDivisionError
    assert vars(block)["forward"] is own


def test_an_input_that_is_written_to_meanwhile_is_refused_and_not_used() -> None:
    model, scale = Net(norm=False), torch.ones((), requires_grad=False)
    h = torch.randn(4, WIDTH, requires_grad=True) * 1
    with checkpointed(model):
        out = model.blocks[0](h, scale=scale)
    scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Writes(nn.Module):
    """A block that counts in a buffer too large to be copied each time."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(elements))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen[: len(x)] += x.detach().sum(1)
        return torch.tanh(self.inner(x)) * (1 + self.seen.sum())


def test_a_large_buffer_that_is_written_to_is_refused_by_name() -> None:
    for elements in (1 << 14, 1 << 15):
        model = nn.Sequential(Writes(elements), Writes(elements), nn.Linear(8, 1))
        accumulator = mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=4, checkpoint="all")
        if elements * 4 <= 1 << 16:
            accumulator.step(torch.randn(4, 8), loss_fn)
            continue
        with pytest.raises(ConfigError, match=r"'1' wrote to its buffer 'seen'"):
            accumulator.step(torch.randn(4, 8), loss_fn)
        assert torch.equal(model.state_dict()["0.seen"], torch.zeros(elements))


def test_gradients_of_gradients_pass_through() -> None:
    model, x = Net(norm=False), torch.randn(4, 8)

    def penalty(model: nn.Module) -> list[Tensor]:
        start_over()
        (gradient,) = torch.autograd.grad(loss_fn(model, x), [model.get_parameter("scale")], create_graph=True)
        (gradient**2).backward()
        found = [each.grad.clone() for each in model.parameters() if each.grad is not None]
        model.zero_grad()
        return found

    plain = penalty(copy.deepcopy(model))
    with checkpointed(model):
        again = penalty(model)
    assert len(plain) == len(again) > 4
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# -- which blocks -----------------------------------------------------------------------------------------------------


def test_blocks_are_what_repeats_and_has_parts() -> None:
    assert blocks_of(Net(4)) == [f"blocks.{index}" for index in range(4)]
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh())) == []
    stages = nn.Sequential(*(nn.Sequential(Block(), Block()) for _ in range(2)), Block())
    assert blocks_of(stages) == ["0", "1"]  # the outermost; a single Block is not repeated
    assert blocks_of(nn.ModuleDict({"left": Net(2), "right": Net(2)})) == [
        f"{side}.blocks.{index}" for side in ("left", "right") for index in range(2)
    ]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["blocks.7"], "no submodule 'blocks.7'; did you mean 'blocks"),
        ([""], "no submodule ''"),
        (["blocks.0", "blocks.0.down"], "'blocks.0.down' lies inside 'blocks.0'"),
        ("blok", "no submodule 'blok'"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(names: Any, words: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=1, checkpoint=names)


def test_what_cannot_be_checkpointed_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="no repeated blocks in Linear"):
        mb.Accumulator(model, optimizer, microbatch_size=1, checkpoint="all")
    with pytest.raises(ConfigError, match="compiler"):
        mb.Accumulator(model, optimizer, microbatch_size=1, checkpoint=["x"], compile=True)


class Uneven(nn.Module):
    """Three blocks: what they keep and what they take are in no proportion."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Keeps(layers) for layers in (1, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Keeps(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.inner = nn.Linear(512, 512)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for _ in range(self.layers):
            x = torch.tanh(x)
        return x


def settings_of(model: nn.Module, **options: Any) -> Any:
    return mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=8, **options).options


def test_what_a_block_keeps_is_weighed_without_its_output() -> None:
    model, x = Uneven(), torch.randn(16, 512)
    weights = weigh(settings_of(model), loss_fn, batch=x)
    assert [each.name for each in weights] == ["blocks.0", "blocks.1", "blocks.2"]
    # One tanh's output is the block's own; the linear layer keeps its input, which is the block's.
    assert [each.bytes for each in weights] == [0, 5 * 512 * 4, 2 * 512 * 4]
    assert all(each.seconds > 0 for each in weights)


def test_most_bytes_for_a_second_go_first_and_no_more_than_needed() -> None:
    heavy = [
        Weight(name=name, bytes=size, seconds=taken) for name, size, taken in (("a", 4, 4), ("b", 3, 1), ("c", 4, 2))
    ]
    assert [each.name for each in by_worth(heavy)] == ["b", "c", "a"]
    model, x = layers(4), torch.randn(64, 64)
    settings = settings_of(model)

    def peak(count: int) -> int:
        names = [f"{index}" for index in range(count)]
        return dry_run_at(settings_of(model, checkpoint=names), loss_fn, batch=x, size=64)

    peaks = {count: peak(count) for count in (0, 2, 4)}
    assert peaks[0] > peaks[2] > peaks[4]
    for count, budget in peaks.items():
        found = fewest(settings, loss_fn, batch=x, size=64, budget=budget)
        assert found == tuple(f"{index}" for index in range(count))
    assert fewest(settings, loss_fn, batch=x, size=64, budget=peaks[4] - 1) is None


def test_where_the_last_block_only_makes_it_worse_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [9, 7, 5, 3, 4]
    taken: list[int] = []

    def rehearsed(settings: Any, *_: Any, **__: Any) -> int:
        taken.append(len(settings.checkpoint))
        return peaks[taken[-1]]

    monkeypatch.setattr("microbatch.step.size.auto_checkpoint.dry_run_at", rehearsed)
    names = [f"{index}" for index in range(4)]
    find = partial(fewest, settings_of(layers(4)), loss_fn, batch=torch.zeros(4, 64), size=4, ranked=names)
    assert find(budget=3) == tuple(names[:3])
    assert find(budget=7) == tuple(names[:1])
    assert find(budget=9) == ()
    assert find(budget=2) is None
    taken.clear()
    find(budget=5)
    assert len(taken) <= 5


def layers(count: int) -> nn.Module:
    """Blocks alone, which fake tensors run through in no time."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Tanh()) for _ in range(count)))


# -- what it takes ----------------------------------------------------------------------------------------------------


def measured(model: nn.Module, x: Tensor, **options: Any) -> int:
    accumulator = mb.Accumulator(model, SGD(model.parameters(), lr=0.1), memory_budget="1 GiB", **options)
    steps = [accumulator.step(x, loss_fn) for _ in range(2)]
    return max(step.peak_bytes or 0 for step in steps)


def test_less_memory_is_taken_and_predicted_so() -> None:
    x = torch.randn(512, 8)
    peaks: list[int] = []
    choices: Sequence[Any] = ((), ["blocks.0", "blocks.2"], "all")
    for checkpoint_ in choices:
        model = Net(8, norm=False)
        peaks.append(measured(model, x, microbatch_size=256, checkpoint=checkpoint_))
        predicted = dry_run_at(settings_of(model, checkpoint=checkpoint_), loss_fn, batch=x, size=256)
        assert predicted == pytest.approx(peaks[-1], rel=0.01)
    assert peaks[0] > peaks[1] > peaks[2]
    assert peaks[2] < 0.6 * peaks[0]


def test_offloaded_activations_are_predicted_too() -> None:
    model, x = Net(8, norm=False), torch.randn(1024, 8)
    plain, away = (
        dry_run_at(settings_of(model, offload=offload), loss_fn, batch=x, size=512) for offload in (None, "activations")
    )
    taken = measured(model, x, microbatch_size=512, offload=mb.Spill(model))
    assert away == pytest.approx(taken, rel=0.05)
    assert away < plain / 2


def test_auto_checkpoints_as_few_as_fit_and_none_where_all_does() -> None:
    model, x = layers(6), torch.randn(512, 64)
    choices: Sequence[Any] = ((), ["0", "1", "2"])
    peaks = [dry_run_at(settings_of(model, checkpoint=names), loss_fn, batch=x, size=256) for names in choices]
    for budget, expected in ((2 * peaks[0], ()), (int(1.04 * peaks[1]), ("0", "1", "2"))):
        accumulators = [
            mb.Accumulator(
                model, SGD(model.parameters(), lr=0.1), microbatch_size=256, checkpoint="auto", memory_budget=budget
            )
            for _ in range(2)
        ]
        step = accumulators[0].step(x, loss_fn)
        assert accumulators[0]._it.checkpointing.blocks == expected
        assert step.retries == 0
        accumulators[1].load_state_dict(accumulators[0].state_dict())
        assert accumulators[1]._it.checkpointing.blocks == expected


def test_where_no_row_fits_auto_lets_one_fit() -> None:
    model, x = layers(6), torch.randn(4, 512, 64)
    budget = int(1.05 * dry_run_at(settings_of(model, checkpoint="all"), loss_fn, batch=x, size=1))
    assert dry_run_at(settings_of(model), loss_fn, batch=x, size=1) > budget
    with pytest.raises(OutOfMemoryError, match=r'checkpoint="all"'):
        mb.Accumulator(model, SGD(model.parameters(), lr=0.1), memory_budget=budget).step(x, loss_fn)
    accumulator = mb.Accumulator(model, SGD(model.parameters(), lr=0.1), checkpoint="auto", memory_budget=budget)
    assert accumulator.step(x, loss_fn).microbatch_size == 1
    assert accumulator._it.checkpointing.blocks


def test_a_window_that_runs_out_of_memory_keeps_its_blocks() -> None:
    model, x = Net(4), torch.randn(16, 8)
    failed: list[int] = []

    def greedy(model: nn.Module, x: Tensor) -> Tensor:
        if len(x) > 4:
            failed.append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_fn(model, x)

    results: list[dict[str, Tensor]] = []
    for size, loss in ((16, greedy), (4, loss_fn)):
        twin = copy.deepcopy(model)
        start_over()
        mb.Accumulator(
            twin, SGD(twin.parameters(), lr=0.1), microbatch_size=size, checkpoint="all", batch_norm="microbatch"
        ).step(x, loss)
        results.append(dict(twin.state_dict()))
    assert failed == [16, 8]
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_both_ways_at_once(tmp_path: Any) -> None:
    model, x = Net(), torch.randn(10, 8)
    expected, _, _ = after(model, x)
    spill = mb.Spill(model, directory=tmp_path, smallest=1)
    found, _, _ = after(model, x, checkpoint="all", offload=spill)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert spill.bytes_spilled > 0


def test_logits_inside_of_a_block() -> None:
    """The loss's own memory is handed out once for each pass."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Sequential(nn.Linear(8, 4096, bias=False), nn.Identity()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            labels = torch.arange(len(x))
            return torch.stack([F.cross_entropy(head(x), labels) for head in self.heads]).sum()

    model, x = Heads(), torch.randn(6, 8)
    results: list[Any] = []
    for blocks in ((), "all"):
        twin = copy.deepcopy(model)
        accumulator = mb.Accumulator(
            twin, SGD(twin.parameters(), lr=0.1), microbatch_size=3, checkpoint=blocks, batch_norm="microbatch"
        )
        accumulator.step(x, lambda model, x: model(x))
        results.append(twin.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)
