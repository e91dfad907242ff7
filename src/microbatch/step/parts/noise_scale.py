"""Measure the gradient noise scale: hooks read the norms of each microbatch's gradients, and copy nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from microbatch.gradients.noise_estimate import Measured, NoiseScale, interval_of, measure, scale_of
from microbatch.step.met import Met
from microbatch.step.options import Options
from microbatch.step.part import OpenWindow, Part, Run
from microbatch.step.record import Step

_PIECE = 2**18
_NARROW = {torch.bfloat16, torch.float16}


class NoiseMeter(Part):
    """Measure how much the gradients of the microbatches differ, in one window of several, and keep the latest results.

    A hook on each parameter gets the gradient of one microbatch, before it is added up. So the way in which gradients
    add up does not matter: in `.grad`, in a wider buffer, in momentum, or one by one in a deterministic tree. A few
    microbatches of a window have these hooks; the others run as without this part.

    Args:
        options: The options of the accumulator.

    Source:
        McCandlish et al. 2018 (arXiv:1812.06162), appendix A.
    """

    def __init__(self, options: Options) -> None:
        self._asked = options.noise_scale or NoiseScale()
        self._groups = _groups_of(options) if self._asked.by_group else {}
        # For each measured window, the results of all parameters together, and of each parameter group.
        self._windows: list[list[Measured]] = []
        self._latest: list[list[Measured]] = []
        self._result: dict[str, Any] = {}
        self._rest()

    def _rest(self) -> None:
        """Forget what the current window has measured."""
        self._due = self._twice = False
        self._running: dict[int, Tensor] = {}
        self._norms: dict[int, tuple[list[int], Tensor]] = {}
        self._latest = self._windows

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Decide whether the window is measured."""
        self._rest()
        self._due = self._asked.due(window.setup.history.windows)

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Collect the norms of the gradients of some microbatches."""
        return partial(self._backward, window, run) if self._due else run

    def _backward(self, window: OpenWindow, run: Run, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
        index, known = len(window.done), window.planned
        if not self._asked.reads(index, microbatches=known, window=window.setup.history.windows):
            run(tensors, seeds)
            return
        self._running = found = {}
        with ExitStack() as stack:
            for place, each in enumerate(window.gradients.named):
                if each.held:
                    stack.callback(each.parameter.register_hook(partial(self._read, place)).remove)
            run(tensors, seeds)
        if found:
            self._norms[index] = list(found), _stack(list(found.values()), window.device)

    def _read(self, place: int, gradient: Tensor) -> None:
        """Read the gradient that one microbatch adds to a parameter."""
        # A parameter in two reentrant checkpoints gets two gradients, and their sum is not known here.
        self._twice = self._twice or place in self._running
        self._running[place] = _norm(gradient.detach())

    def reduced(self, window: OpenWindow, met: Met, factor: float) -> None:
        """Compare the microbatches' gradients with the whole gradient, which all ranks have added up."""
        if not (self._due and met.finite):
            return
        if self._twice:
            window.setup.warn(
                "noise",
                "noise_scale= cannot measure this model: a parameter gets its gradient in several pieces within one "
                "backward; pass use_reentrant=False to torch.utils.checkpoint, or leave noise_scale= out",
            )
        counts = _counts(window, met)
        total = met.samples if counts is None else next(iter(met.counts.values()))
        counts = dict(enumerate(window.done)) if counts is None else counts
        places = self._places(window)
        own = self._own(window, met, places, counts=counts, total=total)
        microbatches, read, failed, *parts = window.peers.add_up(own)
        if failed or microbatches <= 1:
            return
        whole = self._whole(window, factor)
        # From what the loss counts to samples: a sample has so many of them.
        per_sample = total / met.samples if met.samples else 1.0
        found: list[Measured] = []
        for each, group in zip(parts, places, strict=True):
            squared = sum(whole[place] for place in group)
            noise, signal = measure(each, squared, count=total, microbatches=microbatches, read=read)
            found.append(Measured(noise / per_sample, signal))
        if all(math.isfinite(number) for each in found for number in each):
            self._latest = [*self._windows, found][-self._asked.windows :]

    def _own(
        self,
        window: OpenWindow,
        met: Met,
        places: Sequence[Sequence[int]],
        *,
        counts: Mapping[int, float],
        total: float,
    ) -> list[float]:
        """Return what this rank has read, whether it failed to, and its sums for each group.

        What it has read is a number of microbatches, and what the loss counts in them.
        """
        used = [(count, *self._norms[index]) for index, count in counts.items() if count > 0 and index in self._norms]
        sums = [0.0] * len(window.gradients.named)
        if used:
            scaler = window.options.grad_scaler
            scale = window.denominator.factor(met.counts) / (scaler.get_scale() if scaler else 1.0)
            # n_i |g_i|^2 = N^2 |h_i|^2 / n_i, where a microbatch has added h_i to the whole gradient.
            read = torch.cat([norms for _, _, norms in used]).tolist()
            weighted = [(place, count) for count, found, _ in used for place in found]
            for (place, count), norm in zip(weighted, read, strict=True):
                sums[place] += (norm * scale * total) ** 2 / count
        read = float(sum(count for count, _, _ in used))
        return [float(len(used)), read, float(self._twice), *(sum(sums[k] for k in group) for group in places)]

    def _places(self, window: OpenWindow) -> list[list[int]]:
        """Return the places of all parameters, and of each group's, in the list of a window's parameters."""
        held = [(place, id(each.parameter)) for place, each in enumerate(window.gradients.named) if each.held]
        return [[k for k, _ in held], *([k for k, key in held if key in group] for group in self._groups.values())]

    def _whole(self, window: OpenWindow, factor: float) -> list[float]:
        """Return the squared norm of each parameter's finished gradient."""
        places = {id(each.parameter): place for place, each in enumerate(window.gradients.named)}
        found = [(places[id(each.parameter)], _norm(total)) for each, total in window.gradients.without_states(factor)]
        squares = [0.0] * len(places)
        for (place, _), norm in zip(found, _stack([norm for _, norm in found], window.device).tolist(), strict=True):
            squares[place] = (norm * factor) ** 2
        return squares

    def figures(self, window: OpenWindow) -> Mapping[str, Any]:
        """Return the estimate, this window included."""
        if self._latest is not self._windows or not self._result:
            self._result = self._figures()
        return self._result

    def _figures(self) -> dict[str, Any]:
        together, *groups = list(zip(*self._latest, strict=True)) or [()] * (1 + len(self._groups))
        scale = scale_of(together)
        return {
            "noise_scale": scale,
            "noise_interval": None if scale is None else interval_of(together),
            "noise_scale_by_group": dict(zip(self._groups, map(scale_of, groups), strict=True)),
        }

    def done(self, window: OpenWindow, step: Step) -> None:
        """Keep the results of the window."""
        self._windows = self._latest
        self._rest()

    def put_back(self, window: OpenWindow, error: BaseException) -> None:
        """Forget the results of the window."""
        self._result = {}
        self._rest()

    def state(self) -> dict[str, Any]:
        """Return the results of the latest windows."""
        return {"windows": [[list(each) for each in groups] for groups in self._windows]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue the estimate; results of other parameter groups than these are left out."""
        windows = [[Measured(float(noise), float(signal)) for noise, signal in groups] for groups in state["windows"]]
        self._windows = [groups for groups in windows if len(groups) == 1 + len(self._groups)][-self._asked.windows :]
        self._result = {}
        self._rest()


def _groups_of(options: Options) -> dict[str, set[int]]:
    """Return the ids of the parameters in each parameter group, by the group's name or its number."""
    found: dict[str, set[int]] = {}
    for group in [group for optimizer in options.optimizers for group in optimizer.param_groups]:
        name = str(group.get("name", len(found)))
        found[name if name not in found else f"{name}/{len(found)}"] = {id(each) for each in group["params"]}
    return found or {"0": {id(each) for each in options.model.parameters()}}


def _counts(window: OpenWindow, met: Met) -> dict[int, float] | None:
    """Return what the loss counts in each microbatch; `None` if its terms count different things."""
    denominator = window.denominator
    if len(met.names) > 1 and not denominator.means:
        return None
    return {index: count for name in denominator.names[:1] for index, _, count in denominator.per_microbatch(name)}


def _norm(gradient: Tensor) -> Tensor:
    """Return the norm of one gradient; shape ``()``."""
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    dtype = torch.float32 if values.dtype in _NARROW else None
    if values.device.type != "cpu" or values.numel() <= _PIECE:
        return torch.linalg.vector_norm(values, dtype=dtype)
    # In float32 on the CPU, torch rounds a long sum of squares down: by 0.7 % for 50 million numbers.
    norms = [torch.linalg.vector_norm(each, dtype=dtype) for each in values.reshape(-1).split(_PIECE)]
    return torch.linalg.vector_norm(torch.stack(norms))


def _stack(norms: Sequence[Tensor], device: torch.device) -> Tensor:
    """Put norms of several parameters into one tensor."""
    dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    return torch.stack([norm.to(device, dtype) for norm in norms]) if norms else torch.zeros(0, device=device)
