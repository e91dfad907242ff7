"""Hooks on weights: run once a window, on the finished gradient, as the backward of the whole batch runs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from microbatch.arguments import attribute
from microbatch.gradients.clipping import gradient_norm
from microbatch.shards import is_shard
from microbatch.step.met import Met
from microbatch.step.part import OpenWindow, Part

Hook = Callable[[Tensor], Tensor | None]
_HOOKS = attrgetter("parameter._backward_hooks")

# Whose hooks must run inside a backward, and do not change the gradient: this library's own, and those of
# `torch.autograd.graph.register_multi_grad_hook` and of torch's wrappers for several ranks.
_WITHIN = ("microbatch.", "torch.autograd.", "torch.distributed.")


class WeightHooks(Part):
    """Set hooks of `Tensor.register_hook` on weights aside for the microbatches, and run them on the whole gradient.

    The clamp of a sum is not the sum of the clamps. So a hook that clamps, normalises or adds is only right on the
    finished gradient: divided, unscaled, and added up over the ranks.

    Hooks of `Tensor.register_post_accumulate_grad_hook` stay, because they may step an optimizer.

    Source:
        Law S9.
    """

    def __init__(self) -> None:
        # The hooks of each weight that has some, by the weight's place; with the dict in which torch looks them up.
        self._aside: dict[int, tuple[dict[int, Any], Mapping[int, Hook]]] = {}

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Replace the hooks by others that do nothing, until the last backward has run."""
        self._aside = {}
        if not any(map(_HOOKS, window.gradients.named)):
            return
        for place, each in enumerate(window.gradients.named):
            found: Any = each.parameter._backward_hooks
            hooks = {key: hook for key, hook in (found or {}).items() if not comes_from(hook, *_WITHIN)}
            if not hooks:
                continue
            if not _has_whole_gradients(window):
                window.setup.warn(
                    "weight_hooks",
                    f"the weight {each.name!r} has a hook on its gradient, which runs in every microbatch, on a part "
                    "of the gradient. This is right for a hook that multiplies, and wrong for one that clamps or adds. "
                    "Write such a hook's work after accumulator.gradient(batch, loss_fn)",
                )
                return
            self._aside[place] = found, hooks
            # The dict stays: handles that remove hooks, and code that adds some, know this one.
            found.update(dict.fromkeys(hooks, _nothing))
            stack.callback(_put_back, found, hooks)

    def reduced(self, window: OpenWindow, met: Met, factor: float) -> None:
        """Finish the gradient of all ranks, run the hooks on it, and measure its norm again."""
        if self._aside:
            self._run(window, met, factor)

    @torch.no_grad()
    def _run(self, window: OpenWindow, met: Met, factor: float) -> None:
        gradients, met.normalized = window.gradients, True
        gradients.scale_(factor)
        places = {id(each.parameter): place for place, each in enumerate(gradients.named)}
        for each, total in gradients.gradients():
            place = places[id(each.parameter)]
            if place not in self._aside:
                continue
            found, hooks = self._aside[place]
            finished = total.to(each.parameter.dtype)
            for hook in [hook for key, hook in hooks.items() if key in found]:  # the others have been removed
                changed = hook(finished)
                finished = finished if changed is None else changed
            gradients.put(place, finished.to(total.dtype))
        met.norm = gradient_norm(gradients.held_sums(), window.device)
        met.host_norm = met.norm.item()


class PostHooks(Part):
    """Warn about hooks of `Tensor.register_post_accumulate_grad_hook` that change the sum of the gradients.

    Source:
        Law S9.
    """

    first_windows = 2

    def __init__(self) -> None:
        self._changes = Counter[str]()

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Watch the hooks until the last backward has run."""
        self._changes.clear()
        for each in window.gradients.named:
            found: Any = each.parameter._post_accumulate_grad_hooks  # pyright: ignore[reportPrivateUsage]
            hooks = {key: hook for key, hook in (found or {}).items() if not comes_from(hook, *_WITHIN)}
            if hooks:
                found.update({key: partial(self._watched, each.name, hook) for key, hook in hooks.items()})
                stack.callback(_put_back, found, hooks)

    def _watched(self, name: str, hook: Callable[[Tensor], None], parameter: Tensor) -> None:
        before = parameter.grad
        copy = before.detach().clone() if before is not None and before.layout is torch.strided else None
        hook(parameter)
        after = parameter.grad
        if copy is not None and after is not None and not (after.dtype == copy.dtype and torch.equal(after, copy)):
            self._changes[name] += 1

    def check(self, window: OpenWindow) -> None:
        """Warn if hooks have changed the sum of the gradients more than once."""
        name = next((name for name, changes in self._changes.items() if changes > 1), None)
        if name is not None:
            window.setup.warn(
                "post_hooks",
                f"a hook of register_post_accumulate_grad_hook changes the gradient of {name!r} after every "
                "microbatch, and so changes a part of the sum. The large batch would run it once, on the whole "
                "gradient. Do its work after accumulator.gradient(batch, loss_fn), or use register_hook, whose hooks "
                "run once a window",
            )


def _has_whole_gradients(window: OpenWindow) -> bool:
    """Return whether this rank holds finished gradients whole, and knows their norm alone."""
    options, named = window.options, window.gradients.named
    return not (window.gradients.is_folded or options.pipeline or any(is_shard(each.parameter) for each in named))


def comes_from(hook: Any, *packages: str) -> bool:
    """Return whether a hook was written in one of some packages."""
    while attribute(hook, "func") is not None:  # of functools.partial
        hook = hook.func
    return str(attribute(hook, "__module__", "")).startswith(packages)


def _nothing(gradient: Tensor) -> None:
    del gradient


def _put_back(found: dict[int, Any], hooks: Mapping[int, Hook]) -> None:
    found.update({key: hook for key, hook in hooks.items() if key in found})
