"""Microbatches in turns: what cannot be exact is refused by name, nothing hangs, and everything is put back."""

import copy
import gc
import random
import threading
import traceback
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from microbatch.errors import BatchStatisticsError, ConfigError
from microbatch.loss.backward_order import Order

from .networks import WIDTH, Residual, classify, convolution, double, drawn, head, images
from .reference import Batch, numbers, relative_error, subject
from .test_batchnorm import EXACT, buffers_differ, holds, together, whole


class Do(nn.Module):
    """A function of the stream and of the modules that it uses."""

    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x: Any) -> Any:
        return self.function(x, *self.parts)


class Passing(TorchFunctionMode):
    """Sees every function, and lets it pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Watching(TorchDispatchMode):
    """Sees every operator, and lets it pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True, params=["greenlets", "threads"])
def strands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run microbatches in turns either way."""
    monkeypatch.setattr("microbatch.loss.fibers._has_greenlet", lambda: request.param == "greenlets")
    return request.param


def network(function: Callable[..., Any], *modules: nn.Module) -> nn.Module:
    """Put a function of the stream between two normalised convolutions."""
    inside = Do(function, *modules)
    return double(nn.Sequential(convolution(3, 4), inside, convolution(4, 4), *head(36)))


def refused(model: nn.Module, *words: str, batch: Batch | None = None) -> pytest.ExceptionInfo[BatchStatisticsError]:
    """Run a window that must be refused, and must leave everything as it was."""
    batch = images(6) if batch is None else batch
    it = subject(model, size=2, batch_norm="exact")
    before = copy.deepcopy(it.model.state_dict())
    state = torch.get_rng_state(), random.getstate()
    with pytest.raises(BatchStatisticsError) as caught:
        it.accumulator.step(batch, classify)
    for word in words:
        assert word in str(caught.value)
    assert buffers_differ(it.model.state_dict(), before) == 0.0
    assert all(each.grad is None for each in it.model.parameters())
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    return caught


# -- what cannot be exact ----------------------------------------------------------------------------------------------


def by_sign(x: Tensor, one: nn.Module, other: nn.Module) -> Tensor:
    return one(x) if x.detach().flatten()[0] > 0 else other(x)


def maybe(x: Tensor, one: nn.Module) -> Tensor:
    return one(x) if x.detach().flatten()[0] > 0 else x


def signed(*signs: int) -> Batch:
    """Draw a batch of which every second row begins with a number of this sign, wherever the model looks."""
    batch = images(2 * len(signs))
    for index, sign in enumerate(signs):
        batch["x"][2 * index] = batch["x"][2 * index].abs() * sign
    return batch


def first_sign(function: Callable[..., Tensor], *modules: nn.Module) -> nn.Module:
    """Make a network whose first layer is the function, which sees the batch's own signs."""
    return double(nn.Sequential(Do(function, *modules), nn.Flatten(), nn.Linear(108, 3)))


