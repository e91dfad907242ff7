"""Normalise by the statistics of the effective batch, with their gradient, and update running statistics once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from microbatch.errors import BatchStatisticsError
from microbatch.loss.batchnorm_nodes import LayerCall, MeasureMoments, Normalize
from microbatch.loss.caller import caller
from microbatch.loss.channel_stats import BatchStats, Moments, RunningStats, merged
from microbatch.loss.one_row_norm import NORMS, normalize_contiguous, one_value_error
from microbatch.loss.rank_stats import Across
from microbatch.loss.round_robin import Call, Rule, Seat, SyncPoint

_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ARGUMENTS_OF_TORCH = (
    *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"),
)


def layers_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """Find, by name, the batch normalisation layers that currently normalise by the statistics of their input."""
    return {
        name or "the model itself": module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    }


class ExactBatchNorm:
    """Replace every batch normalisation of a model, so that it normalises over all microbatches of the effective batch.

    Each microbatch contributes its count ``n``, its mean, and its sum of squares around the mean, ``M2``. Chan's
    formula merges them:

        mean = sum_i n_i mean_i / n,    M2 = sum_i M2_i + sum_i n_i (mean_i - mean)^2.

    The formula runs in ordinary autograd operators. Each microbatch is then normalised by the merged mean and variance,
    which are inputs of the normalisation, as the weight is. So the gradient of a microbatch's input contains the part
    that flows through the statistics of all microbatches.

    Running statistics are updated once for each sync point, with the unbiased variance ``M2 / (n - 1)``, and
    ``num_batches_tracked`` grows by one.

    Args:
        model: The model.
        across: Shares statistics with the other ranks, whose microbatches belong to the batch; `None` for a single
            rank.

    Source:
        Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979. Law
        C4.
    """

    def __init__(self, model: nn.Module, across: Across | None) -> None:
        self._across = across
        self._names = {
            id(each): name
            for name, layer in layers_of(model).items()
            for each in (layer.running_mean, layer.weight)
            if each is not None
        }
        # Layers are found by their buffer and not by their class, because scripted layers have another class.
        self._counters: dict[int, _Counter] = {}
        for name, module in model.named_modules():
            count, running = (getattr(module, each, None) for each in ("num_batches_tracked", "running_mean"))
            if isinstance(count, Tensor):
                self._counters.setdefault(id(count), _Counter(name, count, id(running), count._version))
        self._syncs: dict[int, int] = {}

    def rules(self) -> dict[Any, Rule]:
        """Return the rules that replace batch normalisation and its count of batches in a lockstep."""
        others = dict.fromkeys(NORMS, self._contiguous)
        return {**others, F.batch_norm: self._batch_norm, torch.batch_norm: self._batch_norm, Tensor.add_: self._add}

    def check(self) -> None:
        """Compare each layer's number of runs with the number of sync points at which the layer was seen."""
        for counter in self._counters.values():
            runs, synced = counter.tensor._version - counter.version, self._syncs.get(counter.running, 0)
            if runs != synced:
                raise BatchStatisticsError(
                    f"the batch normalisation {counter.name!r} ran {runs} times, {synced} of them where its statistics "
                    "could be computed over the whole batch. The layer is scripted, or compiled, or a checkpoint runs "
                    "it again in backward. Leave this layer out of scripting, compilation and checkpoints"
                )

    def look_away(self) -> None:
        """Ignore all runs of layers so far, such as those of a loss that runs layers on the whole batch."""
        for counter in self._counters.values():
            counter.version = counter.tensor._version - self._syncs.get(counter.running, 0)

    def _add(self, seat: Seat, call: Call) -> Any:
        """Increment a layer's ``num_batches_tracked`` once per sync point: only for the first microbatch."""
        key = id(call.args[0])
        counter = self._counters.get(key)
        if counter is None:
            return call.run()
        seat.calls[key] = own_count = seat.calls.get(key, 0) + 1
        if own_count <= counter.counted:
            return call.args[0]
        counter.counted = own_count
        return call.run()

    @staticmethod
    def _contiguous(seat: Seat, call: Call) -> Any:
        """Normalise by statistics of each row, or by running statistics."""
        out = normalize_contiguous(call.func, call.args, dict(call.kwargs))
        seat.waiting.track(out)
        return out

    def _batch_norm(self, seat: Seat, call: Call) -> Any:
        arguments = arguments_of(call)
        if not arguments.pop("training", False):
            return self._contiguous(seat, call)
        arguments.pop("cudnn_enabled", None)
        return self._normalize(seat, **arguments)

    def _normalize(
        self,
        seat: Seat,
        *,
        input: Tensor,  # noqa: A002 - torch's own name for it
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
        place = self._place(running_mean, weight)
        running = None if running_mean is None else RunningStats(running_mean, running_var, momentum)
        sync_point = SyncPoint(
            "batch_norm", place, partial(self._merge, running=running, place=place, shape=input.shape)
        )
        layer_call = LayerCall(input, seat.puts)
        mean, squares = cast("tuple[Tensor, Tensor]", MeasureMoments.apply(input, layer_call))
        moments = (input.numel() / max(1, input.shape[1]), mean, squares)
        graph = [each for each in (mean, squares) if each.requires_grad]
        mean, variance, batch_stats = seat.sync(sync_point, moments, graph=graph)
        kernel_stats = batch_stats.to(layer_call.dtype, eps)
        out = cast("Tensor", Normalize.apply(input.detach(), mean, variance, kernel_stats, weight, bias, layer_call))
        seat.waiting.track(out)
        return out

    def _merge(
        self, parts: Sequence[Moments], *, running: RunningStats | None, place: str, shape: torch.Size
    ) -> tuple[Tensor, Tensor, BatchStats]:
        moments = merged(parts)
        if self._across is not None:
            moments = self._across.merge(moments, f"batch_norm at {place}")
        count, mean, squares = moments
        if count <= 1:
            raise one_value_error(place, shape)
        variance = squares / count
        if running is not None:
            key = id(running.mean)
            self._syncs[key] = self._syncs.get(key, 0) + 1
            running.update(mean.detach(), squares.detach() / (count - 1))
        return mean, variance, BatchStats(mean, variance)

    def _place(self, *tensors: Tensor | None) -> str:
        found = (self._names.get(id(each)) for each in tensors if each is not None)
        name = next((each for each in found if each is not None), None)
        return caller() if name is None else repr(name)


def arguments_of(call: Call) -> dict[str, Any]:
    """Return by name the arguments of a call of `batch_norm`, of which torch has two with other orders."""
    names = _ARGUMENTS if call.func is F.batch_norm else _ARGUMENTS_OF_TORCH
    return dict(zip(names, call.args, strict=False)) | dict(call.kwargs)


@dataclass(slots=True)
class _Counter:
    """The ``num_batches_tracked`` buffer of one layer, its version at the start, and the number of batches counted."""

    name: str
    tensor: Tensor
    running: int
    version: int
    counted: int = 0


class OneOfMany(nn.SyncBatchNorm):
    """Replace `SyncBatchNorm` in a model's replica by a plain layer, since the lockstep synchronises over ranks."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name for it
        """Normalise as an ordinary batch normalisation layer does, without communication."""
        return _BatchNorm.forward(self, input)
