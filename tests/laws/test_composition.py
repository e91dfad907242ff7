"""The composed window: every hook of every part is reached in every composition that allows it, in one order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.hooks import Reached
from torch import Tensor, nn
from torch.optim import SGD

import microbatch as mb
from microbatch.errors import ConfigError
from microbatch.step.combinations import ENCODE
from microbatch.step.part import OpenWindow, Part, Pass, Passes, Peers, Run
from microbatch.step.setup import Setup

# What a user may ask for in a single process, one value each; all pairs that go together are composed.
CHOICES: Mapping[str, Mapping[str, Any]] = {
    "autocast": {"autocast": torch.bfloat16},
    "checkpoint": {"checkpoint": ["0"]},
    "compensated": {"sums": mb.Sums(how="compensated", dtype=torch.bfloat16)},
    "bufferless": {"sums": mb.Sums(buffer="none")},
    "unfused": {"sums": mb.Sums(fuse=False)},
    "exact": {"batch_norm": "exact"},
    "pooled": {"batch_norm": "pooled"},
    "frozen": {"batch_norm": "frozen"},
    "deterministic": {"ranks": mb.Ranks(deterministic=True), "batch_norm": "frozen"},
    "dropout": {"dropout": "by_row"},
    "offload": {"offload": "activations"},
    "lengths": {"lengths": mb.Lengths(of="lengths", keys=["x"])},
    "keep": {"coupled": "keep"},
    "spill": {"coupled": "spill"},
    "auto": {"microbatch_size": "auto"},
    "budget": {"memory_budget": "1 GiB"},
    "clip": {"max_grad_norm": 1.0},
    "noise": {"noise_scale": mb.NoiseScale(every=1)},
}


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(8, 3, generator=draw),
        "y": torch.randn(8, 2, generator=draw),
        "lengths": torch.full((8,), 3),
    }


def squares(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(microbatch["x"]), microbatch["y"])


def encode(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
    return model(microbatch["x"]).float()


def spread(model: nn.Module, z: Tensor) -> Tensor:
    return z.var(0).sum()


def fails(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
    raise ValueError("in the second microbatch")


def accumulator(**options: Any) -> mb.Accumulator:
    torch.manual_seed(0)
    model = Net()
    sums = options.get("sums")
    momentum = 0.9 if sums is not None and sums.buffer == "none" else 0.0
    dtype = torch.bfloat16 if sums is not None and sums.how != "plain" else torch.float32
    model = model.to(dtype)
    given: dict[str, Any] = {"microbatch_size": 3, **options}
    return mb.Accumulator(model, SGD(model.parameters(), lr=0.1, momentum=momentum), **given)


def of(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in batch().items()}


@pytest.mark.filterwarnings("ignore:batch normalisation")
@pytest.mark.parametrize(
    "names", [*itertools.combinations(CHOICES, 1), *itertools.combinations(CHOICES, 2)], ids="+".join
)
def test_every_hook_of_every_part_is_reached(names: tuple[str, ...]) -> None:
    options: dict[str, Any] = {}
    for name in names:
        for key, value in CHOICES[name].items():
            if key in options and options[key] != value:
                pytest.skip("two values of one option")
            options[key] = value
    try:
        it = accumulator(**options)
    except ConfigError as refused:
        pytest.skip(f"refused: {refused}")
    reached, rows = Reached(it), of(next(it.options.model.parameters()).dtype)
    for _ in range(2):
        it.step(rows, squares)
    with pytest.raises(ValueError, match="second microbatch"):
        it.step(rows, fails)
    try:
        it.step(rows, spread, encode=encode)
    except ConfigError as refused:
        assert ENCODE in str(refused)  # noqa: PT017 - a combination that the table refuses
    # Only a loss of the whole batch has it; and in lockstep no microbatch has a time of its own.
    alone = it.options.ranks.deterministic or it.options.noise_scale
    allowed = {"RowDropout.whole"} if alone else set[str]()
    allowed |= (
        {"Stopwatch.around", "OneRowNorms.around", "CarriedTensors.around"}
        if it.options.batch_norm == "exact"
        else set()
    )
    assert reached.missed <= allowed
    assert reached.watched


def test_a_part_that_replaces_the_backward_of_others_is_found_out() -> None:
    """The trap of the first composed window: what takes backward over must be the last part."""
    it = accumulator(autocast=torch.bfloat16, batch_norm="frozen")
    parts = it._it.parts
    it._it.fused._always = True  # nothing in this small model is fused, and the part would leave backward alone
    parts.insert(0, parts.pop())  # what is fused runs backward itself; now it hides the others'
    reached = Reached(it)
    it.step(batch(), squares)
    assert "Autocast.backward" in reached.missed


@pytest.mark.filterwarnings("ignore:batch normalisation")
def test_parts_that_watch_the_first_windows_then_leave_and_a_resumed_run_has_them_again() -> None:
    it = accumulator()
    young = {type(part) for part in it._it.parts if part.first_windows}
    assert young

    def present() -> set[type[Part]]:
        return young & {type(part) for part in it._it.setup().parts}

    assert present() == young
    for _ in range(4):
        it.step(batch(), squares)
    assert not present()
    it.load_state_dict(it.state_dict())
    assert present() == young


# -- one order -----------------------------------------------------------------------------------------------------


class Told(Part):
    """Writes down when it is reached."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        self.told.append(f"open {self.name}")
        stack.callback(self.told.append, f"close {self.name}")

    @contextmanager
    def around(self, window: OpenWindow, p: Pass) -> Any:
        self.told.append(f"enter {self.name}")
        yield
        self.told.append(f"leave {self.name}")

    def call(self, window: OpenWindow, function: Any) -> Any:
        def called(model: Any, microbatch: Any) -> Any:
            self.told.append(f"call {self.name}")
            return function(model, microbatch)

        return called

    def backward(self, window: OpenWindow, run: Run) -> Run:
        def told(tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
            self.told.append(f"backward {self.name}")
            run(tensors, seeds)

        return told


def with_parts(it: mb.Accumulator, *parts: Part) -> mb.Accumulator:
    it._it.parts[:0] = parts
    return it


def test_the_first_part_is_the_outermost_in_every_hook() -> None:
    told: list[str] = []
    it = with_parts(accumulator(batch_norm="frozen"), Told("a", told), Told("b", told))
    it.step({name: each[:3] for name, each in batch().items()}, squares)
    assert told == [
        *("open a", "open b"),
        *("enter a", "enter b", "call a", "call b", "backward a", "backward b", "leave b", "leave a"),
        *("close b", "close a"),
    ]


def test_contexts_are_left_before_the_step_and_after_an_error() -> None:
    told: list[str] = []
    it = with_parts(accumulator(batch_norm="frozen"), Told("a", told))
    with pytest.raises(ValueError, match="second"):
        it.step(batch(), fails)
    assert told == ["open a", "enter a", "call a", "close a"]  # a pass that failed is not left as if it had gone well


def test_a_pass_that_failed_is_closed_by_the_window() -> None:
    closed: list[bool] = []

    class Holds(Part):
        def around(self, window: OpenWindow, p: Pass) -> AbstractContextManager[object]:
            @contextmanager
            def held() -> Any:
                try:
                    yield
                finally:
                    closed.append(True)

            return held()

    it = with_parts(accumulator(batch_norm="frozen"), Holds())
    with pytest.raises(ValueError, match="second"):
        it.step(batch(), fails)
    assert closed == [True]


# -- the protocol --------------------------------------------------------------------------------------------------


def test_a_window_knows_no_part_by_name() -> None:
    from microbatch.step import window

    others = {"parts", "passes", "peers", "compose", "combinations", "size"}
    named = {
        value.__module__.split(".")[2]
        for value in vars(window).values()
        if "microbatch.step" in getattr(value, "__module__", "")
    }
    assert not named & others


def test_only_what_overrides_a_hook_is_called() -> None:
    it = accumulator(batch_norm="frozen")
    setup: Setup = it._it.setup()
    for hook in ("open", "cut", "around", "call", "backward", "check", "done"):
        plain = [getattr(kind, hook) for kind in (Part, Passes, Peers)]
        assert all(getattr(type(part), hook) not in plain for part in setup.having(hook))
