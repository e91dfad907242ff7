"""What is likely wrong is said once, by name, or refused: laws S3 to S6 and S8."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD

import microbatch as mb
from microbatch.errors import ConfigError, NoGraphError, WeightsMovedError
from microbatch.step.plain_optimizers import plain_optimizers

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).square().mean()


def accumulator(model: nn.Module, optimizer: Any = None, **options: Any) -> mb.Accumulator:
    optimizer = SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    return mb.Accumulator(model, optimizer, microbatch_size=5, **options)


def said(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    ours = [each for each in caught if each.category is mb.MicrobatchWarning]
    assert all(each.filename == __file__ for each in ours)  # the user's own line
    return [str(each.message) for each in ours]


# -- S3 and S6: what the optimizers hold -----------------------------------------------------------------------------


def test_s3_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"none of the model's 4 trainable parameters.*'0.weight'"):
        accumulator(network(), SGD(network().parameters(), lr=0.1))


def test_s3_weights_that_cannot_be_trained_yet_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LazyLinear(3)).double()
    with pytest.raises(ConfigError, match=r"'1\.weight' has no shape yet"):
        accumulator(model)
    model(X)
    assert accumulator(model).step(X, square).applied
    with torch.inference_mode():
        made = network()
    with pytest.raises(ConfigError, match=r"'0\.weight' was made inside torch.inference_mode"):
        accumulator(made)


def test_s3_a_parameter_in_two_optimizers_is_refused() -> None:
    model = network()
    with pytest.raises(ConfigError, match=r"'2\.weight' is in two optimizers"):
        accumulator(model, [SGD(model.parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)])


@pytest.mark.parametrize("options", [{}, {"ranks": mb.Ranks(deterministic=True)}, {"batch_norm": "exact"}])
def test_s3_a_loss_of_another_model_is_refused_and_nothing_changes(options: Any) -> None:
    model, other = network(), network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NoGraphError, match="depends on no parameter"):
        accumulator(model, **options).step(X, lambda _, batch: square(other, batch))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.grad for p in model.parameters()] == [None] * 4


def test_s3_s6_parameters_that_no_optimizer_holds_are_named_and_not_in_the_norm() -> None:
    model = network()
    it = accumulator(model, SGD(model[0].parameters(), lr=0.1), max_grad_norm=1e-3)
    seen: list[Tensor] = []
    it.options.optimizers[0].register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in model[0].parameters() if p.grad is not None]).norm())
    )
    (text,) = said(lambda: [it.step(X, square) for _ in range(2)])
    assert "2.weight, 2.bias" in text
    torch.testing.assert_close(seen[0], torch.tensor(1e-3, dtype=torch.float64))

    model = network()
    for p in model[2].parameters():
        p.requires_grad_(False)  # as the text says
    assert said(lambda: accumulator(model, SGD(model[0].parameters(), lr=0.1)).step(X, square)) == []


def test_s6_a_gradient_that_nobody_steps_may_be_infinite() -> None:
    model: Any = network()
    it = accumulator(model, SGD(model[0].parameters(), lr=0.1))

    model[2].weight.register_hook(lambda grad: grad * torch.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert it.step(X, lambda _, batch: model[0](batch).square().mean() + model[2].weight.sum()).applied


# -- S4: weights that move -------------------------------------------------------------------------------------------


def move(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.mul_(0.5)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_s4_a_write_to_the_weights_inside_a_window_is_refused(after: int) -> None:
    model = network()
    it = accumulator(model)

    def loop() -> None:
        with it.window() as window:
            for index, microbatch in enumerate(window.split(X)):  # three
                window.backward(square(model, microbatch))
                if index == after:
                    move(model)

    with pytest.raises(WeightsMovedError, match=r"'0\.weight'"):
        loop()
    it.step(X, square)  # the next window is whole


def test_s4_an_optimizer_in_hooks_is_refused() -> None:
    model = network()
    for p in model.parameters():
        inner = SGD([p], lr=0.1)
        p.register_post_accumulate_grad_hook(lambda _, inner=inner: inner.step())
    with pytest.raises(WeightsMovedError, match="and 3 more"):
        accumulator(model).step(X, square)


def test_s4_validation_and_writes_between_windows_are_free() -> None:
    model = network()
    it = accumulator(model)
    for _ in range(2):
        with it.window() as window:
            for microbatch in window.split(X):
                window.backward(square(model, microbatch))
                with torch.no_grad():
                    model.eval()(X)
                    model.train()
        move(model)


# -- S5: buffers that move -------------------------------------------------------------------------------------------


def normed() -> nn.Sequential:
    torch.manual_seed(2)
    model = nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model.get_parameter("0.parametrizations.weight.original").add_(torch.randn(8, 6).double())
    return model


class Centre(nn.Module):
    """Keeps a moving average of what comes in, and subtracts it."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Subtract the average from before."""
        out = x - self.centre
        with torch.no_grad():
            self.centre.mul_(0.9).add_(0.1 * x.mean(0))
        return out


