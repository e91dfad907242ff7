"""Values for the names that the rules' loops use, a run of such a loop, and the full batch's run to compare with.

The names are listed in ``microbatch.linting.rules``. The comparison is plain PyTorch: one backward of the mean loss of
all rows of a window, then the optimizer.
"""

import itertools
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import register_optimizer_step_pre_hook

N, ROWS, FEATURES, EPOCHS, SCALE = 4, 4, 6, 10, 2.0**16
MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}
Data = list[tuple[Tensor, Tensor]]


def regression(microbatches: int, rows: int = ROWS) -> Data:
    """Rows of a small function with noise, in microbatches; the first ones are the same, however many there are."""
    made = torch.Generator().manual_seed(1)
    data: Data = []
    for _ in range(microbatches):
        x, noise = torch.randn(rows, FEATURES, generator=made), torch.randn(rows, 1, generator=made)
        data.append((x, x[:, :2].sum(dim=-1, keepdim=True).sin() + 0.5 * noise))
    return data


def network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, outputs))


def flat(parameters: Any) -> Tensor:
    return torch.cat([each.detach().flatten() for each in parameters])


@dataclass
class Run:
    """Gradients handed to the optimizer, the weights before each step and at the end, and what was printed."""

    gradients: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    printed: list[float] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def recorded(self) -> Generator[None]:
        """Record every step of every optimizer."""

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            held = [each for group in optimizer.param_groups for each in group["params"]]
            self.weights.append(flat(held))
            self.gradients.append(flat(torch.zeros_like(p) if p.grad is None else p.grad for p in held))

        handle = register_optimizer_step_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()


def run(source: str, loader: Data, *, optimizer: str = "SGD", **names: Any) -> Run:
    """Run a loop of a rule, with the values that its names stand for; a function of `optimizer` makes the scheduler."""
    done = Run()
    model, extra = names.pop("model", None) or network(), names.pop("parameters", ())
    made = MAKERS[optimizer]([*model.parameters(), *extra])
    scheduler = names.pop("scheduler", None)
    done.names = {
        "N": N,
        "steps": EPOCHS * (len(loader) // N),
        "epochs": EPOCHS,
        "loader": loader,
        "batches": itertools.cycle(loader),
        "model": model,
        "criterion": nn.functional.mse_loss,
        "optimizer": made,
        "scheduler": scheduler and scheduler(made),
        "scaler": torch.amp.GradScaler("cpu", init_scale=SCALE),
        "print": lambda *words: done.printed.append(float(words[-1])),
        **names,
    }
    torch.manual_seed(0)  # for a loop that makes its own model
    with done.recorded(), patch.dict(sys.modules, accelerate=ACCELERATE):
        exec(compile(source, "loop", "exec"), done.names)  # noqa: S102 - the loops are the rules' own
    done.weights.append(flat([*done.names["model"].parameters(), *extra]))
    return done


def windows(loader: Data, size: int = N) -> Data:
    """The full batches of one epoch; the last has what is left."""
    starts = range(0, len(loader), size)
    return [(torch.cat(x), torch.cat(y)) for x, y in (zip(*loader[i : i + size], strict=True) for i in starts)]


def full(
    batches: Data,
    *,
    optimizer: str = "SGD",
    model: nn.Module | None = None,
    loss: Callable[[nn.Module, Any, Any], Tensor] = lambda model, x, y: nn.functional.mse_loss(model(x), y),
    clip: float | None = None,
    after: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, optimizer: None,
    parameters: tuple[Tensor, ...] = (),
) -> Run:
    """Take one step for each full batch."""
    done, model = Run(), model or network()
    held = [*model.parameters(), *parameters]
    made = MAKERS[optimizer](held)
    with done.recorded():
        for x, y in batches:
            made.zero_grad()
            value = loss(model, x, y)
            value.backward()
            done.printed.append(value.item())
            if clip is not None:
                clip_grad_norm_(held, clip)
            made.step()
            after(model, made)
    done.weights.append(flat(held))
    done.names = {"model": model, "optimizer": made}
    return done


def apart(loop: Run, right: Run) -> float:
    """How far the weights end from those of the full batch, in parts of the distance that these travelled."""
    travelled = (right.weights[-1] - right.weights[0]).norm()
    return ((loop.weights[-1] - right.weights[-1]).norm() / travelled).item()


def factor(loop: Run, right: Run, step: int = 0) -> float:
    """The norm of one step's gradient, in parts of the full batch's."""
    return (loop.gradients[step].norm() / right.gradients[step].norm()).item()


def share(value: float) -> str:
    """A share as the rules write it: two digits, in per cent where that can be read."""
    if value < 5e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"


# -- a stand-in for Accelerate, which is installed for the tests of the integrations only -----------------------------


class Prepared:
    """An optimizer or a scheduler that does nothing before the last microbatch of a window."""

    def __init__(self, accelerator: "Accelerator", of: Any) -> None:
        self.accelerator, self.of = accelerator, of

    def step(self) -> None:
        if self.accelerator.last:
            self.of.step()

    def zero_grad(self) -> None:
        if self.accelerator.last:
            self.of.zero_grad()


class Accelerator:
    """What Accelerate does in one process: `accumulate` counts microbatches, `backward` divides the loss."""

    def __init__(self, *, gradient_accumulation_steps: int) -> None:
        self.microbatches, self.seen, self.last = gradient_accumulation_steps, 0, True

    def prepare(self, *things: Any) -> tuple[Any, ...]:
        wrapped = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
        return tuple(Prepared(self, each) if isinstance(each, wrapped) else each for each in things)

    @property
    def sync_gradients(self) -> bool:
        return self.last

    @contextmanager
    def accumulate(self, _: nn.Module) -> Generator[None]:
        self.seen += 1
        self.last = self.seen % self.microbatches == 0
        yield

    def backward(self, loss: Tensor) -> None:
        (loss / self.microbatches).backward()


ACCELERATE = ModuleType("accelerate")
ACCELERATE.__dict__["Accelerator"] = Accelerator
