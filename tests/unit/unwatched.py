"""Evaluate expressions in a process whose types nobody checks, as users run the library; a script, not a test.

Reads a JSON list of expressions, and writes a JSON list of what each one raised: [names of the error and its bases,
message], or null.
"""

import json
import random
import sys
from typing import Any, cast

import numpy as np
import torch
from torch import nn

import microbatch as mb


class World:
    """What the expressions may use."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Linear(2, 1)
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.x = torch.randn(6, 2)

    def accumulator(self, *, model: Any = None, optimizer: Any = None, **settings: Any) -> mb.Accumulator:
        settings.setdefault("microbatch_size", 2)
        return mb.Accumulator(model or self.model, optimizer or self.sgd, **settings)

    def job(self) -> mb.Job:
        return mb.Job(
            model=self.model,
            optimizer=self.sgd,
            loss_fn=lambda model, x: model(x).square().mean(),
            data=list(self.x),
            batch_size=2,
        )

    def whole_numbers_of_any_library_find_the_rate_of_those_of_python(self) -> None:
        find, losses = cast("Any", mb.find_learning_rate), list[Any]()
        for as_int, seeds in ((int, [1, 2]), (np.int32, np.array([1, 2]))):
            torch.manual_seed(1)
            given = {"batch_size": as_int(4), "microbatch_size": as_int(2), "steps": as_int(20), "seeds": seeds}
            losses.append(find(self.job(), **given).curve.losses)
        assert losses[0] == losses[1]
        assert len(find(self.job(), steps=20, seeds=np.int64(1)).curve.losses) == 1

    def step(self, make: Any, **settings: Any) -> mb.Step:
        return self.accumulator().step(self.x, lambda model, x: make(model(x)), **settings)

    def backward(self, loss: Any, **settings: Any) -> None:
        with self.accumulator().window() as window:
            window.backward(loss, **settings)

    def random_is_put_back(self, error: type[BaseException]) -> None:
        before = random.getstate()

        def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            drawn = random.random()  # noqa: S311 - the generator that is to be put back
            if drawn < 2 and torch.equal(x, self.x[4:]):
                raise error
            return model(x).mean()

        try:
            self.accumulator().step(self.x, loss_fn)
        except error:
            if random.getstate() == before:
                raise


def outcome(expression: str) -> tuple[list[str], str] | None:
    world = World()
    names = {"torch": torch, "nn": nn, "np": np, "mb": mb, "w": world}
    try:
        eval(expression, names)  # noqa: S307 - the tests' own expressions
    except BaseException as error:  # noqa: BLE001 - the interrupt among them
        return [each.__name__ for each in type(error).__mro__], str(error)
    return None


if __name__ == "__main__":
    json.dump([outcome(expression) for expression in json.load(sys.stdin)], sys.stdout)
