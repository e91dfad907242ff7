"""Weights without requires_grad that forward passes move, as in a momentum encoder, are treated as buffers: law S5."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import microbatch as mb
from microbatch.errors import ConfigError, WeightsMovedError, WindowError

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def in_place(teacher: Tensor, student: Tensor) -> None:
    teacher.mul_(0.9).add_(student, alpha=0.1)


def through_data(teacher: Tensor, student: Tensor) -> None:
    teacher.data.mul_(0.9).add_(student.data, alpha=0.1)


def new_data(teacher: Tensor, student: Tensor) -> None:
    teacher.data = teacher.data * 0.9 + student.data * 0.1


WAYS = [in_place, through_data, new_data]


class Momentum(nn.Module):
    """Two encoders, of which the second follows the first with each forward pass, beside a frozen body."""

    def __init__(self, move: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.move, self.body = move, nn.Linear(4, 4)
        self.student, self.teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        self.body.requires_grad_(False)
        self.teacher.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                self.move(teacher, student)
        x = self.body(x)
        return self.student(x) - self.teacher(x)


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def accumulator(model: nn.Module, **options: Any) -> mb.Accumulator:
    trained = [each for each in model.parameters() if each.requires_grad]
    more: dict[str, Any] = {"microbatch_size": 2} | options
    return mb.Accumulator(model, SGD(trained, lr=0.1), **more)


def said(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if each.category is mb.MicrobatchWarning]


def plain(model: nn.Module, steps: int = 1) -> nn.Module:
    """Train a copy on whole batches, in plain PyTorch."""
    twin = copy.deepcopy(model)
    optimizer = SGD([each for each in twin.parameters() if each.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        square(twin, X).backward()
        optimizer.step()
    return twin


def alike(model: nn.Module, twin: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    return all(torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14) for ours, theirs in pairs)


def values(model: nn.Module) -> list[Tensor]:
    return [each.detach().clone() for each in model.parameters()]


@pytest.mark.parametrize("move", WAYS)
def test_s5_frozen_weights_that_move_are_named_once(move: Any) -> None:
    it = accumulator(Momentum(move))
    (text,) = said(lambda: [it.step(X, square) for _ in range(3)])
    assert "teacher.weight, teacher.bias (of Linear)" in text
    assert "moved 3 times" in text
    assert "body" not in text
    assert said(lambda: accumulator(Momentum(move), buffers="each").step(X, square)) == []
    assert said(lambda: accumulator(Momentum(move), microbatch_size=6).step(X, square)) == []


@pytest.mark.parametrize("move", WAYS)
@pytest.mark.parametrize("way", ["once", "mean"])
@pytest.mark.parametrize("size", [2, 4])
def test_s5_frozen_weights_move_once_a_window_as_in_plain_torch(move: Any, way: str, size: int) -> None:
    model = Momentum(move)
    twin = plain(model, 4)
    control = copy.deepcopy(model)
    it = accumulator(model, buffers=way, microbatch_size=size)
    assert said(lambda: [it.step(X, square) for _ in range(4)]) == []
    assert alike(model, twin)
    it = accumulator(control, buffers="each", microbatch_size=size)
    for _ in range(4):
        it.step(X, square)
    assert not alike(control, twin)  # the negative control


def encode(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def spread(_: nn.Module, encoded: Tensor) -> Tensor:
    return (encoded - encoded.mean(0)).square().mean()


@pytest.mark.parametrize("move", WAYS)
def test_s5_a_batch_that_is_encoded_twice_sees_the_same_frozen_weights_twice(move: Any) -> None:
    model = Momentum(move)
    twin = copy.deepcopy(model)
    spread(twin, twin(X)).backward()
    it = mb.Accumulator(model, microbatch_size=2, buffers="once", coupled="twice")
    it.gradient(X, spread, encode=encode)
    assert alike(model, twin)
    for ours, theirs in zip(model.student.parameters(), twin.student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("move", WAYS)
def test_s5_the_second_encoding_of_a_batch_sees_the_frozen_weights_of_the_first(move: Any) -> None:
    found: list[list[Tensor]] = []
    for coupled in ("keep", "twice", "another"):
        model = Momentum(move)
        it = mb.Accumulator(
            model, microbatch_size=2, buffers="each", coupled=coupled if coupled != "another" else "keep"
        )
        if coupled == "another":  # the negative control: weights that have moved already
            model(X)
        it.gradient(X, spread, encode=encode)
        found.append([each.grad for each in model.student.parameters() if each.grad is not None] + values(model))
    kept, twice, control = found
    for ours, theirs in zip(twice, kept, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(control[0], kept[0], rtol=1e-6)


@pytest.mark.parametrize("move", WAYS)
@pytest.mark.parametrize("options", [{}, {"buffers": "each"}, {"buffers": "once"}])
@pytest.mark.parametrize("before", [0, 3])
def test_b4_a_window_that_fails_puts_frozen_weights_back(move: Any, options: Any, before: int) -> None:
    model, calls = Momentum(move), list[int]()
    it = accumulator(model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(before):
            it.step(X, square)

    def failing(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(0)
        return square(model, x) / (1 / 0 if len(calls) == 2 else 1)

    weights = values(model)
    with pytest.raises(ZeroDivisionError):
        it.step(X, failing)
    assert all(map(torch.equal, weights, model.parameters()))


def test_m1_a_retry_after_memory_ran_out_starts_from_the_frozen_weights_before() -> None:
    model, calls = Momentum(in_place), list[int]()
    twin = plain(model)

    def short(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == 2:
            raise MemoryError
        return square(model, x)

    assert accumulator(model, buffers="once", microbatch_size=4).step(X, short).retries == 1
    assert alike(model, twin)


class Adapted(nn.Module):
    """A frozen body beside a small trained part of other shapes, as with LoRA."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.bodies = nn.ModuleList([nn.Linear(4, 4) for _ in range(20)]).double().requires_grad_(False)
        self.small = nn.Linear(4, 1, bias=False).double()
        self.moves = self.replaces = False

    def forward(self, x: Tensor) -> Tensor:
        for body in self.bodies:
            x = body(x).tanh()
        if self.moves:
            with torch.no_grad():
                self.bodies[7].get_parameter("weight").mul_(1.01)
        if self.replaces:
            self.bodies[3].bias = nn.Parameter(torch.ones(4).double(), requires_grad=False)
        return self.small(x)


