"""Jobs whose best rate is known, jobs that have none, and what a search leaves behind: nothing, to the bit."""

import copy
import json
import math
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.small_job import Net, small
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, IterableDataset

import microbatch as mb
from microbatch.errors import ConfigError, DataError, LossError
from microbatch.step.saved_state import seed_everything
from microbatch.train.config import Settings
from microbatch.train.data import Position
from microbatch.train.place import Place
from microbatch.train.rank_batches import batches_of
from microbatch.train.resolve import resolve
from microbatch.tuning.learning_rate import RangeStep

CPU = torch.device("cpu")


class Bowl(nn.Module):
    """The loss ``sum L_i (w_i - s x_i)^2 / 2``, whose gradient descent diverges above ``2 / max L``."""

    def __init__(self, curvature: list[float], begin: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((len(curvature),), begin, dtype=torch.float64))
        self.register_buffer("curvature", torch.tensor(curvature, dtype=torch.float64))


def bowl_loss(model: Any, microbatch: Tensor) -> Tensor:
    return 0.5 * ((model.w - microbatch).square() * model.curvature).sum(1).mean()


def bowl(
    curvature: list[float],
    *,
    rate: float = 0.1,
    noise: float = 0.0,
    begin: float = 1.0,
    make: Callable[..., Optimizer] = SGD,
) -> mb.Job:
    """64 samples in batches of 16, cut into microbatches of 4; with noise, every batch has its own minimum."""
    model = Bowl(curvature, begin)
    data = torch.randn(64, len(curvature), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = noise * (data - data.mean(0))
    return mb.Job(
        model=model, optimizer=make(model.parameters(), lr=rate), loss_fn=bowl_loss, data=list(data), batch_size=16,
        microbatch_size=4,
    )  # fmt: skip


# -- the rate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("curvature", [[1.0], [100.0, 100.0], [1.0, 10.0, 30.0]])
def test_on_a_bowl_the_suggestion_is_within_a_factor_of_twenty_below_the_limit(
    curvature: list[float], noise: float
) -> None:
    limit = 2 / max(curvature)
    found = mb.find_learning_rate(bowl(curvature, noise=noise), seeds=2)
    assert found.suggested is not None
    assert limit / 20 < found.suggested < 0.6 * limit
    assert found.diverged_at is not None
    assert limit / 2 < found.diverged_at < 5 * limit
    assert found.steepest is not None
    assert found.minimum_tenth is not None
    assert max(found.steepest, found.minimum_tenth) < 0.6 * limit


@pytest.mark.parametrize("curvature", [0.01, 1.0, 1e4])
def test_plain_descent_diverges_where_the_theory_says(curvature: float) -> None:
    found = mb.find_learning_rate(bowl([curvature], rate=1 / curvature), seeds=1)
    assert found.diverged_at is not None
    assert 1.0 <= found.diverged_at / (2 / curvature) < 1.25  # one factor between neighbouring rates


@pytest.mark.parametrize("rate", [1e-7, 1e5])
def test_a_range_that_begins_or_ends_at_the_wrong_place_is_widened(rate: float) -> None:
    found = mb.find_learning_rate(bowl([1.0], rate=rate), seeds=1)
    assert found.suggested is not None
    assert 0.1 < found.suggested < 2.0


def passes_of(job: mb.Job, **options: Any) -> tuple[mb.LearningRate, list[list[float]]]:
    """Run a search, and return its result and the rates of each pass."""
    passes: list[list[float]] = []

    def note(step: RangeStep) -> None:
        if step.step == 1:
            passes.append([])
        passes[-1].append(step.rate)

    return mb.find_learning_rate(job, progress=note, **options), passes


def test_a_second_range_lies_three_decades_around_what_the_first_suggests() -> None:
    found, passes = passes_of(bowl([1.0, 10.0, 30.0], noise=0.3), seeds=2)
    assert len(passes) == 4
    assert found.steps == sum(map(len, passes))
    low, finer = passes[0][0], passes[2][0]
    wide = mb.find_learning_rate(bowl([1.0, 10.0, 30.0], noise=0.3), seeds=2, low=low, high=1e8 * low)
    assert wide.suggested is not None
    assert found.suggested is not None
    assert finer == pytest.approx(wide.suggested / 10**1.5)
    assert passes[2][1] / finer == pytest.approx(1000 ** (1 / 99))  # as many steps for three decades as for eight
    assert found.curve.rates[0] == finer
    assert found.suggested != wide.suggested
    # The usual rules are those of the usual, wide range.
    usual = [(each.steepest, each.valley, each.minimum_tenth) for each in (found, wide)]
    assert usual[0] == pytest.approx(usual[1])


def test_where_the_finer_range_shows_no_beginning_the_wide_one_counts() -> None:
    """Without noise, the loss of a bowl falls from its first rate on."""
    found, passes = passes_of(bowl([1.0]), seeds=1)
    wide = mb.find_learning_rate(bowl([1.0]), seeds=1, low=1e-5, high=1e3)
    assert len(passes) == 2
    assert found.curve.rates[0] == passes[0][0]
    assert (found.suggested, found.diverged_at) == pytest.approx((wide.suggested, wide.diverged_at))
    assert any("in 1 of 1 runs" in each for each in found.words)


@pytest.mark.parametrize("given", [{"low": 1e-5}, {"high": 10.0}])
def test_where_the_user_has_chosen_an_end_there_is_one_range(given: dict[str, float]) -> None:
    _, passes = passes_of(bowl([1.0]), seeds=1, **given)
    assert len(passes) == 1


def test_the_curve_is_the_loss_after_the_step_at_each_rate() -> None:
    """Against a loop of its own in plain PyTorch: the mean of 16 rows, no accumulation."""
    job = bowl([1.0, 10.0])
    found = mb.find_learning_rate(job, low=1e-4, high=0.1, steps=40, seeds=1)
    w = torch.ones(2, dtype=torch.float64)
    losses = [5.5]
    for index in range(40):
        rate = 1e-4 * 1000 ** (index / 39)
        assert found.curve.rates[index] == pytest.approx(rate)
        w = w - rate * torch.tensor([1.0, 10.0], dtype=torch.float64) * w
        losses.append(float(0.5 * (w.square() * torch.tensor([1.0, 10.0])).sum()))
    assert list(found.curve.losses[0]) == pytest.approx(losses, rel=1e-12)
    average = 0.0
    for index, loss in enumerate(losses, start=1):
        average = 0.9 * average + 0.1 * loss
        if index > 1:
            assert found.curve.smoothed[index - 2] == pytest.approx(average / (1 - 0.9**index), rel=1e-9)


def test_groups_keep_their_proportions_and_a_warm_up_does_not_count() -> None:
    seen: list[tuple[float, ...]] = []

    class Watched(SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(tuple(float(group["lr"]) for group in self.param_groups))
            return super().step(closure)

    model = nn.Linear(3, 1)
    optimizer = Watched([{"params": [model.weight], "lr": 0.2}, {"params": [model.bias], "lr": 0.6}])
    other = nn.Linear(1, 1)
    second = Watched(other.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.01 * (step + 1))
    whole = nn.Sequential(model, other)
    job = mb.Job(
        model=whole, optimizer=[optimizer, second], loss_fn=lambda m, x: m(x).square().mean(),
        data=list(torch.randn(20, 3)), batch_size=10, microbatch_size=5, scheduler=scheduler,
    )  # fmt: skip
    before = copy.deepcopy(scheduler.state_dict())
    found = mb.find_learning_rate(job, low=1e-3, high=1e-1, steps=20, seeds=1)
    assert found.given == pytest.approx(0.2)
    firsts, seconds = seen[::2], seen[1::2]
    assert [first[0] for first in firsts] == pytest.approx([*found.curve.rates, found.curve.rates[-1]])
    for first, other_rates in zip(firsts, seconds, strict=True):
        assert first[1] == pytest.approx(3 * first[0])
        assert other_rates[0] == pytest.approx(first[0] / 4)
    assert scheduler.state_dict() == before
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.002, 0.006])


