"""What must be the same on all ranks (model, optimizer settings, options), and the heartbeats of the ranks."""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from microbatch.errors import RankError
from microbatch.gradients.parameters import Named
from microbatch.ranks.agreement import Message
from microbatch.ranks.lost_ranks import COMPUTING, WAITING, missing_ranks_named
from microbatch.ranks.process_group import RankGroup
from microbatch.ranks.same_setup import check_same
from microbatch.ranks.store_beats import StoreBeats
from microbatch.shards import is_shard
from microbatch.step.options import Options
from microbatch.step.part import OpenWindow


class RankSetup:
    """Check that the ranks of an accumulator are set up alike, and record how far this rank has come.

    Args:
        also: Returns further texts by name that must be the same on data-parallel ranks.

    Attributes:
        beats: The heartbeats of the ranks; `None` before the first window, and for a single process.

    Source:
        Laws F5, F6.
    """

    def __init__(self, also: Callable[[], Mapping[str, str]] = dict) -> None:
        self.beats: StoreBeats | None = None
        self._also = also
        self._room = 0
        self._parameters: list[Tensor] = []
        self._hash = 0

    def begin(self, window: OpenWindow, groups: Sequence[tuple[RankGroup, bool]]) -> None:
        """Record the start of a window."""
        if self.beats is None and groups:
            self.beats = StoreBeats(rank for ranks, _ in groups for rank in ranks.members)
        for ranks, _ in groups:
            ranks.beats = self.beats
        if self.beats is not None:
            self.beats.at(window.setup.history.windows, COMPUTING)

    @contextmanager
    def first(self, window: OpenWindow, groups: Sequence[tuple[RankGroup, bool]]) -> Generator[None]:
        """Check, before the first window, that the ranks are set up alike; the block runs further collectives."""
        if self.beats is None:
            yield
            return
        with missing_ranks_named(self.beats.name):
            options = describe_options(window.options, windows=window.setup.history.windows)
            whole = {**options, **describe_model(window.options), **self._also()}
            described = [(ranks, whole if same else options) for ranks, same in groups]
            self.beats.know(check_same(described, self.beats.own))
            yield

    def arrive(self, window: OpenWindow, message: Message) -> Message:
        """Record that this rank waits for the others, and add its number of steps and its parameters to its message."""
        named = window.gradients.named
        parameters = [each.parameter for each in named]
        if len(parameters) != len(self._parameters) or not all(map(operator.is_, parameters, self._parameters)):
            self._parameters = parameters
            self._hash = zlib.crc32(repr(_describe_trained(named)).encode()) & 0xFFFF
        if self.beats is not None:
            self.beats.at(window.setup.history.windows, WAITING)
        return replace(message, trained=self._hash, describe=partial(_describe_trained, named))

    def room(self, window: OpenWindow) -> int:
        """Return how many parameters a message has room for: all of the first window's, frozen ones too.

        So a rank that trains other parameters than the others sends a message of the same length.
        """
        if not self._room:
            optimizers = [group["params"] for each in window.options.optimizers for group in each.param_groups]
            self._room = len({id(each) for some in [window.options.model.parameters(), *optimizers] for each in some})
        return max(self._room, len(window.gradients.named))

    def record(self, error: BaseException) -> None:
        """Record a failure of this rank, so that the other ranks can name it."""
        if self.beats is not None and not isinstance(error, RankError):
            self.beats.failed(error)

    def told(self) -> None:
        """Record that the other ranks know of this rank's failure."""
        if self.beats is not None:
            self.beats.told()

    def name_lost(self, error: BaseException) -> None:
        """Raise an error that names the missing ranks, if a collective has failed because of them."""
        if self.beats is not None:
            self.beats.name(error)


