"""A cache of keys and values, to which a block that is computed again in backward would write twice."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microbatch.errors import ConfigError

from .reference import EXACT, WRONG, Batch, by_step, by_window, full_batch, gradients_of, relative_error, subject

WIDTH = 6


class Layer(nn.Module):
    """Attend to the keys of this call and to those in the cache, as a decoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, past_key_values: Any = None) -> Tensor:
        keys, values = self.key(x), self.value(x)
        if past_key_values is not None:
            past_key_values.append((keys, values))
            keys, values = (torch.cat(each, 1) for each in zip(*past_key_values, strict=True))
        return x + torch.tanh(x @ keys.transpose(1, 2)) @ values


class Decoder(nn.Module):
    """Keep a cache by default, in training too, unless the configuration says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, *, use_cache: bool | None = None) -> Tensor:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        for layer in self.layers:
            x = layer(x, past_key_values=[] if use_cache else None)
        return x


def squared(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).square().mean()


def insisting(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"], use_cache=True).square().mean()


def switched_on(model: Any) -> bool:
    return model.config.use_cache is True


def drawn() -> tuple[Decoder, Batch]:
    torch.manual_seed(0)
    return Decoder().double(), {"x": torch.randn(4, 3, WIDTH).double()}


@pytest.mark.parametrize("way", [by_step, by_window])
def test_a_cache_is_off_in_a_window_with_checkpoints(way: Any) -> None:
    model, batch = drawn()
    reference = full_batch(model, squared, batch)
    it = subject(model, size=2, checkpoint="all")
    way(it, batch, squared, size=2)
    assert relative_error(it.updates[-1], reference) <= EXACT
    assert switched_on(it.model)


def test_a_window_that_fails_switches_the_cache_on_again() -> None:
    model, batch = drawn()
    it = subject(model, size=2, checkpoint="all")

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        it.accumulator.step(batch, failing)
    assert switched_on(it.model)


def test_a_cache_that_the_loss_function_insists_on_is_refused_by_name() -> None:
    model, batch = drawn()
    it = subject(model, size=2, checkpoint="all")
    with pytest.raises(ConfigError, match=r"'layers\.0' was given a cache \(past_key_values=, a list\)"):
        it.accumulator.step(batch, insisting)
    it = subject(model, size=2)  # without checkpoints it may be used
    it.accumulator.step(batch, insisting)
    assert relative_error(it.updates[-1], full_batch(model, insisting, batch)) <= EXACT


def test_a_second_forward_pass_with_the_cache_is_told_apart() -> None:
    """The negative control: a pass that finds the keys of an earlier one in the cache has another gradient."""
    model, batch = drawn()
    reference, twin = full_batch(model, squared, batch), copy.deepcopy(model)
    x = batch["x"]
    for layer in twin.layers:
        cache: list[Any] = []
        layer(x, past_key_values=cache)
        x = layer(x, past_key_values=cache)
    x.square().mean().backward()
    assert relative_error(gradients_of(twin), reference) > WRONG
