"""The options of an accumulator, each checked by itself; `combinations.py` checks which options exclude each other."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from microbatch.arguments import check_one_of, is_finite, is_text, listed_of
from microbatch.batch.cut import check_microbatch_size
from microbatch.batch.lengths import Lengths
from microbatch.errors import ConfigError
from microbatch.gradients.momentum_buffer import LinearState, linear_state
from microbatch.gradients.noise_estimate import NoiseScale
from microbatch.gradients.parameters import first_parameter
from microbatch.kind_words import kind_of
from microbatch.memory.budget import parse_bytes
from microbatch.memory.spill import Spill
from microbatch.ranks.fsdp import fully_sharded, group_and_device
from microbatch.ranks.pipeline import Pipeline
from microbatch.ranks.process_group import RankGroup, group_of
from microbatch.shards import is_shard
from microbatch.step.events import Event, Listener
from microbatch.step.plain_optimizers import check_optimizers

EXACT, MICROBATCH, POOLED, FROZEN = "exact", "microbatch", "pooled", "frozen"
ONCE, MEAN, EACH = "once", "mean", "each"
WAYS = ("auto", "twice", "keep", "spill")
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_P = ParamSpec("_P")

# Names of options in earlier versions and in other libraries, and what to write instead.
_NAMES = {
    "accumulate_dtype": "sums=mb.Sums(dtype=...)",
    "accumulate": "sums=mb.Sums(how=...)",
    "gradient_buffer": "sums=mb.Sums(buffer=...)",
    "fuse": "sums=mb.Sums(fuse=...)",
    "process_group": "ranks=mb.Ranks(group=...)",
    "sync": "ranks=mb.Ranks(sync=...)",
    "reduce_dtype": "ranks=mb.Ranks(reduce_dtype=...)",
    "overlap": "ranks=mb.Ranks(overlap=...)",
    "deterministic": "ranks=mb.Ranks(deterministic=...)",
    "look_again": 'removed: microbatch_size="auto" keeps the size that it has chosen',
    "optimizers": "optimizer=, which takes one or several",
    "gradient_accumulation_steps": "microbatch_size=, the rows of one microbatch; pass the whole batch to step()",
    "accumulation_steps": "microbatch_size=, the rows of one microbatch; pass the whole batch to step()",
    "accumulate_grad_batches": "microbatch_size=, the rows of one microbatch; pass the whole batch to step()",
    "num_microbatches": "microbatch_size=, the rows of one microbatch",
    "microbatches": "microbatch_size=, the rows of one microbatch; windows(loader, microbatches=...) takes a number",
    "micro_batch_size": "microbatch_size=",
    "per_device_train_batch_size": "microbatch_size=",
    "train_micro_batch_size_per_gpu": "microbatch_size=",
    "batch_size": "microbatch_size=, the rows of one microbatch; pass the whole batch to step()",
    "mini_batch_size": "microbatch_size=",
    "max_norm": "max_grad_norm=",
    "clip_grad_norm": "max_grad_norm=",
    "gradient_clip_val": "max_grad_norm=",
    "mixed_precision": "autocast=torch.bfloat16 or torch.float16",
    "precision": "autocast=torch.bfloat16 or torch.float16",
    "bf16": "autocast=torch.bfloat16",
    "fp16": "autocast=torch.float16, with grad_scaler=",
    "scaler": "grad_scaler=",
    "gradient_checkpointing": 'checkpoint="all"',
    "torch_compile": "compile=",
    "callbacks": "listeners=",
    "memory_limit": "memory_budget=",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Choose how the gradients of the microbatches add up.

    Many additions in bfloat16 round away small gradients. By default, gradients therefore add up in float32.

    Attributes:
        dtype: Floating-point dtype in which gradients of narrower parameters add up. The optimizer still gets
            gradients in the parameters' dtype.
        how: For ``dtype=torch.bfloat16``: ``"plain"`` adds as torch does; ``"compensated"`` keeps the rounding errors,
            in 3 bytes for each gradient element.
        buffer: ``"own"`` for an ordinary gradient buffer. ``"none"`` adds gradients directly into the momentum of SGD
            or Muon, and saves the buffer. A `LinearState` describes another optimizer. A list has one of these for
            each optimizer.
        fuse: Whether weight gradients are added inside the matrix product, where possible.

    Raises:
        ConfigError: A value cannot work.

    Example:
        >>> Sums(dtype=torch.bfloat16, how="compensated").fuse
        True

    Source:
        ``docs/precision.md``, ``docs/fuse.md``.
    """

    dtype: torch.dtype = torch.float32
    how: str = "plain"
    buffer: str | LinearState | Sequence[str | LinearState] = "own"
    fuse: bool = True

    def __post_init__(self) -> None:
        """Check every value."""
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ConfigError(f"Sums: dtype must be a floating-point torch.dtype, not {self.dtype!r}")
        check_one_of("Sums: how", self.how, ("plain", "compensated"))
        check_one_of("Sums: fuse", self.fuse, (True, False))
        if self.how != "plain" and self.dtype != torch.bfloat16:
            raise ConfigError(
                f'Sums: how="{self.how}" is only for sums in bfloat16, and dtype is {self.dtype}: pass '
                "dtype=torch.bfloat16, or leave how= out"
            )
        for each in self.buffer if isinstance(self.buffer, list | tuple) else [self.buffer]:
            if not isinstance(each, LinearState):
                check_one_of("Sums: buffer", each, ("own", "none"), also="a LinearState")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Choose over which ranks gradients are reduced, when, and in which dtype.

    The ranks add up their gradients and their counts, and divide once. So a rank may have more rows than another.

    Attributes:
        group: The data-parallel process group, or a `DeviceMesh` of one dimension. `None` takes all ranks; for a fully
            sharded model, the ranks of its mesh.
        sync: When the gradients of a fully sharded model are reduced. ``"lean"``: after every microbatch. ``"fast"``:
            once, with unsharded gradients in memory until then. ``"auto"`` starts lean, and becomes fast once a window
            has shown that the memory is enough.
        reduce_dtype: The dtype in which narrower gradients are reduced: float32, or `None` for the parameter's dtype.
        overlap: Whether gradients are reduced during the backward of the last microbatch. Takes memory for a copy of
            all gradients.
        deterministic: Whether results are bitwise identical on any number of ranks, dropout included. Each microbatch
            of ``microbatch_size`` rows has its own seed; gradients add up in a fixed tree.

    Raises:
        ConfigError: A value cannot work.

    Example:
        >>> Ranks(sync="lean").reduce_dtype
        torch.float32

    Source:
        ``docs/ranks.md``, ``docs/sharded.md``.
    """

    group: object = None
    sync: str = "auto"
    reduce_dtype: torch.dtype | None = torch.float32
    overlap: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        check_one_of("Ranks: sync", self.sync, ("auto", "lean", "fast"))
        check_one_of("Ranks: overlap", self.overlap, (True, False))
        check_one_of("Ranks: deterministic", self.deterministic, (True, False))
        if self.reduce_dtype is not None and self.reduce_dtype is not torch.float32:
            raise ConfigError(
                "Ranks: reduce_dtype must be torch.float32, or None for each parameter's own dtype, not "
                f"{self.reduce_dtype!r}; float64 gradients are reduced in float64 anyway"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of an `Accumulator`; see there for each of them.

    Raises:
        ConfigError: A value cannot work; the message names the option and the values to pass.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    microbatch_size: int | str = "auto"
    memory_budget: int | str | None = None
    max_grad_norm: float | None = None
    autocast: torch.dtype | None = None
    grad_scaler: torch.amp.GradScaler | None = None
    nonfinite: str = "raise"
    lengths: Lengths | None = None
    offload: str | Spill | None = None
    checkpoint: str | Sequence[str] | None = None
    coupled: str = "auto"
    batch_norm: str | None = None
    buffers: str | None = None
    dropout: str | None = None
    compile: bool | str = False
    sums: Sums = field(default_factory=Sums)
    ranks: Ranks = field(default_factory=Ranks)
    noise_scale: NoiseScale | None = None
    listeners: Sequence[Listener] = ()

    def __post_init__(self) -> None:
        """Check every value before any work starts."""
        if not isinstance(self.model, nn.Module):
            raise ConfigError(f"model must be a torch.nn.Module, not {kind_of(self.model)}")
        check_optimizers(self.model, self.optimizers)
        size_of(self.microbatch_size)
        norm = self.max_grad_norm
        if norm is not None and not (is_finite(norm) and norm > 0):
            raise ConfigError(f"max_grad_norm must be a positive number or None, not {norm!r}")
        if not any(self.autocast is dtype for dtype in (None, torch.bfloat16, torch.float16)):
            raise ConfigError(f"autocast must be torch.bfloat16, torch.float16 or None, not {self.autocast!r}")
        for name, value, allowed in [
            ("nonfinite", self.nonfinite, ("raise", "skip")),
            ("coupled", self.coupled, WAYS),
            ("batch_norm", self.batch_norm, (EXACT, MICROBATCH, POOLED, FROZEN, None)),
            ("buffers", self.buffers, (ONCE, MEAN, EACH, None)),
            ("dropout", self.dropout, ("by_row", None)),
            ("compile", self.compile, (True, False, *_COMPILE_MODES)),
        ]:
            check_one_of(name, value, allowed)
        if not isinstance(self.offload, Spill):
            check_one_of("offload", self.offload, ("activations", None), also="a Spill")
        blocks: Any = () if self.checkpoint is None or isinstance(self.checkpoint, str) else self.checkpoint
        if not isinstance(blocks, Sequence) or not all(isinstance(name, str) for name in blocks):
            raise ConfigError(f'checkpoint must be "auto", "all", names of submodules or None, not {self.checkpoint!r}')
        for listener in self.listeners:
            if not callable(listener):
                raise ConfigError(
                    f"listeners must be callables that take one event, not the {type(listener).__name__} {listener!r}"
                )
        for name, value, kind in [("sums", self.sums, Sums), ("ranks", self.ranks, Ranks)]:
            if not isinstance(value, kind):
                raise ConfigError(f"{name} must be mb.{kind.__name__}(...), not {value!r}")
        if self.noise_scale is not None and not isinstance(self.noise_scale, NoiseScale):
            raise ConfigError(f"noise_scale must be mb.NoiseScale(...) or None, not {self.noise_scale!r}")
        self._check_scaler()

    @property
    def linear_states(self) -> list[LinearState | None]:
        """For each optimizer, the state that its gradients are added into; `None` for an ordinary buffer.

        Raises:
            ConfigError: The numbers of buffers and optimizers differ, or ``"none"`` does not support an optimizer.
        """
        asked = self.sums.buffer
        asked = [asked] * len(self.optimizers) if isinstance(asked, str | LinearState) else list(asked)
        if len(asked) != len(self.optimizers):
            raise ConfigError(f"Sums: buffer has {len(asked)} values for {len(self.optimizers)} optimizers")
        return [
            each if isinstance(each, LinearState) else linear_state(optimizer) if each == "none" else None
            for each, optimizer in zip(asked, self.optimizers, strict=True)
        ]

    @property
    def spill(self) -> Spill | None:
        """The `Spill` that offloads activations, if there is one."""
        return self.offload if isinstance(self.offload, Spill) else None

    @property
    def device(self) -> torch.device:
        """The device where the model computes: that of its first parameter."""
        if self.pipeline is not None:
            return self.pipeline.device
        first = first_parameter(self.model)
        if first is not None and is_shard(first) and (shared := group_and_device(self.model)) is not None:
            return shared[1]  # the shards may be on the host
        return torch.device("cpu") if first is None else first.device

    @property
    def pipeline(self) -> Pipeline | None:
        """This rank's stages of a pipeline-parallel model; `None` for other models."""
        return self.model if isinstance(self.model, Pipeline) else None

    @property
    def is_sharded(self) -> bool:
        """Whether any module of the model is fully sharded."""
        return bool(fully_sharded(self.model))

    @property
    def group(self) -> Any:
        """The process group over which counts and gradients are reduced; `None` for the default group."""
        shared = group_and_device(self.model) if self.ranks.group is None else None
        return group_of(self.ranks.group) if shared is None else shared[0]

    def find_ranks(self) -> RankGroup | None:
        """Find the data-parallel ranks; `None` for a single process."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        alone = self.pipeline is not None and self.ranks.group is None
        return None if alone else RankGroup.find(self.device, self.group)

    @property
    def bare_model(self) -> nn.Module:
        """The model without a DistributedDataParallel wrapper; the accumulator reduces gradients itself."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def emit(self, event: Event) -> None:
        """Call every listener with an event."""
        for listener in self.listeners:
            listener(event)

    def emit_after(self, *events: Event) -> None:
        """Call every listener with events of a step that has been taken; an error of a listener says so."""
        try:
            for event in events:
                self.emit(event)
        except BaseException as error:
            error.add_note("microbatch: a listener raised this error after the step had been taken and recorded")
            raise

    def _check_scaler(self) -> None:
        if self.grad_scaler is None:
            return
        if not isinstance(self.grad_scaler, torch.amp.GradScaler):
            raise ConfigError(f"grad_scaler must be a torch.amp.GradScaler, not {kind_of(self.grad_scaler)}")
        if not self.optimizers:
            raise ConfigError("grad_scaler= needs an optimizer, whose gradients it unscales: pass optimizer=, too")
        for name, parameter in self.model.named_parameters():
            if parameter.dtype in {torch.float16, torch.bfloat16}:
                raise ConfigError(
                    f"grad_scaler is for float32 parameters under autocast, and {name!r} is {parameter.dtype}. Keep "
                    "the parameters in float32, or leave grad_scaler= out: their gradients add up in Sums(dtype=...)"
                )


