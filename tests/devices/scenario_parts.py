"""What the scenarios of the simulated device share: a model, a batch, the whole batch's gradient, and the program."""

import json
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from tests.devices.simulated_device import DEVICE, GIB, Small, install
from torch import Tensor, nn

import microbatch as mb

EXACT, WRONG = 1e-12, 1e-6
Scenario = Callable[[], None]


class Classifier(nn.Module):
    """Two layers, with dropout between them if asked for."""

    def __init__(self, dtype: torch.dtype, *, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = nn.Linear(8, width), nn.Linear(width, 3)
        self.drop = nn.Dropout(dropout)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.drop(torch.tanh(self.one(x))))


def entropy(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(rows["x"]), rows["y"])


def batch_of(rows: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 8, dtype=dtype, generator=generator)
    return {"x": x, "y": torch.randint(0, 3, (rows,), generator=generator)}


def on_device(dtype: torch.dtype = torch.float64, **shape: Any) -> Classifier:
    return Classifier(dtype, **shape).to(DEVICE)


def trained(model: nn.Module, size: float | str = 4, **options: Any) -> mb.Accumulator:
    return mb.Accumulator(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        microbatch_size=size if isinstance(size, str) else int(size),
        **options,
    )


def reference(rows: dict[str, Tensor], **shape: Any) -> list[Tensor]:
    """Return the whole batch's gradient, by plain PyTorch in float64 on the CPU."""
    model = Classifier(torch.float64, **shape)
    entropy(model, {"x": rows["x"].double(), "y": rows["y"]}).backward()
    return gradients(model)


def gradients(model: nn.Module) -> list[Tensor]:
    return [each.grad.detach().cpu().double().clone() for each in model.parameters() if each.grad is not None]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    off, size = (
        sum(float(each.square().sum()) for each in of)
        for of in ([one - other for one, other in zip(found, expected, strict=True)], expected)
    )
    return (off / size) ** 0.5


@contextmanager
def limited(extra: int) -> Generator[None]:
    """Leave this many bytes of the device's memory."""
    Small.limit = Small.live + extra
    try:
        yield
    finally:
        Small.limit = GIB


def peak_of(step: mb.Step) -> int:
    assert step.peak_bytes is not None
    return step.peak_bytes


def events(kind: str) -> list[tuple[Any, ...]]:
    return [each for each in Small.log if each[0] == kind]


def run(kind: type[Small], scenarios: Mapping[str, Any]) -> None:
    """Run the scenarios of a module and print how each ended."""
    install(kind)
    ended = dict[str, str]()
    for name, scenario in scenarios.items():
        if not getattr(scenario, "is_scenario", False) or (sys.argv[1:] and name not in sys.argv[1:]):
            continue
        Small.log.clear()
        torch.manual_seed(3)
        try:
            scenario()
        except BaseException:  # noqa: BLE001 - the test shows it
            ended[name] = traceback.format_exc()
        else:
            ended[name] = ""
    sys.stdout.write(f"ENDED {json.dumps(ended)}\n")
    sys.stdout.flush()


def scenario(function: Scenario) -> Scenario:
    """Mark a function as a scenario."""
    vars(function)["is_scenario"] = True
    return function
