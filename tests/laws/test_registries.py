"""Law C4: what a model registers on itself in a forward pass is registered once, and nothing else of it changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb

from .reference import Batch, gradients_of, relative_error, subject

EXACT = 1e-11
REGISTRIES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)]


class Lazy(nn.Module):
    """Registers something in its first forward pass, remembers that in an attribute, and computes with it."""

    def __init__(self, register: Callable[[Any], object], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(4, 8), norm or nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.inner.register_forward_hook(double_it)  # there before
        self.register, self.ready, self.seen = register, False, []
        self.handle: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.handle, self.ready = self.register(self), True
        self.seen = []
        out = self.head(self.norm(torch.tanh(self.inner(x))))
        return out * (1 + len(self.seen))

    def keep(self, *call: Any) -> None:
        """Keep what a module was called with, as a hook of any signature."""
        self.seen = [*self.seen, call[-1]]

    def shift(self, _module: nn.Module, inputs: Any) -> Any:
        return (inputs[0] + 1,)


class Warming(nn.Module):
    """Scales by what every forward pass raises."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.scale += 0.5
        return self.scale * x


def double_it(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def add_module(model: Any) -> None:
    model.inner.more = nn.Identity()
    model.inner.more.register_forward_hook(double_it)
    model.norm.register_forward_hook(lambda _module, _inputs, output: model.inner.more(output))


def add_buffer(model: Any) -> None:
    model.register_buffer("offset", torch.ones(8).double(), persistent=False)
    model.norm.register_forward_hook(lambda _module, _inputs, output: output + model.offset)


def count_up(model: Any) -> None:
    """Replace a buffer in every forward pass, as a model that counts its steps does."""
    model.register_buffer("count", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, _inputs: setattr(module, "count", module.count + 1))


REGISTERED: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda model: model.inner.register_forward_hook(double_it),
    "a hook of the model's own": lambda model: model.inner.register_forward_hook(model.keep),
    "a hook with keywords": lambda model: model.inner.register_forward_hook(
        lambda _module, _inputs, _keywords, output: 3 * output, with_kwargs=True
    ),
    "a hook that is always called": lambda model: model.inner.register_forward_hook(double_it, always_call=True),
    "a hook before": lambda model: model.head.register_forward_pre_hook(model.shift),
    "a backward hook": lambda model: model.head.register_full_backward_hook(
        lambda _module, inputs, _outputs: tuple(2 * each for each in inputs)
    ),
    "a hook of the state dict": lambda model: model.register_state_dict_post_hook(lambda *_: None),
    "a hook that loads": lambda model: model.register_load_state_dict_pre_hook(lambda *_: None),
    "a module": add_module,
    "a buffer": add_buffer,
    "a buffer that is replaced": count_up,
    "the removal of a hook": lambda model: model.inner._forward_hooks.clear(),
}


def drawn(register: Callable[[Any], Any], norm: nn.Module | None = None) -> tuple[Lazy, Batch]:
    torch.manual_seed(0)
    return Lazy(register, norm).double(), {"x": torch.randn(8, 4).double(), "y": torch.randint(0, 3, (8,))}


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def registered(model: nn.Module) -> list[tuple[str, str, int, list[Any]]]:
    """List what every module holds in every dictionary of its own: the dictionary's identity, and the entries."""
    found: list[tuple[str, str, int, list[Any]]] = []
    for path, module in model.named_modules():
        for name in REGISTRIES:
            registry = vars(module)[name]
            entries = list(registry.items()) if isinstance(registry, dict) else sorted(registry)
            found.append((path, name, id(registry), entries))
    return found


def sizes(model: nn.Module) -> list[tuple[str, str, int]]:
    return [(path, name, len(entries)) for path, name, _, entries in registered(model)]


@pytest.mark.parametrize("what", REGISTERED)
def test_what_is_registered_in_a_forward_pass_is_registered_once(what: str) -> None:
    model, batch = drawn(REGISTERED[what])
    whole = copy.deepcopy(model)
    loss_fn(whole, batch).backward()
    it = subject(model, size=2, batch_norm="exact")
    it.accumulator.step(batch, loss_fn)
    assert relative_error(it.updates[-1], gradients_of(whole)) <= EXACT
    assert sizes(it.model) == sizes(whole)
    torch.testing.assert_close(it.model(batch["x"]), whole(batch["x"]))  # also afterwards
    assert dict(it.model.named_buffers()).keys() == dict(whole.named_buffers()).keys()


def test_a_hook_that_came_home_is_the_models_own() -> None:
    """Its handle removes it, and a method among hooks is the model's own method."""
    model, batch = drawn(REGISTERED["a hook of the model's own"])
    it = subject(model, size=2, batch_norm="exact")
    it.accumulator.step(batch, loss_fn)
    trained: Any = it.model
    hooks = trained.inner._forward_hooks
    assert [each.__self__ for each in hooks.values() if each is not double_it] == [trained]
    trained.handle.remove()
    assert list(hooks.values()) == [double_it]


def nothing(_model: Any) -> None:
    """Register nothing."""


def test_a_window_leaves_every_dictionary_as_it_was() -> None:
    model, batch = drawn(nothing)
    model.inner.register_forward_hook(model.keep)
    it = subject(model, size=3, batch_norm="exact")
    before = registered(it.model)
    it.accumulator.step(batch, loss_fn)
    assert registered(it.model) == before


@pytest.mark.parametrize("what", REGISTERED)
def test_a_window_that_fails_leaves_every_dictionary_as_it_was(what: str) -> None:
    model, batch = drawn(REGISTERED[what])
    model.inner.register_forward_hook(model.keep)
    it = subject(model, size=3, batch_norm="exact")
    before = registered(it.model)
    calls: list[int] = []

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        loss = loss_fn(model, batch)
        calls.append(len(batch["y"]))
        if len(calls) == 3:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError):
        it.accumulator.step(batch, failing)
    assert registered(it.model) == before
    assert not it.model.ready


@pytest.mark.parametrize("what", ["a hook", "a hook of the model's own", "a hook before"])
@pytest.mark.parametrize(
    ("norm", "kinds"),
    [(nn.BatchNorm1d(8), ["batch_statistics"]), (nn.LayerNorm(8), []), (Warming(), ["state"])],
    ids=["batch norm", "layer norm", "state"],
)
def test_a_check_registers_hooks_once_and_finds_the_other_causes_alone(
    what: str, norm: nn.Module, kinds: list[str]
) -> None:
    """Where state is switched off, hooks are put back together with the attribute that says they are there."""
    model, batch = drawn(REGISTERED[what], norm)
    before = registered(model)
    found = mb.check(model, loss_fn, batch, microbatch_size=2)
    assert [cause.kind for cause in found.causes] == kinds
    assert registered(model) == before
