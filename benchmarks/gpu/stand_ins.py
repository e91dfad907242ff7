"""Small modules in the place of two that the suite's ``conftest.py`` imports: Hypothesis and beartype.

Types are not checked. A property is held on the examples that are written beside it, and on a few drawn ones.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
import zlib
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DRAWN = 2  # examples of each property beside the written ones
TRIES = 1000  # to draw a value that a filter lets pass


class UnsatisfiedError(Exception):
    """A drawn example does not meet what a test assumes."""


class Strategy:
    """Draw values.

    Args:
        draw: Draws one from a generator of random numbers.
    """

    def __init__(self, draw: Callable[[random.Random], Any]) -> None:
        self.draw = draw

    def __or__(self, other: Strategy) -> Strategy:
        """Draw from this one or from another."""
        return Strategy(lambda r: r.choice([self, other]).draw(r))

    def map(self, function: Callable[[Any], Any]) -> Strategy:
        """Draw from this one, and apply a function."""
        return Strategy(lambda r: function(self.draw(r)))

    def filter(self, holds: Callable[[Any], Any]) -> Strategy:
        """Draw from this one until a condition holds."""

        def draw(r: random.Random) -> Any:
            for _ in range(TRIES):
                if holds(value := self.draw(r)):
                    return value
            raise UnsatisfiedError

        return Strategy(draw)


def integers(min_value: int = -(2**16), max_value: int = 2**16) -> Strategy:
    """Draw a whole number, its bounds included."""
    return Strategy(lambda r: r.randint(min_value, max_value))


def floats(min_value: float = -1e6, max_value: float = 1e6, **_: Any) -> Strategy:
    """Draw a finite number."""
    return Strategy(lambda r: r.uniform(min_value, max_value))


def booleans() -> Strategy:
    """Draw a boolean."""
    return Strategy(lambda r: r.random() < 0.5)


def none() -> Strategy:
    """Return `None` always."""
    return Strategy(lambda _: None)


def sampled_from(values: Any) -> Strategy:
    """Draw one of some values."""
    return Strategy(lambda r: r.choice(list(values)))


def permutations(values: Any) -> Strategy:
    """Draw an order."""
    return Strategy(lambda r: r.sample(list(values), len(values)))


def tuples(*strategies: Strategy) -> Strategy:
    """Draw one from each."""
    return Strategy(lambda r: tuple(each.draw(r) for each in strategies))


def lists(each: Strategy, *, min_size: int = 0, max_size: int = 8, unique: bool = False) -> Strategy:
    """Draw a list."""

    def draw(r: random.Random) -> list[Any]:
        found: list[Any] = []
        wanted = r.randint(min_size, max_size)
        for _ in range(TRIES):
            if len(found) == wanted:
                return found
            value = each.draw(r)
            if not unique or value not in found:
                found.append(value)
        raise UnsatisfiedError

    return Strategy(draw)


def sets(each: Strategy, *, min_size: int = 0, max_size: int = 8) -> Strategy:
    """Draw a set."""
    return lists(each, min_size=min_size, max_size=max_size, unique=True).map(set)


def example(**values: Any) -> Callable[[Any], Any]:
    """Add an example to a test."""

    def mark(test: Any) -> Any:
        vars(test).setdefault("examples", []).append(values)
        return test

    return mark


def given(*last: Strategy, **strategies: Strategy) -> Callable[[Any], Any]:
    """Run a test on its examples, and on a few drawn ones, which are the same in every run."""

    def wrap(test: Any) -> Any:
        strategies.update(zip(list(inspect.signature(test).parameters)[::-1], last[::-1], strict=False))

        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            for values in reversed(vars(run).get("examples", [])):
                test(*args, **kwargs, **values)
            r = random.Random(zlib.crc32(test.__qualname__.encode()))  # noqa: S311 - no secret
            for _ in range(DRAWN):
                try:
                    test(*args, **kwargs, **{name: each.draw(r) for name, each in strategies.items()})
                except UnsatisfiedError:
                    continue

        wanted = inspect.signature(test)
        kept = [each for name, each in wanted.parameters.items() if name not in strategies]
        run.__signature__ = wanted.replace(parameters=kept)  # pyright: ignore[reportAttributeAccessIssue]
        del run.__wrapped__  # pytest would ask it for its arguments
        return run

    return wrap


class Settings:
    """Accept Hypothesis's settings, and change nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, test: Any) -> Any:
        """Return the test."""
        return test

    @staticmethod
    def register_profile(*_: Any, **__: Any) -> None:
        """Do nothing."""

    get_profile = load_profile = register_profile


def assume(condition: object) -> bool:
    """Leave a drawn example that does not meet a condition."""
    if not condition:
        raise UnsatisfiedError
    return True


def _module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)  # the compiler looks for it
    vars(made).update(contents)
    sys.modules[name] = made
    return made


def nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


STRATEGIES = (integers, floats, booleans, none, sampled_from, permutations, tuples, lists, sets)


def put_in_place() -> None:
    """Put the modules in the place of Hypothesis and beartype, installed or not: so that times are the same."""
    drawn = _module("hypothesis.strategies", **{each.__name__: each for each in STRATEGIES})
    _module(
        "hypothesis",
        given=given,
        example=example,
        assume=assume,
        settings=Settings,
        register_random=nothing,
        strategies=drawn,
    )
    warning = type("BeartypeDecorHintPep613DeprecationWarning", (DeprecationWarning,), {})
    roar = _module("beartype.roar", BeartypeDecorHintPep613DeprecationWarning=warning)
    claw = _module("beartype.claw", beartype_package=nothing)
    _module("beartype", BeartypeConf=nothing, claw=claw, roar=roar)
