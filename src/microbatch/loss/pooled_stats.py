"""Normalise each microbatch by itself, and move running statistics once, by those of the whole window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from microbatch.errors import BatchStatisticsError
from microbatch.loss.batchnorm import arguments_of, layers_of
from microbatch.loss.channel_stats import Moments, Running, merged
from microbatch.loss.loss import wide_dtype
from microbatch.loss.round_robin import Call


@dataclass(slots=True)
class _Use:
    """One use of a layer in a forward pass: what each microbatch measured in it."""

    running: Running
    parts: list[Moments] = field(default_factory=list["Moments"])


@dataclass(slots=True)
class _Layer:
    """A layer that counts: what it had at the window's start, and its uses in each forward pass."""

    before: list[tuple[Tensor, Tensor]]
    count: Tensor | None
    name: str
    version: int
    uses: list[_Use] = field(default_factory=list[_Use])
    now: int = 0
    counted: int = 0


class Pooled(TorchFunctionMode):
    """Keep running statistics as they are in a window, and move them at its end by what all microbatches measured.

    Every microbatch is normalised by its own statistics, as ever. But one after the other they would move the running
    ones once each, and the more the later they come; here the parts' moments are merged, so that the running statistics
    are those that one pass over the whole batch would leave, where it normalised in parts. ``num_batches_tracked``
    counts one for each use in a forward pass.

    Args:
        model: The model.

    Attributes:
        done: Whether what comes is not to be measured.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.done = False
        self._layers: dict[int, _Layer] = {}
        self._counts: dict[int, _Layer] = {}
        for name, layer in layers_of(model).items():
            if layer.training and layer.running_mean is not None and layer.running_var is not None:
                tensors = [layer.running_mean, layer.running_var]
                count = layer.num_batches_tracked
                tensors += [] if count is None else [count]
                found = _Layer(
                    [(each, each.detach().clone()) for each in tensors], count, name, layer.running_mean._version
                )
                self._layers.setdefault(id(layer.running_mean), found)
                if count is not None:
                    self._counts.setdefault(id(count), found)

    def next(self) -> None:
        """Begin the next microbatch."""
        for layer in self._layers.values():
            layer.now = layer.counted = 0

    def check(self) -> None:
        """Hold what layers moved against what was measured.

        Raises:
            BatchStatisticsError: A layer normalised where it could not be seen.
        """
        for layer in self._layers.values():
            if not layer.uses and layer.before[0][0]._version != layer.version:
                raise BatchStatisticsError(
                    f"the batch normalisation {layer.name!r} moved its running statistics where they could not be "
                    "pooled: it is scripted, or compiled; leave it out of that"
                )

    @torch.no_grad()
    def finish(self) -> None:
        """Move the running statistics."""
        for layer in self._layers.values():
            # What ran again in backward, out of sight, has moved them too.
            for tensor, before in layer.before:
                tensor.copy_(before)
            for use in layer.uses:
                count, mean, squares = merged(use.parts)
                use.running.move(mean, squares / (count - 1))
            if layer.count is not None:
                layer.count.add_(len(layer.uses))

    def __torch_function__(  # noqa: PLR0917 - torch calls it by position
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Measure what is normalised."""
        kwargs = kwargs or {}
        again: Any = torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage] # a checkpoint in backward
        if torch.compiler.is_compiling() or self.done or again is not None:
            return func(*args, **kwargs)
        if func is Tensor.add_ and (layer := self._counts.get(id(args[0]))) is not None:
            layer.counted += 1
            # The first microbatch counts; the others find its count.
            return args[0] if layer.counted <= len(layer.uses) else func(*args, **kwargs)
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        given = arguments_of(Call(func, args, kwargs))
        layer = self._layers.get(id(given.get("running_mean")))
        if layer is None or not given.get("training", False):
            return func(*args, **kwargs)
        return self._measure(layer, given)

    def _measure(self, layer: _Layer, given: dict[str, Any]) -> Tensor:
        x: Tensor = given["input"]
        running_mean, running_var = given["running_mean"], given["running_var"]
        if layer.now == len(layer.uses):
            layer.uses.append(_Use(Running(running_mean, running_var, given.get("momentum", 0.1))))
        # With a momentum of 1, what torch leaves in a buffer is what it measured.
        mean, variance = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        mine: dict[str, Any] = {**given, "running_mean": mean, "running_var": variance, "momentum": 1.0}
        out = F.batch_norm(**mine)
        count, wide = x.numel() // x.shape[1], wide_dtype(x.device)
        layer.uses[layer.now].parts.append((count, mean.to(wide), variance.to(wide) * (count - 1)))
        layer.now += 1
        return out
