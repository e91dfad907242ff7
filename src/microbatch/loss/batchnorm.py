"""Batch normalisation over the effective batch: statistics merged, gradient included, running statistics once."""

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
from microbatch.loss.batchnorm_nodes import Measure, Normalise, Visit
from microbatch.loss.caller import caller
from microbatch.loss.channel_stats import Moments, Narrowed, Running, merged
from microbatch.loss.rank_stats import Across
from microbatch.loss.round_robin import Call, Rule, Seat, Topic

_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_NAMES_OF_TORCH = (
    *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"),
)


def layers_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """Find the layers that normalise by the statistics of what they are given, as the model is now.

    Args:
        model: The model.

    Returns:
        Those in training mode, and those that track nothing, by name.
    """
    return {
        name or "the model itself": module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    }


class ExactBatchNorm:
    """Make every batch normalisation of a model normalise over all microbatches.

    Each microbatch brings the count ``n``, the mean and the sum of squares ``M2`` of its part, which are merged by
    Chan's formula,

        mean = sum_i n_i mean_i / n,    M2 = sum_i M2_i + sum_i n_i (mean_i - mean)^2,

    in ordinary operators of autograd; each part is then normalised by the merged mean and variance, which are inputs of
    the normalisation as the weight is. So the gradient that reaches a microbatch's input has the part that goes through
    the statistics of all.

    Running statistics are moved once for each meeting, by the variance with ``n - 1``, and ``num_batches_tracked``
    counts one.

    Args:
        model: The model.
        across: The other ranks, whose microbatches are part of the batch; `None` if there are none.

    Source:
        Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979. Law
        C4.
    """

    def __init__(self, model: nn.Module, across: Across | None) -> None:
        self._across = across
        self._names = {id(each): name for name, layer in layers_of(model).items() for each in _own_tensors(layer)}
        # By the buffer, and not by the class: scripted layers have one too.
        self._counters: dict[int, _Counter] = {}
        for name, module in model.named_modules():
            count, running = (getattr(module, each, None) for each in ("num_batches_tracked", "running_mean"))
            if isinstance(count, Tensor):
                self._counters.setdefault(id(count), _Counter(name, count, id(running), count._version))
        self._meetings: dict[int, int] = {}

    def rules(self) -> dict[Any, Rule]:
        """Return what to call in the place of which functions."""
        return {F.batch_norm: self._batch_norm, torch.batch_norm: self._batch_norm, Tensor.add_: self._add}

    def check(self) -> None:
        """Hold what layers counted against the meetings there were.

        Raises:
            BatchStatisticsError: A layer normalised where it could not be seen.
        """
        for counter in self._counters.values():
            moved, met = counter.tensor._version - counter.version, self._meetings.get(counter.running, 0)
            if moved != met:
                raise BatchStatisticsError(
                    f"the batch normalisation {counter.name!r} ran {moved} times, {met} of them where its statistics "
                    "could be taken over the whole batch: it is scripted, or compiled, or it runs again in backward "
                    "inside a checkpoint; leave it out of that"
                )

    def look_away(self) -> None:
        """Leave out what was counted since the last time: by a loss that runs layers on the whole batch."""
        for counter in self._counters.values():
            counter.version = counter.tensor._version - self._meetings.get(counter.running, 0)

    def _add(self, seat: Seat, call: Call) -> Any:
        """Count a batch once, by the first microbatch that comes to it."""
        key = id(call.args[0])
        counter = self._counters.get(key)
        if counter is None:
            return call.run()
        seat.calls[key] = mine = seat.calls.get(key, 0) + 1
        if mine <= counter.times:
            return call.args[0]
        counter.times = mine
        return call.run()

    def _batch_norm(self, seat: Seat, call: Call) -> Any:
        given = arguments_of(call)
        if not given.pop("training", False):
            return call.run()
        given.pop("cudnn_enabled", None)
        return self._normalise(seat, **given)

    def _normalise(
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
        running = None if running_mean is None else Running(running_mean, running_var, momentum)
        topic = Topic("batch_norm", place, partial(self._merge, running=running, place=place, shape=input.shape))
        visit = Visit(input, seat.puts)
        mean, squares = cast("tuple[Tensor, Tensor]", Measure.apply(input, visit))
        moments = (input.numel() / max(1, input.shape[1]), mean, squares)
        graph = [each for each in (mean, squares) if each.requires_grad]
        mean, variance, narrowed = seat.meet(topic, moments, graph=graph)
        narrow = narrowed.to(visit.dtype, eps)
        out = cast("Tensor", Normalise.apply(input.detach(), mean, variance, narrow, weight, bias, visit))
        seat.parking.saw(out)
        return out

    def _merge(
        self, parts: Sequence[Moments], *, running: Running | None, place: str, shape: torch.Size
    ) -> tuple[Tensor, Tensor, Narrowed]:
        moments = merged(parts)
        if self._across is not None:
            moments = self._across.merge(moments, f"batch_norm at {place}")
        count, mean, squares = moments
        if count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
        variance = squares / count
        if running is not None:
            key = id(running.mean)
            self._meetings[key] = self._meetings.get(key, 0) + 1
            running.move(mean.detach(), squares.detach() / (count - 1))
        return mean, variance, Narrowed(mean, variance)

    def _place(self, *tensors: Tensor | None) -> str:
        found = (self._names.get(id(each)) for each in tensors if each is not None)
        name = next((each for each in found if each is not None), None)
        return caller() if name is None else repr(name)


def arguments_of(call: Call) -> dict[str, Any]:
    """Name the arguments of a batch normalisation.

    Args:
        call: Of `torch.nn.functional.batch_norm`, or of `torch.batch_norm`, which has another order.

    Returns:
        All of them by name.
    """
    names = _NAMES if call.func is F.batch_norm else _NAMES_OF_TORCH
    return dict(zip(names, call.args, strict=False)) | dict(call.kwargs)


@dataclass(slots=True)
class _Counter:
    """How often a layer says that it saw a batch."""

    name: str
    tensor: Tensor
    running: int
    version: int
    times: int = 0


def _own_tensors(layer: _BatchNorm) -> list[Tensor]:
    return [each for each in (layer.running_mean, layer.weight) if each is not None]


class OneOfMany(nn.SyncBatchNorm):
    """A synchronised layer in a replica: the lockstep synchronises, over microbatches and ranks."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name for it
        """Normalise as an ordinary layer does."""
        return _BatchNorm.forward(self, input)
