"""Accelerate: one accumulator for a prepared model and optimizer, in the place of ``accelerator.accumulate()``."""

from __future__ import annotations

from typing import Any

from torch import nn

from microbatch.errors import ConfigError
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import Event, StepDone
from microbatch.step.options import listeners_of

_REFUSED = {
    "DEEPSPEED": "DeepSpeed runs backward and steps inside its engine: use mb.DeepSpeed with the engine, or leave the "
    "DeepSpeed plugin out",
    "MEGATRON_LM": "Megatron-LM runs its own schedule of microbatches: prepare the model without the Megatron plugin",
    "XLA": "XLA defers what a window has to see: use a CPU or CUDA process group",
}


def accumulator_for(accelerator: Any, model: nn.Module, optimizer: Any, **options: Any) -> Accumulator:
    """Create the accumulator of a prepared model and its prepared optimizer.

    Then ``accumulator.step(batch, loss_fn)`` takes the place of ``with accelerator.accumulate(model)``, backward,
    clipping, ``optimizer.step()`` and ``optimizer.zero_grad()``. The window uses the accelerator's loss scaling,
    ``accelerator.save_state`` saves the accumulator too, and a prepared scheduler skips steps that were not applied.

    Args:
        accelerator: The ``accelerate.Accelerator``.
        model: What ``accelerator.prepare`` returned for the model.
        optimizer: What it returned for the optimizer, or several of them.
        options: Options of `Accumulator`, such as ``microbatch_size=16`` and ``max_grad_norm=1.0``.

    Returns:
        The accumulator.

    Raises:
        ConfigError: The accelerator accumulates itself, or uses what a window cannot run under.
    """
    kind = accelerator.distributed_type.name
    if kind in _REFUSED:
        raise ConfigError(f"Accelerate runs {kind}: {_REFUSED[kind]}")
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"Accelerator(gradient_accumulation_steps={accelerator.gradient_accumulation_steps}) accumulates itself: "
            "leave it at 1. Give accumulator.step the whole batch, or use accumulator.windows(loader, microbatches=...)"
        )
    if accelerator.mixed_precision == "fp8":
        raise ConfigError('mixed_precision="fp8" moves its scales with every microbatch: use "bf16"')
    for each in model.modules():
        if "FullyShardedDataParallel" in [base.__name__ for base in type(each).__mro__]:
            raise ConfigError(
                "the model is wrapped in FullyShardedDataParallel, which reduces in every backward: use "
                "FullyShardedDataParallelPlugin(fsdp_version=2), which uses fully_shard"
            )
    optimizers: list[Any] = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]

    def hear(event: Event) -> None:
        if isinstance(event, StepDone):
            for each in optimizers:
                if hasattr(each, "step_was_skipped"):
                    each._is_overflow = not event.step.applied  # read by a prepared scheduler

    given: dict[str, Any] = dict(options)
    given["listeners"] = [*listeners_of(options.get("listeners", ())), hear]
    if "grad_scaler" not in options:
        given["grad_scaler"] = accelerator.scaler
    accumulator = Accumulator(model, optimizers, **given)
    accelerator.register_for_checkpointing(accumulator)
    return accumulator