def test_two_places_are_named_where_microbatches_part() -> None:
    model = first_sign(by_sign, nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    refused(
        model,
        "microbatch 0 waits for batch_norm at '0.parts.0', and microbatch 1 waits for batch_norm at '0.parts.1'",
        batch=signed(1, -1, 1),
    )


def test_a_microbatch_that_ends_while_others_wait() -> None:
    model = first_sign(maybe, nn.BatchNorm2d(3))
    refused(
        model,
        "microbatch 0 waits for batch_norm at '0.parts.0', and microbatch 2 has reached its end",
        batch=signed(1, 1, -1),
    )


def test_statistics_of_ones_own_are_named_by_their_line() -> None:
    def part(x: Tensor) -> Tensor:
        if x.detach().flatten()[0] > 0:
            return x - mb.batch_mean(x.mean(0))
        return x - mb.batch_sum(x.mean(0))

    refused(
        first_sign(part), "batch_mean at test_lockstep.py:", "batch_sum at test_lockstep.py:", batch=signed(1, -1, 1)
    )


def test_tensors_that_do_not_fit() -> None:
    def bring(x: Tensor) -> Tensor:
        return x * mb.batch_sum(x[..., : 3 if x.detach().flatten()[0] > 0 else 2].mean(0)).mean()

    refused(first_sign(bring), "(3, 6, 3), (3, 6, 2), (3, 6, 3)", batch=signed(1, -1, 1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_a_normalisation(reentrant: bool) -> None:
    def again(x: Tensor, inside: nn.Module) -> Any:
        return checkpoint(inside, x, use_reentrant=reentrant)

    refused(network(again, convolution(4, 4)), "batch_norm at '1.parts.0.1' is inside a checkpoint")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_between_normalisations_is_exact(reentrant: bool) -> None:
    def again(x: Tensor, inside: nn.Module) -> Any:
        return checkpoint(inside, x, use_reentrant=reentrant)

    inside = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.BatchNorm2d(4).eval())
    holds(network(again, inside), classify, images(6), size=2)


@pytest.mark.parametrize("way", ["grad", "backward", "method"])
def test_gradients_inside_of_a_microbatch(way: str) -> None:
    def penalise(x: Tensor) -> Tensor:
        total = x.square().sum()
        if way == "grad":
            return x + torch.autograd.grad(total, x, create_graph=True)[0]
        torch.autograd.backward(total) if way == "backward" else total.backward()
        return x

    refused(network(penalise), "grad() was called" if way == "grad" else "backward() was called", "microbatch 2")


def test_a_scripted_normalisation() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        scripted = torch.jit.script(nn.BatchNorm2d(4))
    model = network(lambda x, inside: inside(x), scripted)
    accumulator = mb.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2, batch_norm="exact"
    )
    with pytest.raises(BatchStatisticsError, match=r"'1\.parts\.0' ran 3 times, 0 of them"):
        accumulator.step(images(6), classify)


def test_what_one_microbatch_leaves_for_another() -> None:
    left: list[Tensor] = []

    def leave(x: Tensor) -> Tensor:
        left[:] = [x]
        return x

    model = nn.Sequential(network(leave), Do(lambda x: x * left[0].mean()))
    refused(model, "microbatch 1 used a tensor that microbatch 0 computed")


def test_a_compiled_window_is_refused_at_once() -> None:
    model = nn.BatchNorm1d(3)
    with pytest.raises(ConfigError, match="leave compile= out"):
        subject(model, size=2, batch_norm="exact", compile=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dropout": "by_row"}, 'does not go with dropout="by_row"'),
        ({"sums": mb.Sums(buffer="none")}, r'does not go with Sums\(buffer="none"\)'),
    ],
)
def test_what_does_not_go_with_turns_is_refused_at_once(settings: dict[str, Any], words: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ConfigError, match=words):
        mb.Accumulator(model, optimizer, microbatch_size=2, batch_norm="exact", **settings)


def test_a_hand_written_loop_is_refused_at_once() -> None:
    it = subject(nn.BatchNorm1d(3), size=2, batch_norm="exact")
    with pytest.raises(ConfigError, match=r"accumulator\.step"):
        it.accumulator.window()
    with pytest.raises(ConfigError, match=r"accumulator\.step"):
        it.accumulator.windows([], microbatches=2)


def test_one_value_for_each_channel_is_refused() -> None:
    batch = {"x": numbers(1, 1, 3), "y": torch.tensor([0])}
    it = subject(nn.Sequential(nn.BatchNorm1d(3)).double(), size=1, batch_norm="exact")
    with pytest.raises(BatchStatisticsError, match="'0' got one value for each channel from the whole batch"):
        it.accumulator.step(batch, classify)


def test_a_mode_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="batch_norm must be"):
        subject(nn.BatchNorm1d(3), batch_norm="Exact")


# -- failures ----------------------------------------------------------------------------------------------------------


def fails_in(microbatch: int, x: Tensor, error: BaseException) -> Tensor:
    if bool((x.detach()[0] == microbatch).all()):
        raise error
    return x


