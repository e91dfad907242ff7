"""What would make a step cheaper, and is the user's to change."""

from __future__ import annotations

import inspect

from torch.optim import Optimizer

from microbatch.step.settings import Settings

_FUSED_ON = {"cpu", "cuda", "mps", "xpu"}


def suggestions(settings: Settings) -> list[str]:
    """Find what a user could change.

    Args:
        settings: The accumulator's.

    Returns:
        Sentences.

    Source:
        ``benchmarks/results/decisions.md``.
    """
    found = [_about(optimizer, settings.device.type) for optimizer in settings.optimizers]
    return list(dict.fromkeys(each for each in found if each))


def _about(optimizer: Optimizer, device: str) -> str:
    name = type(optimizer).__name__
    known = inspect.signature(type(optimizer)).parameters
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    # Whoever asked for something has a reason: only what torch chose by itself is worth a word.
    if any(group.get("fused") is not None or group.get("foreach") is not None for group in groups):
        return ""
    if any(group.get("differentiable") or group.get("capturable") for group in groups):
        return ""
    if "fused" in known and device in _FUSED_ON and all(each.dtype.is_floating_point for each in parameters):
        return (
            f"{name}(..., fused=True) updates all weights in one pass, without temporaries of their size; "
            "this one does not"
        )
    if "foreach" in known and device == "cpu":
        return f"{name}(..., foreach=True) updates many weights in one call; on the CPU, torch does not by default"
    return ""