def describe_options(options: Options, *, windows: int) -> dict[str, str]:
    """Describe the options that all ranks must share, also stages of a pipeline; those for memory may differ."""
    sums, ranks, scaler, noise = options.sums, options.ranks, options.grad_scaler, options.noise_scale
    found = {
        "max_grad_norm": options.max_grad_norm,
        "autocast": options.autocast,
        "grad_scaler": None if scaler is None else scaler.state_dict(),
        "nonfinite": options.nonfinite,
        "batch_norm": options.batch_norm,
        "dropout": options.dropout,
        "Ranks(deterministic=...)": ranks.deterministic,
        "NoiseScale(every=...)": noise and noise.every,
        "NoiseScale(by_group=...)": noise and noise.by_group,
        "Sums(dtype=...)": sums.dtype,
        "Sums(how=...)": sums.how,
        "Sums(buffer=...)": [state is not None for state in options.linear_states],
        "Ranks(reduce_dtype=...)": ranks.reduce_dtype,
        "Ranks(overlap=...)": ranks.overlap,
        "the number of earlier windows": windows,
    }
    if ranks.deterministic:
        found["microbatch_size"] = options.microbatch_size
    return {name: _text(value) for name, value in found.items()}


def describe_model(options: Options) -> dict[str, str]:
    """Describe by name a model and its optimizers, which must be the same on data-parallel ranks."""
    model, wrapped = options.bare_model, isinstance(options.model, DistributedDataParallel)
    found = {"the model": f"{type(model).__name__}{' in DistributedDataParallel' if wrapped else ''}"}
    groups = {
        id(parameter): f", in group {g} of optimizer {o}"
        for o, optimizer in enumerate(options.optimizers)
        for g, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        trained = "trained" if parameter.requires_grad else "frozen"
        plain = type(parameter) is nn.Parameter
        values = f", of checksum {_checksum(parameter)}" if wrapped and plain else ""
        found[f"parameter {name!r}"] = f"{_form(parameter)}, {trained}{groups.get(id(parameter), '')}{values}"
    for name, buffer in model.named_buffers():
        found[f"buffer {name!r}"] = _form(buffer)
    for index, optimizer in enumerate(options.optimizers):
        found |= describe_optimizer(f"optimizer {index}", optimizer)
    return found


def _describe_trained(named: Sequence[Named]) -> dict[str, str]:
    return {f"parameter {each.name!r} of this window": _form(each.parameter) for each in named}


def describe_optimizer(name: str, optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    """Describe an optimizer, which must be the same on data-parallel ranks."""
    yield name, type(optimizer).__name__
    for index, group in enumerate(optimizer.param_groups):
        yield f"{name}, group {index}", f"{len(group['params'])} parameters"
        for key, value in group.items():
            if key not in {"params", "param_names"}:
                yield f"{name}, group {index}, {key}", _text(value)
    if type(optimizer).__module__.startswith("torch.optim"):  # other optimizers may spread their state over the ranks
        states = [state for state in optimizer.state.values() if state]
        steps = sorted({_text(state["step"]) for state in states if "step" in state})
        yield f"the state of {name}", f"of {len(states)} parameters, after {', '.join(steps) or 'no'} steps"


def _form(tensor: Tensor) -> str:
    where: Any = tensor
    spread = f" spread by {where.placements}" if is_shard(tensor) else ""
    shape = getattr(tensor, "ds_shape", tensor.shape)  # DeepSpeed's ZeRO-3 leaves parameters empty between passes
    return f"{tuple(shape)} {tensor.dtype}{spread}"


def _checksum(tensor: Tensor) -> int:
    """Add up the bytes of a tensor: the same on every device, in any order."""
    return int(tensor.detach().contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64))


def _text(value: Any) -> str:
    """Return a text that is equal for equal settings in different processes."""
    if isinstance(value, Tensor):
        return _text(value.tolist())
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, bool | str | torch.dtype) or value is None:
        return str(value)
    if isinstance(value, int | float):
        return repr(float(value)) if not math.isfinite(value) or value != int(value) else repr(int(value))
    return type(value).__name__  # an object's own text may hold its address