def test_s5_buffers_that_move_are_named_once() -> None:
    it = accumulator(normed())
    (text,) = said(lambda: [it.step(X, square) for _ in range(2)])
    assert "0.parametrizations.weight.0._u" in text
    assert "_SpectralNorm" in text
    assert "moved 3 times" in text
    assert said(lambda: accumulator(normed(), buffers="each").step(X, square)) == []


class Codebook(nn.Module):
    """Moves its codes through ``.data``, as many implementations do, which raises no version counter."""

    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("unused", torch.full((6,), float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        """Subtract the codes from before."""
        out = x - self.codes
        self.codes.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return out


def test_s5_buffers_that_move_through_data_are_named() -> None:
    it = accumulator(nn.Sequential(Codebook(), network()))
    (text,) = said(lambda: [it.step(X, square) for _ in range(3)])
    assert "0.codes (of Codebook)" in text


def test_s5_statistics_of_instance_norm_are_named() -> None:
    model = nn.Sequential(nn.InstanceNorm1d(6, track_running_stats=True), nn.Linear(6, 3)).double()
    model[0].train()
    (text,) = said(lambda: accumulator(model).step(X[:, :, None].expand(-1, -1, 6).cumsum(2), square))
    assert "0.running_mean" in text


@pytest.mark.parametrize("make", [normed, lambda: nn.Sequential(Centre(), network())])
@pytest.mark.parametrize("way", ["once", "mean"])
def test_s5_a_buffer_moves_once_and_the_gradient_is_the_large_batchs(make: Callable[[], nn.Module], way: str) -> None:
    ref, model = make(), make()
    square(ref, X).backward()
    assert said(lambda: accumulator(model, buffers=way).gradient(X, square)) == []
    for p, q in zip(ref.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
    buffers = list(zip(ref.buffers(), model.buffers(), strict=True))
    exact = way == "mean" or len(buffers) > 1  # the centre needs the mean of all rows
    assert all(torch.allclose(b, c, rtol=1e-12) for b, c in buffers) == exact

    plain = make()  # the negative control: what happens without the option
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accumulator(plain).gradient(X, square)
    assert not all(torch.allclose(b, c, rtol=1e-9) for b, c in zip(ref.buffers(), plain.buffers(), strict=True))


def test_s5_a_window_that_fails_or_is_dropped_puts_buffers_back() -> None:
    model = nn.Sequential(Centre(), network())
    it = accumulator(model, buffers="mean", nonfinite="skip")
    before = copy.deepcopy(list(model.buffers()))
    with pytest.raises(ZeroDivisionError):
        it.step(X, lambda model, batch: square(model, batch) / (1 / 0 if len(batch) < 5 else 1))
    assert all(map(torch.equal, before, model.buffers()))
    assert not it.step(X * torch.inf, square).applied
    assert all(map(torch.equal, before, model.buffers()))
    assert it.step(X, square).applied
    assert not torch.equal(before[0], next(model.buffers()))


# -- S8: a contrastive loss of one microbatch ------------------------------------------------------------------------


def test_s8_a_contrastive_loss_without_encode_is_said_once() -> None:
    def encoded(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        return model(batch), model(batch * 2)

    def naive(model: nn.Module, batch: Tensor) -> mb.Loss:
        return mb.losses.clip(*encoded(model, batch), scale=1.0)

    it = accumulator(network())
    (text,) = said(lambda: [it.step(X, naive) for _ in range(2)])
    assert "mb.losses.clip" in text
    model = network()
    whole = mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=12)
    assert said(lambda: whole.step(X, naive)) == []
    assert said(lambda: it.step(X, lambda _, e: mb.losses.clip(*e, scale=1.0), encode=encoded)) == []


# -- wrapped optimizers ----------------------------------------------------------------------------------------------


class Wrapper(torch.optim.Optimizer):
    """Looks like an optimizer, and holds one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        """Count, and step only sometimes."""
        del closure
        self.calls += 1


class Accelerated(Wrapper):
    """Is called as the one of Accelerate, which scales and places."""

    step = Wrapper.step
    __module__, __qualname__ = "accelerate.optimizer", "AcceleratedOptimizer"


class Derived(Accelerated):
    """Inherits `step`, and so adds nothing either."""


def test_a_wrapper_that_only_scales_is_unwrapped_and_what_is_none_is_refused() -> None:
    model, twin = network(), network()
    optimizer = SGD(model.parameters(), lr=0.1)
    wrapper = Accelerated(Derived(optimizer))
    it = accumulator(model, wrapper)
    assert it.options.optimizers == [optimizer]
    it.step(X, square)
    accumulator(twin).step(X, square)
    assert wrapper.calls == 0
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    with pytest.raises(ConfigError, match="not an int"):
        plain_optimizers(3)


class Noam:
    """The wrapper of the Annotated Transformer: its step sets the learning rate, which is 0 before."""

    def __init__(self, optimizer: Any) -> None:
        self.inner, self.steps = optimizer, 0

    def step(self) -> None:
        """Warm up, and step."""
        self.steps += 1
        self.inner.param_groups[0]["lr"] = 0.1 * self.steps
        self.inner.step()


class Overridden(Accelerated):
    """Has a `step` of its own again."""

    def step(self, closure: Any = None) -> Any:
        """Step what is inside twice."""
        return [self.optimizer.step(closure) for _ in range(2)]


class Lookahead(Wrapper):
    """Has groups of parameters as well, but is no initialised optimizer."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state


@pytest.mark.parametrize("wrap", [Noam, Wrapper, Lookahead, Overridden, lambda inner: Accelerated(Noam(inner))])
@pytest.mark.parametrize("several", [False, True])
def test_a_wrapper_that_may_change_the_step_is_refused_with_the_line_to_write(wrap: Any, several: bool) -> None:
    model, twin = network(), network()
    given = wrap(SGD(model.parameters(), lr=0.0))
    with pytest.raises(
        ConfigError, match=r"around an SGD.*accumulator\.gradient\(batch, loss_fn\), then wrapper\.step"
    ):
        plain_optimizers([given] if several else given)

    noam, theirs = Noam(SGD(model.parameters(), lr=0.0)), Noam(SGD(twin.parameters(), lr=0.0))
    it = mb.Accumulator(model, microbatch_size=5)
    for _ in range(2):
        it.gradient(X, square)  # as the text says
        noam.step()
        twin.zero_grad()
        square(twin, X).backward()
        theirs.step()
    for ours, plain in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)


class Schedule:
    """Looks like the scheduler of Accelerate, which holds no optimizer but a scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.get_last_lr = scheduler, scheduler.get_last_lr


@pytest.mark.parametrize("wrap", [lambda each: each, Schedule, Accelerated])
def test_a_scheduler_is_refused_as_one_however_it_is_wrapped(wrap: Any) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(SGD(network().parameters(), lr=0.1), 1)
    with pytest.raises(ConfigError, match=r"scheduler (StepLR|Schedule); pass its optimizer.*scheduler\.step"):
        plain_optimizers(wrap(scheduler))


def test_s3_a_gradient_without_an_optimizer_that_reaches_no_weight_is_refused() -> None:
    it = mb.Accumulator(network(), microbatch_size=5)

    def spread(_: nn.Module, encoded: Tensor) -> Tensor:
        return encoded.var()

    def detached(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).detach()

    with pytest.raises(NoGraphError, match="depends on no parameter of the model"):
        it.gradient(X, spread, encode=detached)
    with pytest.raises(NoGraphError, match="depends on no parameter of the model"):
        it.gradient(X, lambda _, x: x.clone().requires_grad_().mean())
    assert it.gradient(X, spread, encode=lambda model, x: model(x)).grad_norm > 0  # the negative control


@pytest.mark.parametrize("where", ["buffer", "default device"])
def test_s5_tensors_without_values_and_another_default_device_change_nothing(where: str) -> None:
    model, twin = network(), network()
    batch = {"x": X, "labels": torch.arange(12) % 3}
    loss: Any = lambda model, batch: F.cross_entropy(model(batch["x"]), batch["labels"])  # noqa: E731
    loss(twin, batch).backward()
    if where == "buffer":
        model.register_buffer("far", torch.zeros(2, device="meta"))
    it = mb.Accumulator(model, microbatch_size=5)
    with torch.device("meta") if where == "default device" else nullcontext():
        it.gradient(batch, loss)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