@pytest.mark.parametrize("microbatch", [0, 1, 2])
def test_an_exception_ends_all_with_its_own_traceback(microbatch: int) -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = double(nn.Sequential(convolution(3, 4), nn.Dropout(0.5), convolution(4, 4)))

        def forward(self, x: Tensor) -> Tensor:
            out = self.inside(x)
            return fails_in(microbatch, x, KeyError("mine")) if failing else out

    failing, batch = True, images(6)
    for index in range(6):
        batch["x"][index] = index // 2 if index % 2 == 0 else batch["x"][index]
    model = Marked()
    it = subject(model, size=2, batch_norm="exact")
    before, state = copy.deepcopy(it.model.state_dict()), torch.get_rng_state()
    losses: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch["x"]).square().mean()
        losses.append(1)
        return out

    with pytest.raises(KeyError, match="mine") as caught:
        it.accumulator.step(batch, loss)
    assert "fails_in" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert len(losses) == {0: 2, 1: 1, 2: 0}[microbatch] or len(losses) < 3
    assert buffers_differ(it.model.state_dict(), before) == 0.0
    assert torch.equal(state, torch.get_rng_state())
    assert all(each.grad is None for each in it.model.parameters())
    failing = False
    it.accumulator.step(batch, loss)  # the same threads go on
    assert len(it.updates) == 1


def test_one_that_will_not_be_ended_is_ended_at_its_next_meeting() -> None:
    def stubborn(x: Tensor, inside: nn.Module) -> Tensor:
        try:
            x = inside(x)
        except BaseException:  # noqa: BLE001 - as one should not write
            x = inside(x)
        if seen:
            raise KeyError("mine")
        seen.append(1)
        return x

    seen: list[int] = []
    it = subject(network(stubborn, nn.BatchNorm2d(4)), size=2, batch_norm="exact")
    with pytest.raises(KeyError, match="mine"):
        it.accumulator.step(images(6), classify)


def test_threads_stay_and_leave_with_their_accumulator(strands: str) -> None:
    batch = images(6)
    gc.collect()
    before = set(threading.enumerate())
    it = subject(double(drawn(["normalised"])), size=2, batch_norm="exact")
    ours: set[threading.Thread] = set()
    for _ in range(3):
        it.accumulator.step(batch, classify)
        ours |= set(threading.enumerate()) - before
        assert len(ours) == (3 if strands == "threads" else 0)
    del it
    gc.collect()
    for each in ours:
        each.join(timeout=1)
    assert not any(each.is_alive() for each in ours)


# -- what a strand has of its own --------------------------------------------------------------------------------------