def test_s5_frozen_weights_that_are_replaced_are_named() -> None:
    model = Adapted()
    it = accumulator(model)
    it.step(X, square)
    model.replaces = True
    (text,) = said(lambda: [it.step(X, square) for _ in range(2)])
    assert "bodies.3.bias" in text


def late(model: nn.Module, x: Tensor) -> Tensor:
    raise ZeroDivisionError(square(model, x))


def test_s5_a_frozen_body_is_not_copied_and_is_said_to_have_moved_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Tensor] = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda self, **more: copies.append(self) or clone(self, **more))
    model = Adapted()
    it = accumulator(model)
    assert said(lambda: [it.step(X, square) for _ in range(2)]) == []
    assert not any(each.shape in {(4, 4), (4,)} for each in copies)
    model.moves = True
    (text,) = said(lambda: [it.step(X, square) for _ in range(3)])
    assert "bodies.7.weight (of Linear)" in text
    weights = values(model)
    with pytest.raises(ZeroDivisionError):  # that it moves is known by now
        it.step(X, late)
    assert all(map(torch.equal, weights, model.parameters()))


def test_s5_a_window_that_fails_before_it_is_known_says_what_it_cannot_put_back() -> None:
    model = Adapted()
    model.moves = True
    it = accumulator(model)

    def fail_late() -> None:
        with pytest.raises(ZeroDivisionError):
            it.step(X, late)

    (text,) = said(fail_late)
    assert "bodies.7.weight" in text
    assert "stay as they are" in text
    weights = values(model)
    assert said(fail_late) == []
    assert all(map(torch.equal, weights, model.parameters()))


@pytest.mark.parametrize("move", WAYS)
def test_s5_exact_batch_normalisation_refuses_frozen_weights_that_move(move: Any) -> None:
    model = nn.Sequential(Momentum(move), nn.BatchNorm1d(3)).double()
    before = copy.deepcopy(model.state_dict())
    it = accumulator(model, batch_norm="exact")
    for _ in range(2):  # also when it is known which of them move
        with pytest.raises(
            WeightsMovedError, match=r"0\.teacher\.weight.*in lockstep.* outside of the model's forward"
        ):
            it.step(X, square)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    each = copy.deepcopy(model)
    assert said(lambda: accumulator(each, batch_norm="exact", buffers="each").step(X, square)) == []
    assert not alike(each, plain(model))  # the negative control: what is refused is wrong