def test_each_seed_reads_the_batches_that_a_run_with_it_sees_first() -> None:
    read: list[list[int]] = []

    def collate(samples: list[Tensor]) -> Tensor:
        read.append([int(sample[0]) for sample in samples])
        return torch.stack(samples)

    model = nn.Linear(2, 1)
    data = [torch.tensor([float(index), 1.0]) for index in range(30)]
    job = mb.Job(
        model=model, optimizer=SGD(model.parameters(), lr=1e-6), loss_fn=lambda m, x: m(x).square().mean(), data=data,
        batch_size=12, microbatch_size=6, collate=collate,
    )  # fmt: skip
    mb.find_learning_rate(job, low=1e-9, high=1e-8, steps=20, seeds=[0, 7])
    first, second = read[:21], read[21:]
    assert len(second) == 21
    for seed, batches in ((0, first), (7, second)):
        config = resolve(Settings(seed=seed, steps=5), job, device=CPU)
        read.clear()
        reader, position = batches_of(job, config=config, place=Place(), rank=0), Position()
        for step in range(5):
            _, position = reader.take(step, position)
        assert batches[:5] == read[:5]
    assert first != second


# -- a curve that says nothing ----------------------------------------------------------------------------------------


def test_a_loss_that_does_not_depend_on_the_weights_is_flat() -> None:
    found = mb.find_learning_rate(bowl([0.0], noise=0.0), seeds=2)
    assert found.suggested is None
    assert "no suggestion" in found.words[0]
    assert "no more than its noise" in found.words[0]