def test_every_strand_is_as_the_one_that_calls() -> None:
    seen: list[Any] = []

    def look(x: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return x

    batch = images(6)
    model = network(look).float()
    there: Batch = {"x": batch["x"].float(), "y": batch["y"]}
    together(model, classify, there, size=2, autocast=torch.float16)
    assert seen == [(True, True, torch.float16)] * 3


def test_grad_mode_is_each_microbatchs_own() -> None:
    def off(x: Tensor, inside: nn.Module) -> Tensor:
        with torch.no_grad():
            found = inside(x)
            assert not torch.is_grad_enabled()  # also after the others have been running
        assert torch.is_grad_enabled()
        return x + found

    holds(network(off, nn.BatchNorm2d(4)), classify, images(6), size=2)


def test_what_a_microbatch_is_inside_of_is_its_own() -> None:
    """It may be inside of anything when it waits, and the others are not."""
    number: ContextVar[int] = ContextVar("number", default=-1)
    numbers_seen: list[int] = []
    packed: list[set[int]] = []

    def there() -> list[object]:
        return [
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            _get_current_function_mode_stack(),
            _get_current_dispatch_mode_stack(),
            number.get(),
        ]

    def inside_of_much(x: Tensor, inside: nn.Module) -> Tensor:
        mine = len(packed)
        packed.append(set())

        def pack(tensor: Tensor) -> Tensor:
            packed[mine].add(number.get())
            return tensor

        outside = there()
        assert outside[:3] + outside[5:] == start
        number.set(mine)
        with (
            torch.autocast("cpu", dtypes[mine % 2], enabled=mine % 3 > 0, cache_enabled=mine % 2 > 0),
            Passing(),
            Watching(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            before = there()
            found = inside(x).square()
            assert there() == before != outside
            numbers_seen.append(number.get())
        number.set(-2)
        assert there() == outside
        return x + found

    dtypes = [torch.bfloat16, torch.float16]
    token = number.set(-2)
    start = [False, torch.bfloat16, True, -2]
    holds(network(inside_of_much, nn.BatchNorm2d(4)), classify, images(6), size=2)
    number.reset(token)
    assert {0, 1, 2} <= set(numbers_seen)
    # Of the full batch, too, each packed what it saved itself.
    assert packed == [{each} for each in range(len(packed))]


def test_a_meter_counts_in_all_of_them() -> None:
    batch = images(6)
    model = double(drawn(["normalised", "residual"]))
    it = subject(model, size=2, batch_norm="exact")
    with mb.MemoryMeter() as meter:
        it.accumulator.step(batch, classify)
    assert meter.peak_bytes > 4 * batch["x"].nbytes
    assert it.accumulator.step(batch, classify).peak_bytes is not None


# -- the other modes ---------------------------------------------------------------------------------------------------


def test_one_warning_names_layers_and_ways_out() -> None:
    batch = images(6)
    model = double(drawn(["normalised", "twice", "residual", "frozen"]))
    it = subject(model, size=2, batch_norm=None)
    with pytest.warns(UserWarning, match="batch normalisation") as caught:
        it.accumulator.step(batch, classify)
    (told,) = caught
    for word in ("1.1, 2.inside.1", " more", '"exact"', '"frozen"', "convert_batch_norm", '"microbatch"'):
        assert word in str(told.message)
    assert told.filename == __file__
    it.accumulator.step(batch, classify)  # warnings are errors


@pytest.mark.parametrize("how", ["said so", "one microbatch", "evaluation", "none"])
def test_no_warning_where_there_is_nothing_to_say(how: str) -> None:
    batch = images(6)
    model = double(drawn(["group norm" if how == "none" else "normalised"]))
    if how == "none":
        model = model[:-1]  # pyright: ignore[reportIndexIssue]
    if how == "evaluation":
        model.eval()
    settings: dict[str, Any] = {"batch_norm": "microbatch" if how == "said so" else None}
    subject(model, size=6 if how == "one microbatch" else 2, **settings).accumulator.step(batch, classify)


def parts_of(model: nn.Module, batch: Batch, size: int) -> list[Tensor]:
    """Return the input of the last normalisation for each microbatch, each normalised by itself."""
    twin = copy.deepcopy(model)
    found: list[Tensor] = []
    last = [each for each in twin.modules() if isinstance(each, nn.BatchNorm1d)][-1]
    last.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    for at in range(0, len(batch["y"]), size):
        twin(batch["x"][at : at + size])
    return found


@pytest.mark.parametrize("size", [2, 3, 7])
def test_pooled_statistics_are_those_of_all_rows_and_move_once(size: int) -> None:
    batch = images(7 if size == 7 else 8)
    model = double(drawn(["normalised", "cumulative"]))
    it = subject(model, size=size, batch_norm="pooled")
    wanted = torch.cat(parts_of(model, batch, size))
    before = [each for each in model.modules() if isinstance(each, nn.BatchNorm1d)][-1]
    it.accumulator.step(batch, classify)
    after = [each for each in it.model.modules() if isinstance(each, nn.BatchNorm1d)][-1]
    assert before.running_mean is not None
    assert before.running_var is not None
    torch.testing.assert_close(after.running_mean, 0.9 * before.running_mean + 0.1 * wanted.mean(0))
    torch.testing.assert_close(after.running_var, 0.9 * before.running_var + 0.1 * wanted.var(0))
    # What is not behind another one sees what it sees in the whole batch.
    _, buffers = whole(model, classify, batch)
    got = dict(it.model.named_buffers())
    first = [name for name in buffers if name.startswith("1.")]
    assert len(first) == 3
    assert buffers_differ({n: got[n] for n in first}, {n: buffers[n] for n in first}) <= EXACT
    assert all(torch.equal(got[name], each) for name, each in buffers.items() if "num_batches" in name)
    # The gradient is each microbatch's own.
    plain = subject(model, size=size, batch_norm="microbatch")
    plain.accumulator.step(batch, classify)
    assert relative_error(it.updates[0], plain.updates[0]) <= EXACT


@pytest.mark.parametrize("reentrant", [True, False])
def test_pooled_statistics_of_a_checkpoint_count_once(reentrant: bool) -> None:
    def again(x: Tensor, inside: nn.Module) -> Any:
        return checkpoint(inside, x, use_reentrant=reentrant)

    batch = images(6)
    model = network(again, convolution(4, 4))
    found: list[dict[str, Tensor]] = []
    for function in (again, lambda x, inside: inside(x)):
        model[1].function = function  # pyright: ignore[reportIndexIssue]
        it = subject(model, size=2, batch_norm="pooled")
        it.accumulator.step(batch, classify)
        found.append(dict(it.model.named_buffers()))
    assert buffers_differ(found[0], found[1]) <= EXACT


def test_pooled_in_a_hand_written_loop() -> None:
    batch = images(6)
    model = double(drawn(["twice"]))
    found: list[dict[str, Tensor]] = []
    for by_hand in (True, False):
        it = subject(model, size=2, batch_norm="pooled")
        if by_hand:
            with it.accumulator.window() as window:
                for microbatch in window.split(batch):
                    window.backward(classify(it.model, microbatch))
        else:
            it.accumulator.step(batch, classify)
        found.append(dict(it.model.named_buffers()))
    assert buffers_differ(found[0], found[1]) == 0.0
    assert found[0]["1.inside.1.num_batches_tracked"] == 2  # it is used twice


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_frozen_normalises_by_running_statistics(reentrant: bool | None) -> None:
    def again(x: Tensor, inside: nn.Module) -> Any:
        return inside(x) if reentrant is None else checkpoint(inside, x, use_reentrant=reentrant)

    batch, model = images(6), network(again, convolution(4, 4))
    evaluated = copy.deepcopy(model)
    for each in evaluated.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.eval()
    reference, buffers = whole(evaluated, classify, batch)
    it = subject(model, size=2, batch_norm="frozen")
    it.accumulator.step(batch, classify)
    assert relative_error(it.updates[0], reference) <= EXACT
    assert buffers_differ(dict(it.model.named_buffers()), buffers) == 0.0
    assert all(each.training for each in it.model.modules())


def test_frozen_needs_statistics() -> None:
    it = subject(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), size=2, batch_norm="frozen")
    with pytest.raises(ConfigError, match="'0' has none"):
        it.accumulator.step(torch.ones(4, 3), lambda model, x: model(x).mean())


# -- other layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["group", "layer", "sync"])
def test_converted_layers(to: str) -> None:
    batch = images(6)
    model = drawn(["normalised", "twice", "no affine"])
    double(model)
    weights = dict(model.named_parameters())
    found = mb.convert_batch_norm(model, to=to, groups=2)
    kinds = {type(each) for each in found.modules()}
    assert (nn.SyncBatchNorm if to == "sync" else nn.GroupNorm) in kinds
    assert not kinds & {nn.BatchNorm2d, nn.BatchNorm1d}
    assert {id(each) for each in found.parameters()} == {id(each) for each in weights.values()}
    if to != "sync":
        reference, _ = whole(found, classify, batch)
        it = subject(found, size=2, batch_norm=None)  # no warning either
        it.accumulator.step(batch, classify)
        assert relative_error(it.updates[0], reference) <= EXACT


def test_a_model_that_is_such_a_layer_and_one_used_twice() -> None:
    layer = nn.BatchNorm1d(6)
    assert isinstance(mb.convert_batch_norm(layer, to="group"), nn.GroupNorm)
    both = mb.convert_batch_norm(nn.Sequential(layer, layer), to="group", groups=4)
    assert both[0] is both[1]  # pyright: ignore[reportIndexIssue]
    assert both[0].num_groups == 2  # pyright: ignore[reportIndexIssue]


def test_what_layers_cannot_be_converted_to() -> None:
    with pytest.raises(ConfigError, match="'instance'"):
        mb.convert_batch_norm(nn.BatchNorm1d(3), to="instance")
    with pytest.raises(ConfigError, match="groups"):
        mb.convert_batch_norm(nn.BatchNorm1d(3), to="group", groups=0)


# -- memory ------------------------------------------------------------------------------------------------------------


def deep() -> tuple[nn.Module, Batch]:
    """Make a residual network with much to keep for its weights, and a batch."""
    batch = images(8, side=32)
    blocks = [Residual(WIDTH, WIDTH) for _ in range(4)]
    model = nn.Sequential(convolution(3, WIDTH), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 4))
    return model, {"x": batch["x"].float(), "y": batch["y"]}


def peak_of(model: nn.Module, batch: Batch, **settings: Any) -> tuple[int, mb.Step]:
    """Return the most bytes of a window beside what was there before, and its record."""
    it = subject(model, size=2, memory_budget="none", **settings)
    it.accumulator.step(batch, classify)
    meter = mb.MemoryMeter()
    meter.track(it.model, batch)
    before = meter.live_bytes
    with meter:
        step = it.accumulator.step(batch, classify)
    return meter.peak_bytes - before, step


def test_the_device_holds_no_more_than_in_plain_accumulation(monkeypatch: pytest.MonkeyPatch, strands: str) -> None:
    model, batch = deep()
    plain, _ = peak_of(model, batch, batch_norm="microbatch")
    exact, step = peak_of(model, batch, batch_norm="exact", offload=mb.Spill(model, smallest=1 << 12))
    held, _ = peak_of(model, batch, batch_norm="exact", offload=mb.Spill(model, smallest=1 << 40))
    assert exact <= plain
    assert step.spilled_bytes > 2 * plain
    assert held > 2 * plain
    # Numbered by each thread for itself, the graphs of all microbatches run at once.
    monkeypatch.setattr(Order, "stamp", lambda *_: None)
    at_once, _ = peak_of(model, batch, batch_norm="exact", offload=mb.Spill(model, smallest=1 << 12))
    assert (at_once > 1.1 * exact) == (strands == "threads")
    holds(double(drawn(["residual", "twice"])), classify, images(6), size=2)


def test_within_a_budget_that_allows_more_less_is_spilled() -> None:
    model, batch = deep()

    def spilled(budget: int | str) -> list[mb.Step]:
        offload = mb.Spill(model, smallest=1 << 12)
        it = subject(model, size=2, batch_norm="exact", memory_budget=budget, offload=offload)
        return [it.accumulator.step(batch, classify) for _ in range(3)]

    first, *_, last = spilled(1 << 40)
    assert first.peak_bytes is not None
    assert first.spilled_bytes > 0
    assert last.spilled_bytes == 0
    assert [step.spilled_bytes for step in spilled("none")] == [first.spilled_bytes] * 3
    between = 6 * first.peak_bytes
    *_, last = spilled(between)
    assert 0 < last.spilled_bytes < 0.9 * first.spilled_bytes
    assert last.peak_bytes is not None
    assert first.peak_bytes < last.peak_bytes <= between
    assert last.retries == 0


def test_what_the_device_has_is_a_budget_too() -> None:
    """Without a budget the first window is counted, and leaves what the machine has room for."""
    batch = images(6, side=40)
    model = double(nn.Sequential(convolution(3, 4), convolution(4, 4), *head(1600)))
    it = subject(model, size=2, batch_norm="exact", memory_budget=None)
    first, *others = [it.accumulator.step(batch, classify) for _ in range(4)]
    assert first.spilled_bytes > 0
    assert [step.spilled_bytes for step in others] == [0, 0, 0]
    reference, _ = whole(model, classify, batch)
    assert all(relative_error(each, reference) <= EXACT for each in it.updates)


def test_memory_that_runs_out_where_less_was_spilled_is_not_tried_again() -> None:
    batch = images(6, side=40)
    model = double(nn.Sequential(convolution(3, 4), convolution(4, 4), *head(1600)))
    offload = mb.Spill(model, smallest=1 << 10)
    it = subject(model, size=2, batch_norm="exact", memory_budget=1 << 40, offload=offload)
    it.accumulator.step(batch, classify)
    room, calls = offload.room, list[int]()
    assert room > 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch["y"]))
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return classify(model, batch)

    step = it.accumulator.step(batch, loss)
    assert step.retries == 1
    assert step.spilled_bytes > 0
    assert 0 < offload.room <= room // 2