def names_checked(init: Callable[_P, None]) -> Callable[_P, None]:
    """Wrap a constructor so that the error for an unknown option names the option to use instead."""
    known = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for name in kwargs:
            if name not in known:
                here = _NAMES.get(name)
                hint = f"write {here}" if here else f"the options are {', '.join(known)}"
                raise ConfigError(f"Accumulator has no option {name!r}: {hint}")
        init(*args, **kwargs)

    return checked


def size_of(microbatch_size: Any) -> int | str:
    """Return a microbatch size as an int, and ``"auto"`` as it is; `ConfigError` for anything else."""
    return "auto" if is_text(microbatch_size, "auto") else check_microbatch_size(microbatch_size, ', or "auto"')


def lengths_of(given: Any) -> Lengths | None:
    """Return how to find the lengths of rows, from a name or a `Lengths`; `ConfigError` for anything else."""
    if given is None or isinstance(given, Lengths):
        return given
    if not isinstance(given, str):
        raise ConfigError(f"lengths must be the name of an entry of the batch, mb.Lengths(...) or None, not {given!r}")
    return Lengths(of=given)


def bytes_of(budget: int | str | None) -> int | str | None:
    """Return a memory budget in bytes; `None` and ``"none"`` stay as they are."""
    return budget if budget is None or is_text(budget, "none") else parse_bytes(budget)


def listeners_of(given: Any) -> list[Listener]:
    """Return a list of one listener, or of several."""
    if callable(given):
        return [given]
    listed = None if isinstance(given, Tensor | str) else listed_of(given)
    if listed is None:
        raise ConfigError(f"listeners must be one or several of them in a list, not {kind_of(given)}")
    return listed