def test_s5_exact_batch_normalisation_is_exact_where_the_momentum_is_moved_after_the_step() -> None:
    model = nn.Sequential(Momentum(lambda *_: None), nn.BatchNorm1d(3)).double()
    twin = plain(model)
    assert said(lambda: accumulator(model, batch_norm="exact").step(X, square)) == []
    assert alike(model, twin)


@pytest.mark.parametrize("options", [{}, {"coupled": "keep"}])
def test_s5_an_advice_names_only_options_that_the_others_allow(options: Any) -> None:
    (text,) = said(lambda: accumulator(Momentum(in_place), **options).step(X, square))
    assert ('buffers="once"' in text) == (not options)
    (text,) = said(lambda: accumulator(Queue(), **options).step(X, square))
    assert ('buffers="once"' in text) == (not options)
    if options:
        with pytest.raises(ConfigError, match='buffers="once" or "mean" does not go with'):
            accumulator(Momentum(in_place), buffers="once", **options)


def test_s5_frozen_weights_that_begin_to_move_late_are_said_and_then_move_once() -> None:
    model = Adapted()
    it = accumulator(model, buffers="once")
    for _ in range(3):
        it.step(X, square)
    model.moves = True
    (text,) = said(lambda: it.step(X, square))
    assert "from the next window on" in text
    twin = plain(model)
    assert said(lambda: it.step(X, square)) == []
    assert alike(model, twin)


def test_s5_layers_that_write_to_frozen_weights_and_change_nothing_are_not_named() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 4, max_norm=1.0).requires_grad_(False)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.words(x))

    it = accumulator(Words())
    assert said(lambda: [it.step(torch.arange(6) % 5, square) for _ in range(3)]) == []


# -- buffers that change their shape, and those of layers derived from batch normalisation ---------------------------


class Queue(nn.Module):
    """Keeps a queue that grows with every forward pass."""

    queue: Tensor

    def __init__(self, *, resized: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.resized, self.linear = resized, nn.Linear(4, 3).double()
        self.register_buffer("queue", torch.zeros(1, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        new = torch.cat([self.queue, self.queue[-1:] + 1])
        if self.resized:
            self.queue.resize_(new.shape).copy_(new)
        else:
            self.queue = new
        return out - new.mean(0)


@pytest.mark.parametrize("resized", [False, True])
def test_s5_a_buffer_that_grows_is_moved_once_and_has_no_mean(resized: bool) -> None:
    model = Queue(resized=resized)
    twin = plain(model, 2)
    control, refused = copy.deepcopy(model), copy.deepcopy(model)
    it = accumulator(model, buffers="once")
    for _ in range(2):
        it.step(X, square)
    assert alike(model, twin)
    accumulator(control, buffers="each").step(X, square)
    assert len(control.queue) == 4  # the negative control: three microbatches, three rows

    before = copy.deepcopy(refused.state_dict())
    with pytest.raises(WindowError, match=r"'queue' changed its shape from \(1, 3\) to \(2, 3\).*buffers=\"once\""):
        accumulator(refused, buffers="mean").step(X, square)
    assert all(torch.equal(value, before[name]) for name, value in refused.state_dict().items())


class Derived(nn.BatchNorm1d):
    """Batch normalisation with a centre of its own."""

    centre: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        self.centre.mul_(0.9).add_(input.detach().mean(0), alpha=0.1)
        return super().forward(input) - self.centre


def test_s5_buffers_that_a_layer_derived_from_batch_norm_adds_are_named() -> None:
    norm = Derived(3)
    norm.register_buffer("centre", torch.zeros(3))
    model = nn.Sequential(nn.Linear(4, 3), norm).double()
    it = accumulator(model, batch_norm="microbatch")
    (text,) = said(lambda: it.step(X, square))
    assert "buffers move with every microbatch: 1.centre (of Derived)" in text
