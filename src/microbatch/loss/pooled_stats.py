"""Normalise each microbatch by its own statistics, and update running statistics once per window."""

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
from microbatch.loss.channel_stats import Moments, RunningStats, merged
from microbatch.loss.loss import wide_dtype
from microbatch.loss.round_robin import Call


@dataclass(slots=True)
class _LayerUse:
    """One use of a layer in a forward pass, with the moments that each microbatch has there."""

    running: RunningStats
    parts: list[Moments] = field(default_factory=list["Moments"])


@dataclass(slots=True)
class _TrackedLayer:
    """A layer with running statistics: the values of its buffers at the window's start, and its uses in each pass."""

    saved: list[tuple[Tensor, Tensor]]
    count: Tensor | None
    name: str
    start_version: int
    uses: list[_LayerUse] = field(default_factory=list[_LayerUse])
    next_use: int = 0
    counter_calls: int = 0


class Pooled(TorchFunctionMode):
    """Keep running statistics unchanged in a window, and update them at its end by the moments of all microbatches.

    Each microbatch is normalised by its own statistics. Without this mode, each microbatch would also update the
    running statistics, and later microbatches would weigh more. With it, the moments of the microbatches are merged. So
    the running statistics are those that one pass over the whole batch would leave. ``num_batches_tracked`` grows by
    one for each use of a layer in a forward pass.

    Args:
        model: The model.

    Attributes:
        done: Whether the mode ignores all further passes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.done = False
        self._layers: dict[int, _TrackedLayer] = {}
        self._counts: dict[int, _TrackedLayer] = {}
        for name, layer in layers_of(model).items():
            if layer.training and layer.running_mean is not None and layer.running_var is not None:
                tensors = [layer.running_mean, layer.running_var]
                count = layer.num_batches_tracked
                tensors += [] if count is None else [count]
                found = _TrackedLayer(
                    [(each, each.detach().clone()) for each in tensors], count, name, layer.running_mean._version
                )
                self._layers.setdefault(id(layer.running_mean), found)
                if count is not None:
                    self._counts.setdefault(id(count), found)

    def next(self) -> None:
        """Start the next microbatch."""
        for layer in self._layers.values():
            layer.next_use = layer.counter_calls = 0

    def check(self) -> None:
        """Refuse a window in which a layer updated its running statistics without being measured."""
        for layer in self._layers.values():
            if not layer.uses and layer.saved[0][0]._version != layer.start_version:
                raise BatchStatisticsError(
                    f"the batch normalisation {layer.name!r} updated its running statistics where they could not be "
                    "pooled: the layer is scripted or compiled. Leave this layer out of scripting and compilation"
                )

    @torch.no_grad()
    def finish(self) -> None:
        """Update the running statistics of all layers by the merged moments."""
        for layer in self._layers.values():
            # A checkpoint that ran the layer again in backward has updated the buffers too.
            for tensor, saved in layer.saved:
                tensor.copy_(saved)
            for use in layer.uses:
                count, mean, squares = merged(use.parts)
                use.running.update(mean, squares / (count - 1))
            if layer.count is not None:
                layer.count.add_(len(layer.uses))

    def __torch_function__(  # noqa: PLR0917 - torch calls it by position
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Measure the input of each batch normalisation; run every other call unchanged."""
        kwargs = kwargs or {}
        # In backward, only a checkpoint calls layers, and its first run has been measured.
        backward_node: Any = torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage]
        if torch.compiler.is_compiling() or self.done or backward_node is not None:
            return func(*args, **kwargs)
        if func is Tensor.add_ and (layer := self._counts.get(id(args[0]))) is not None:
            layer.counter_calls += 1
            # Only the first microbatch to get here increments the counter.
            return args[0] if layer.counter_calls <= len(layer.uses) else func(*args, **kwargs)
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        arguments = arguments_of(Call(func, args, kwargs))
        layer = self._layers.get(id(arguments.get("running_mean")))
        if layer is None or not arguments.get("training", False):
            return func(*args, **kwargs)
        return self._normalize_and_measure(layer, arguments)

    def _normalize_and_measure(self, layer: _TrackedLayer, arguments: dict[str, Any]) -> Tensor:
        """Normalise a layer's input, and store the moments of the input."""
        x: Tensor = arguments["input"]
        running_mean, running_var = arguments["running_mean"], arguments["running_var"]
        if layer.next_use == len(layer.uses):
            layer.uses.append(_LayerUse(RunningStats(running_mean, running_var, arguments.get("momentum", 0.1))))
        # With a momentum of 1, torch writes the measured statistics themselves to the buffers.
        mean, variance = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        measuring: dict[str, Any] = {**arguments, "running_mean": mean, "running_var": variance, "momentum": 1.0}
        out = F.batch_norm(**measuring)
        count, wide = x.numel() // x.shape[1], wide_dtype(x.device)
        layer.uses[layer.next_use].parts.append((count, mean.to(wide), variance.to(wide) * (count - 1)))
        layer.next_use += 1
        return out
