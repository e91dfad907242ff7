"""Loops as people write them, right and wrong, each with the mistakes that were put into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import microbatch as mb

from .programs import SIZE, batch, masked, network, squared

CONFIGURED = 4
"""Microbatches that a loop was configured for."""
Loop = Callable[[Any, Any, Any], None]


@dataclass(frozen=True)
class Written:
    """A loop, what it should minimise, and its mistakes."""

    loop: Loop
    planted: frozenset[str]
    loss_fn: Callable[..., Any] = squared
    model: Callable[[], nn.Module] = network


def rows_of(microbatch: dict[str, Tensor]) -> int:
    return len(microbatch["x"])


def share(microbatch: dict[str, Tensor], whole: dict[str, Tensor]) -> float:
    return rows_of(microbatch) / rows_of(whole)


# -- right --------------------------------------------------------------------------------------------------------


def right(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    for microbatch in mb.cut(batch, SIZE):
        (squared(model, microbatch) * share(microbatch, batch)).backward()
    optimizer.step()


def divided_at_the_end(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        (squared(model, microbatch) * rows_of(microbatch)).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= rows_of(batch)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def clipped_once(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        (squared(model, microbatch) * share(microbatch, batch)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    optimizer.zero_grad()


def tokens(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    count, total = batch["mask"].sum(), torch.zeros(())
    for microbatch in mb.cut(batch, SIZE):
        loss = (model(microbatch["x"]).square() * microbatch["mask"]).sum() / count
        loss.backward()
        total += loss.detach()
    total.item()
    optimizer.step()
    optimizer.zero_grad()


def scaled(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    """With a loss scaler, as for float16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for microbatch in mb.cut(batch, SIZE):
        scaler.scale(squared(model, microbatch) * share(microbatch, batch)).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def scheduling(scheduler: LRScheduler, *, every_microbatch: bool) -> Loop:
    def loop(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
        for microbatch in mb.cut(batch, SIZE):
            (squared(model, microbatch) * share(microbatch, batch)).backward()
            if every_microbatch:
                scheduler.step()
        optimizer.step()
        if not every_microbatch:
            scheduler.step()
        optimizer.zero_grad()

    return loop


# -- wrong --------------------------------------------------------------------------------------------------------


def undivided(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        squared(model, microbatch).backward()
    optimizer.step()
    optimizer.zero_grad()


def undivided_tokens(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        masked(model, microbatch).backward()
    optimizer.step()
    optimizer.zero_grad()


def mean_of_means(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        (masked(model, microbatch) * share(microbatch, batch)).backward()
    optimizer.step()
    optimizer.zero_grad()


def twice(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    """Divides by half of what it should, and reads its loss."""
    for microbatch in mb.cut(batch, SIZE):
        loss = squared(model, microbatch) * share(microbatch, batch) * 2
        loss.backward()
        loss.item()
    optimizer.step()
    optimizer.zero_grad()


def zeroed(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        optimizer.zero_grad()
        (squared(model, microbatch) * share(microbatch, batch)).backward()
    optimizer.step()


def zeroed_and_undivided(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        optimizer.zero_grad()
        squared(model, microbatch).backward()
    optimizer.step()


def clipped(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        (squared(model, microbatch) * share(microbatch, batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    optimizer.step()
    optimizer.zero_grad()


def configured(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    """Divides by the configured number: right for every window but an epoch's last."""
    for microbatch in mb.cut(batch, SIZE):
        (squared(model, microbatch) / CONFIGURED).backward()
    optimizer.step()
    optimizer.zero_grad()


def counted_microbatches(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    """Divides by what is there, and gives a short last microbatch the weight of a whole one."""
    microbatches = mb.cut(batch, SIZE)
    for microbatch in microbatches:
        (squared(model, microbatch) / len(microbatches)).backward()
    optimizer.step()
    optimizer.zero_grad()


def only_whole_windows(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for place, microbatch in enumerate(mb.cut(batch, SIZE)):
        (squared(model, microbatch) / CONFIGURED).backward()
        if (place + 1) % CONFIGURED == 0:
            optimizer.step()
            optimizer.zero_grad()


def only_whole_microbatches(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    microbatches = [each for each in mb.cut(batch, SIZE) if rows_of(each) == SIZE]
    for microbatch in microbatches:
        (squared(model, microbatch) / len(microbatches)).backward()
    optimizer.step()
    optimizer.zero_grad()


def stepping(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        (squared(model, microbatch) * share(microbatch, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()


def never_zeroed(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        (squared(model, microbatch) * share(microbatch, batch)).backward()
    optimizer.step()


def total_kept(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    total: Any = 0.0
    for microbatch in mb.cut(batch, SIZE):
        loss = squared(model, microbatch) * share(microbatch, batch)
        loss.backward()
        total = total + loss
    optimizer.step()
    optimizer.zero_grad()


def keeping(history: list[Tensor]) -> Loop:
    def loop(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
        for microbatch in mb.cut(batch, SIZE):
            loss = squared(model, microbatch) * share(microbatch, batch)
            loss.backward()
            history.append(loss)
        optimizer.step()
        optimizer.zero_grad()

    return loop


def reading(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    total = 0.0
    for microbatch in mb.cut(batch, SIZE):
        loss = squared(model, microbatch) * share(microbatch, batch)
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()


def clipped_and_configured(model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    for microbatch in mb.cut(batch, SIZE):
        (squared(model, microbatch) / CONFIGURED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    optimizer.step()
    optimizer.zero_grad()


def causes(*kinds: str) -> frozenset[str]:
    return frozenset(kinds)


def normed() -> nn.Module:
    return network(nn.BatchNorm1d(8))


LOOPS = {
    "right": Written(right, causes()),
    "right, divided at the end": Written(divided_at_the_end, causes()),
    "right, clipped once": Written(clipped_once, causes()),
    "right, by tokens": Written(tokens, causes(), masked),
    "right, with a loss scaler": Written(scaled, causes()),
    "not divided": Written(undivided, causes("not_divided")),
    "mean of means": Written(mean_of_means, causes("counts"), masked),
    "not divided, mean of means": Written(undivided_tokens, causes("not_divided", "counts"), masked),
    "twice, and read": Written(twice, causes("wrong_divisor", "host_reads")),
    "zeroed inside": Written(zeroed, causes("zeroed_inside")),
    "zeroed inside and not divided": Written(zeroed_and_undivided, causes("zeroed_inside", "not_divided")),
    "clipped inside": Written(clipped, causes("clipped_inside")),
    "divided by the configured number": Written(configured, causes("last_window")),
    "clipped inside, divided by the configured number": Written(
        clipped_and_configured, causes("clipped_inside", "last_window")
    ),
    "a short last microbatch": Written(counted_microbatches, causes("last_window")),
    "only whole windows": Written(only_whole_windows, causes("never_stepped")),
    "only whole microbatches": Written(only_whole_microbatches, causes("rows_left_out")),
    "stepped inside": Written(stepping, causes("stepped_inside")),
    "never zeroed": Written(never_zeroed, causes("gradients_left")),
    "the total keeps its graph": Written(total_kept, causes("graph_kept")),
    "a list keeps the graphs": Written(keeping([]), causes("graph_kept")),
    "read every microbatch": Written(reading, causes("host_reads")),
    "right, with batch statistics": Written(right, causes("batch_statistics"), squared, normed),
    "not divided, with batch statistics": Written(
        undivided, causes("batch_statistics", "not_divided"), squared, normed
    ),
}

__all__ = ["LOOPS", "Written", "batch", "scheduling"]