def test_a_job_at_its_minimum_has_nothing_to_find() -> None:
    found = mb.find_learning_rate(bowl([1.0], noise=1.0, begin=0.0), steps=50, seeds=2)
    assert found.suggested is None
    assert (found.steepest, found.valley, found.minimum_tenth) == (None, None, None)


def test_a_range_of_the_users_is_not_widened_but_named() -> None:
    at_once = mb.find_learning_rate(bowl([1.0]), low=0.2, high=10.0, steps=20, seeds=1)
    assert at_once.suggested is None
    assert "from the first rate on, 0.2" in at_once.words[0]
    too_high = mb.find_learning_rate(bowl([1.0]), low=100.0, high=1000.0, steps=20, seeds=1)
    assert too_high.suggested is None
    assert too_high.curve.rates[0] == 100.0
    never = mb.find_learning_rate(bowl([1.0]), low=1e-6, high=0.1, steps=50, seeds=1)
    assert never.suggested is None
    assert "never rises" in never.words[0]


def test_a_loss_that_is_not_finite_is_refused() -> None:
    job = bowl([1.0], begin=math.nan)
    with pytest.raises(LossError, match="before any step"):
        mb.find_learning_rate(job)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"low": 0.0}, "low must be a learning rate above 0, not 0.0"),
        ({"high": math.inf}, "high must be"),
        ({"low": 1.0, "high": 0.5}, "low is 1 and high is 0.5"),
        ({"steps": 5}, "steps is 5"),
        ({"seeds": 0}, "seeds must be 1 to 100"),
        ({"seeds": []}, "seeds must be 1 to 100"),
        ({"seeds": 10**30}, "seeds must be 1 to 100"),
        ({"seeds": [0, -1]}, "seeds must be 1 to 100 runs, or as many seeds of at least 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"microbatch_size": -2}, 'microbatch_size must be a whole number of at least 1, or "auto", not -2'),
        (
            {"microbatch_size": "large"},
            """microbatch_size must be a whole number of at least 1, or "auto", not 'large'""",
        ),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        mb.find_learning_rate(bowl([1.0]), **given)


@pytest.mark.parametrize("size", ["large", 0, -2, True, 2**63, 10**30])
def test_a_microbatch_size_is_read_as_the_accumulator_reads_it(size: Any) -> None:
    """The same sizes are refused, in the same words; a size above the batch is that of the batch."""
    job, told = bowl([1.0]), list[str | None]()
    for call in (
        lambda: mb.find_learning_rate(job, microbatch_size=size, steps=20, seeds=1),
        lambda: mb.Accumulator(job.model, job.optimizer, microbatch_size=size),
    ):
        try:
            call()
            told.append(None)
        except ConfigError as error:
            told.append(str(error))
    assert told[0] == told[1]
    assert (told[0] is None) == (size in (2**63, 10**30))


class NoRate(Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        return None


def test_an_optimizer_without_a_rate_is_refused_by_name() -> None:
    job = bowl([1.0], make=lambda parameters, lr: NoRate(parameters))
    with pytest.raises(ConfigError, match="NoRate, has no learning rate"):
        mb.find_learning_rate(job)
    relative = bowl([1.0])
    relative.optimizer.param_groups[0]["lr"] = None  # type: ignore[union-attr] - as of an Adafactor with relative steps
    with pytest.raises(ConfigError, match="SGD is None"):
        mb.find_learning_rate(relative)


# -- everything as before ---------------------------------------------------------------------------------------------


def state_of(job: mb.Job) -> dict[str, Any]:
    """Everything that decides what the job does next, copied."""
    model = job.model
    optimizers = [job.optimizer] if isinstance(job.optimizer, Optimizer) else list(job.optimizer)
    return copy.deepcopy(
        {
            "weights": dict(model.state_dict()),
            "buffers": dict(model.named_buffers()),
            "wanted": [each.requires_grad for each in model.parameters()],
            "gradients": [each.grad for each in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "optimizers": [each.state_dict() for each in optimizers],
            "others": [
                {key: value for key, value in vars(each).items() if isinstance(value, int | float)}
                for each in optimizers
            ],
            "random": (random.getstate(), torch.get_rng_state(), np.random.get_state(legacy=False)),  # noqa: NPY002
            "scheduler": None if job.scheduler is None else job.scheduler.state_dict(),
        }
    )


def assert_same(one: Any, other: Any, place: str = "") -> None:
    """Compare two states bit by bit."""
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, place
        assert torch.equal(one, other), place
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key, value in one.items():
            assert_same(value, other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, value in enumerate(one):
            assert_same(value, other[index], f"{place}.{index}")
    else:
        assert one == other, place


def worn(**changed: Any) -> mb.Job:
    """A job in the middle of training: state in the optimizer, a gradient, a frozen weight, a module in eval mode."""
    seed_everything(3)
    base = small(device=CPU)
    model = base.model
    assert isinstance(model, Net)
    optimizer = AdamW(
        [{"params": [model.first.weight]}, {"params": [*model.norm.parameters(), *model.last.parameters()]}], lr=1e-2
    )
    model.first.bias.requires_grad_(False)
    model.again.bias.requires_grad_(False)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=3, batch_norm="microbatch", buffers="each")
    for _ in range(3):
        accumulator.step(base.first_batch(), base.loss_fn)
    model.drop.eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    given = {"optimizer": optimizer, **changed}
    return mb.Job(
        model=model, loss_fn=changed.get("loss_fn", base.loss_fn), data=changed.get("data", base.data), batch_size=8,
        microbatch_size=3, batch_norm="microbatch", buffers="each", optimizer=given["optimizer"],
        scheduler=changed.get("scheduler"),
    )  # fmt: skip


def test_everything_is_as_before_to_the_bit() -> None:
    job = worn()
    before = state_of(job)
    tensors = [*job.model.parameters(), *job.model.buffers(), *(each.grad for each in job.model.parameters())]
    mb.find_learning_rate(job, steps=30, seeds=2)
    assert_same(state_of(job), before)
    now = [*job.model.parameters(), *job.model.buffers(), *(each.grad for each in job.model.parameters())]
    assert all(one is other for one, other in zip(tensors, now, strict=True))  # the same tensors, not only equal ones


def test_a_step_after_the_search_is_the_step_without_it() -> None:
    def after(search: bool) -> dict[str, Any]:
        job = worn()
        if search:
            mb.find_learning_rate(job, steps=25, seeds=1)
        accumulator = mb.Accumulator(
            job.model, job.optimizer, microbatch_size=3, batch_norm="microbatch", buffers="each"
        )
        accumulator.step(job.first_batch(), job.loss_fn)
        return state_of(job)

    assert_same(after(True), after(False))


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 40, 95])
def test_everything_is_as_before_after_an_error_too(kind: type[BaseException], at: int) -> None:
    calls = 0

    def loss_fn(model: nn.Module, microbatch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise kind
        x, y = microbatch
        return nn.functional.cross_entropy(model(x), y)

    job = worn(loss_fn=loss_fn)
    calls = -1_000_000  # what made it worn does not count
    before = state_of(job)
    calls = 0
    with pytest.raises(kind):
        mb.find_learning_rate(job, steps=25, seeds=2)
    assert_same(state_of(job), before)


def test_an_error_of_progress_leaves_everything_as_before() -> None:
    steps: list[RangeStep] = []

    def stop(step: RangeStep) -> None:
        steps.append(step)
        if len(steps) == 7:
            raise KeyboardInterrupt

    job = worn()
    before = state_of(job)
    with pytest.raises(KeyboardInterrupt):
        mb.find_learning_rate(job, steps=25, seeds=2, progress=stop)
    assert_same(state_of(job), before)
    assert [(each.sweep, each.step, each.steps, each.sweeps) for each in steps] == [(0, i, 26, 2) for i in range(1, 8)]


def test_parameters_of_the_optimizer_that_are_not_the_models_are_put_back() -> None:
    centre = nn.Parameter(torch.ones(1, dtype=torch.float64))
    job = bowl([1.0])
    optimizer = SGD([{"params": job.model.parameters()}, {"params": [centre]}], lr=0.1)
    job = mb.Job(
        model=job.model, optimizer=optimizer, loss_fn=lambda m, x: bowl_loss(m, x) + (centre**2).sum(), data=job.data,
        batch_size=16, microbatch_size=16,
    )  # fmt: skip
    mb.find_learning_rate(job, steps=30, seeds=1)
    assert torch.equal(centre.detach(), torch.ones(1, dtype=torch.float64))
    assert centre.grad is None


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(0.01)
    job = bowl([1.0], rate=0.01, make=lambda parameters, lr: AdamW(parameters, lr=rate))
    mb.find_learning_rate(job, steps=30, seeds=1)
    assert job.optimizer.param_groups[0]["lr"] is rate  # type: ignore[union-attr]
    assert float(rate) == pytest.approx(0.01)


# -- data -------------------------------------------------------------------------------------------------------------


class Counting(IterableDataset[Tensor]):
    """A stream that goes on where it stood, with a generator of its own."""

    def __init__(self) -> None:
        self.position = 0
        self.generator = torch.Generator().manual_seed(5)
        self.drawn = [0]

    def __iter__(self) -> Any:
        while self.position < 400:
            self.position += 1
            self.drawn[0] += 1
            yield torch.randn(3, generator=self.generator) + self.position

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn[0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn[0] = state["drawn"]


def streamed(data: Any) -> mb.Job:
    model = nn.Linear(3, 1)
    return mb.Job(
        model=model, optimizer=SGD(model.parameters(), lr=1e-9), loss_fn=lambda m, x: m(x).square().mean(), data=data,
        batch_size=4, microbatch_size=2,
    )  # fmt: skip


def test_a_stream_goes_on_where_it_stood() -> None:
    data = Counting()
    rows = iter(data)
    for _ in range(5):
        next(rows)
    del rows
    twin = copy.deepcopy(data.position), data.generator.get_state(), data.drawn[0]
    mb.find_learning_rate(streamed(data), low=1e-12, high=1e-11, steps=20, seeds=3)
    assert (data.position, data.drawn[0]) == (twin[0], twin[2])
    assert torch.equal(data.generator.get_state(), twin[1])
    expected = torch.randn(3, generator=torch.Generator().set_state(twin[1])) + 6
    assert torch.equal(next(iter(data)), expected)


def test_every_run_reads_other_rows_of_a_stream() -> None:
    seen: list[int] = []

    class Numbered(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            for index in range(10_000):
                seen.append(index)
                yield torch.ones(3)

    mb.find_learning_rate(streamed(Numbered()), low=1e-30, high=1e-29, steps=20, seeds=2)
    assert seen == list(range(2 * 21 * 4))


def test_a_loader_with_its_own_generator_gives_the_same_next_batch() -> None:
    def loader() -> DataLoader[Any]:
        rows: Any = list(torch.randn(40, 3, generator=torch.Generator().manual_seed(2)))
        return DataLoader(rows, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(11))

    searched, plain = loader(), loader()
    mb.find_learning_rate(streamed(searched), low=1e-12, high=1e-11, steps=20, seeds=2)
    for one, other in zip(searched, plain, strict=True):
        assert torch.equal(one, other)


def test_a_stream_that_can_be_read_once_is_refused() -> None:
    with pytest.raises((ConfigError, DataError), match="read once only"):
        mb.find_learning_rate(streamed(iter(torch.randn(9, 3))))


# -- jobs of other kinds ----------------------------------------------------------------------------------------------


def test_the_curve_does_not_depend_on_the_microbatch() -> None:
    curves = [mb.find_learning_rate(bowl([1.0, 3.0], noise=0.3), microbatch_size=size, seeds=1) for size in (1, 5, 16)]
    assert [each.microbatch_size for each in curves] == [1, 5, 16]
    for each in curves[1:]:
        assert list(each.curve.smoothed) == pytest.approx(list(curves[0].curve.smoothed), rel=1e-9)


def test_auto_finds_a_size_once_and_the_effective_batch_is_the_one_asked_for() -> None:
    found = mb.find_learning_rate(bowl([1.0], noise=0.1), batch_size=32, microbatch_size="auto", seeds=2)
    assert found.batch_size == 32
    assert 1 <= found.microbatch_size <= 32
    assert found.suggested is not None


def test_a_loss_that_couples_samples_goes_through_encode() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    rows = torch.randn(32, 4)

    def encode(model: nn.Module, microbatch: Tensor) -> Tensor:
        return model(microbatch)

    def loss_fn(model: nn.Module, whole: Tensor) -> Tensor:
        return whole.var(dim=0).sub(4).square().mean()  # of the whole batch: no mean over rows

    def job(size: int) -> mb.Job:
        torch.manual_seed(0)
        model.reset_parameters()
        return mb.Job(
            model=model, optimizer=SGD(model.parameters(), lr=1e-2), loss_fn=loss_fn, encode=encode, data=list(rows),
            batch_size=16, microbatch_size=size,
        )  # fmt: skip

    whole, cut = (mb.find_learning_rate(job(size), steps=40, seeds=1) for size in (16, 4))
    assert list(cut.curve.smoothed[:20]) == pytest.approx(list(whole.curve.smoothed[:20]), rel=1e-4)


def test_float16_takes_a_loss_scaler_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    rows = torch.randn(64, 4)
    job = mb.Job(
        model=model, optimizer=SGD(model.parameters(), lr=1e-2), loss_fn=lambda m, x: (m(x) - 1).square().mean(),
        data=list(rows), batch_size=16, microbatch_size=8, autocast=torch.float16,
    )  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    found = mb.find_learning_rate(job, steps=60, seeds=1)
    assert found.diverged_at is not None
    assert_same(dict(model.state_dict()), dict(before))


# -- what is printed, stored and drawn --------------------------------------------------------------------------------


def test_a_result_is_printed_stored_and_drawn(tmp_path: Any) -> None:
    found = mb.find_learning_rate(bowl([1.0], noise=0.2))
    text = str(found)
    for mark in ("< suggested", "< diverged", "< given", "rate", "spread"):
        assert mark in text
    assert max(map(len, found.table().splitlines())) <= 72
    kept = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert kept["suggested"] == found.suggested
    assert len(kept["curve"]["losses"]) == 3
    assert len(kept["curve"]["rates"]) == len(kept["curve"]["smoothed"]) == len(kept["curve"]["spread"])
    assert found.svg() == found.svg()
    assert "suggested" in found.svg()
    found.draw(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        found.draw(tmp_path / "a.jpg")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = mb.find_learning_rate(bowl([1.0]), steps=30, seeds=1)
    with pytest.raises(ImportError, match=r"microbatch\[figures\]"):
        found.svg()
