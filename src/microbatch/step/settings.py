"""What an accumulator was asked for, checked once; and what it remembers between windows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from microbatch.batch.cut import check_microbatch_size
from microbatch.batch.lengths import Lengths
from microbatch.batch.random_masks import derive
from microbatch.errors import ConfigError
from microbatch.gradients.momentum_buffer import LinearState, check_folds, linear_state
from microbatch.loss.batchnorm import layers_of
from microbatch.loss.loss import Count
from microbatch.memory.saved_values import Aside
from microbatch.memory.spill import Spill
from microbatch.ranks.bucketed_reduce import Overlap
from microbatch.ranks.fsdp import fully_sharded, group_and_device, narrowest, wrapped_by_the_older
from microbatch.ranks.pipeline import Pipeline
from microbatch.ranks.process_group import Ranks, group_of
from microbatch.ranks.reduce import Flat
from microbatch.ranks.stage_ranks import check_beside
from microbatch.shards import is_shard
from microbatch.step.coupled_way import WAYS, Ways
from microbatch.step.events import Event, Listener
from microbatch.step.pace import Pace
from microbatch.step.sizing import Sizing
from microbatch.step.tune import Tuning

Counts: TypeAlias = Mapping[str, Count] | Callable[..., Mapping[str, Count]]

EXACT, MICROBATCH, POOLED, FROZEN = "exact", "microbatch", "pooled", "frozen"
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, slots=True)
class Settings:
    """The arguments of an `Accumulator`, which documents them."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    microbatch_size: int | str
    memory_budget: int | str | None
    max_grad_norm: float | None
    autocast: torch.dtype | None
    grad_scaler: torch.amp.GradScaler | None
    accumulate_dtype: torch.dtype
    nonfinite: str
    fuse: bool
    compile: bool | str
    lengths: Lengths | None
    listeners: list[Listener]
    offload: str | Spill | None = None
    checkpoint: str | Sequence[str] | None = None
    look_again: bool = False
    coupled: str = "auto"
    batch_norm: str | None = None
    accumulate: str = "plain"
    gradient_buffer: Sequence[str | LinearState] = ()
    dropout: str | None = None
    deterministic: bool = False
    process_group: object = None
    sync: str = "auto"
    reduce_dtype: torch.dtype | None = torch.float32
    overlap: bool = False

    def __post_init__(self) -> None:
        """Refuse every value that cannot work, before any work starts.

        Raises:
            ConfigError: An argument cannot work; the message says which, its value and what to pass.
        """
        if not isinstance(self.model, nn.Module):
            raise ConfigError(f"model must be a torch.nn.Module, not a {type(self.model).__name__}")
        self._check_optimizers()
        if self.microbatch_size != "auto":
            check_microbatch_size(self.microbatch_size)
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, int | float) and math.isfinite(norm) and norm > 0):
            raise ConfigError(f"max_grad_norm must be a positive number or None, not {norm!r}")
        if not any(self.autocast is dtype for dtype in (None, torch.bfloat16, torch.float16)):
            raise ConfigError(f"autocast must be torch.bfloat16, torch.float16 or None, not {self.autocast!r}")
        if self.nonfinite not in ["raise", "skip"]:
            raise ConfigError(f'nonfinite must be "raise" or "skip", not {self.nonfinite!r}')
        if not isinstance(self.compile, bool) and self.compile not in _COMPILE_MODES:
            modes = ", ".join(f'"{mode}"' for mode in _COMPILE_MODES)
            raise ConfigError(f"compile must be True, False or a mode of torch.compile ({modes}), not {self.compile!r}")
        if not isinstance(self.offload, Spill) and self.offload not in {None, "activations"}:
            raise ConfigError(f'offload must be "activations", a Spill or None, not {self.offload!r}')
        self._check_checkpoint()
        if self.coupled not in {"auto", *WAYS}:
            ways = ", ".join(f'"{way}"' for way in ("auto", *WAYS))
            raise ConfigError(f"coupled must be one of {ways}, not {self.coupled!r}")
        self._check_batch_norm()
        for listener in self.listeners:
            if not callable(listener):
                raise ConfigError(
                    f"listeners must be callables that take one event, not the {type(listener).__name__} {listener!r}"
                )
        self._check_scaler()
        self._check_sums()
        self._check_buffers()
        if self.dropout not in {None, "by_row"}:
            raise ConfigError(f'dropout must be "by_row" or None, not {self.dropout!r}')
        if self.dropout and self.compile:
            raise ConfigError('dropout="by_row" draws its masks in Python, which compile= would leave out; use one')
        self._check_deterministic()
        self._check_ranks()

    @property
    def linear_states(self) -> list[LinearState | None]:
        """Where each optimizer's gradients add up inside its state; `None` where they have a buffer of their own.

        Raises:
            ConfigError: Nobody has described the state of an optimizer.
        """
        asked = self.gradient_buffer or ["own"] * len(self.optimizers)
        pairs = zip(asked, self.optimizers, strict=True)
        return [
            each if isinstance(each, LinearState) else linear_state(optimizer) if each == "none" else None
            for each, optimizer in pairs
        ]

    @property
    def spill(self) -> Spill | None:
        """What moves saved activations off the device, if that was asked for."""
        return self.offload if isinstance(self.offload, Spill) else None

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is, and microbatches are sent."""
        if self.pipeline is not None:
            return self.pipeline.device
        first = next(self.model.parameters(), None)
        if is_shard(first) and (shared := group_and_device(self.model)) is not None:
            return shared[1]  # which may have its shards on the host
        return torch.device("cpu") if first is None else first.device

    @property
    def pipeline(self) -> Pipeline | None:
        """This rank's stages of a model that is split into some; `None` for other models."""
        return self.model if isinstance(self.model, Pipeline) else None

    @property
    def is_sharded(self) -> bool:
        """Whether parts of the model are fully sharded over ranks."""
        return bool(fully_sharded(self.model))

    @property
    def group(self) -> Any:
        """The process group over which counts and gradients add up; `None` for the default one."""
        shared = group_and_device(self.model) if self.process_group is None else None
        return group_of(self.process_group) if shared is None else shared[0]

    @property
    def ranks(self) -> Ranks | None:
        """The data-parallel ranks; `None` if there is only this one."""
        alone = self.pipeline is not None and self.process_group is None
        return None if alone else Ranks.find(self.device, self.group)

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrapper of DistributedDataParallel, whose reductions the accumulator does itself."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def way(self) -> str:
        """How batches are encoded whose loss couples samples."""
        # What each rank would choose by its own clock, all have to do alike.
        return "twice" if self.coupled == "auto" and self.is_sharded else self.coupled

    def refuse_coupled(self) -> None:
        """Refuse to encode a batch with a pipeline, or while gradients are reduced.

        Raises:
            ConfigError: The model is one, or ``overlap=True``.
        """
        if self.pipeline is not None:
            raise ConfigError(
                "encode= does not go with a Pipeline, whose schedule runs each microbatch once, forward and backward; "
                "use DistributedDataParallel or a bare model for losses that couple samples"
            )
        if self.overlap:
            raise ConfigError(
                "encode= does not go with overlap=True: in the backward of a loss of the whole batch the ranks talk of "
                "other things than gradients; leave one of them out"
            )

    def emit(self, event: Event) -> None:
        """Tell every listener.

        Args:
            event: What happened.
        """
        for listener in self.listeners:
            listener(event)

    def _check_optimizers(self) -> None:
        if not self.optimizers:
            raise ConfigError("at least one optimizer is needed")
        for optimizer in self.optimizers:
            if not isinstance(optimizer, Optimizer):
                raise ConfigError(
                    f"optimizer must be a torch.optim.Optimizer, or several, not a {type(optimizer).__name__}"
                )
            if isinstance(optimizer, LBFGS):
                raise ConfigError(
                    "LBFGS moves the weights several times within one step, so there is no window in which they are "
                    "frozen; use an optimizer whose step() needs no closure"
                )

    def _check_checkpoint(self) -> None:
        blocks = self.checkpoint
        if blocks is None:
            return
        names = [blocks] if isinstance(blocks, str) else list(blocks)
        if not all(isinstance(name, str) for name in names):
            raise ConfigError(f'checkpoint must be "auto", "all", names of submodules or None, not {blocks!r}')
        if names and (self.compile or hasattr(self.bare_model, "_orig_mod")):
            raise ConfigError(
                "checkpoint= and the compiler do not go together: it decides by itself what to keep for backward; "
                "leave one of them out"
            )

    def _check_sums(self) -> None:
        dtype = self.accumulate_dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(f"accumulate_dtype must be a floating-point torch.dtype, not {dtype!r}")
        if self.accumulate not in {"plain", "compensated", "stochastic"}:
            raise ConfigError(f'accumulate must be "plain", "compensated" or "stochastic", not {self.accumulate!r}')
        if self.accumulate != "plain" and dtype != torch.bfloat16:
            raise ConfigError(
                f'accumulate="{self.accumulate}" is for sums in bfloat16: pass accumulate_dtype=torch.bfloat16 with '
                f"it, not {dtype}, in which sums need no help"
            )

    def _check_buffers(self) -> None:
        asked = self.gradient_buffer
        if asked and len(asked) != len(self.optimizers):
            raise ConfigError(f"gradient_buffer has {len(asked)} values for {len(self.optimizers)} optimizers")
        for each in asked:
            if not isinstance(each, LinearState) and each not in {"own", "none"}:
                raise ConfigError(f'gradient_buffer must be "own", "none" or a LinearState, not {each!r}')
        states = self.linear_states
        if not any(states):
            return
        for given, name, why in [
            (self.max_grad_norm, "max_grad_norm", "the gradient has no norm of its own once it is in the momentum"),
            (self.grad_scaler, "grad_scaler", "it looks for infinities in gradients of their own"),
            (self.accumulate != "plain", "accumulate", "the sum is the optimizer's state, in that state's precision"),
        ]:
            if given:
                raise ConfigError(f'gradient_buffer="none" does not go with {name}=: {why}; leave one of them out')
        for optimizer, state in zip(self.optimizers, states, strict=True):
            if state is not None:
                check_folds(optimizer, state)
                self._check_width(optimizer)

    def _check_width(self, optimizer: Optimizer) -> None:
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if torch.promote_types(parameter.dtype, self.accumulate_dtype) != parameter.dtype:
                    raise ConfigError(
                        f'gradient_buffer="none": gradients would add up in the {parameter.dtype} state of group '
                        f"{index}, and accumulate_dtype is {self.accumulate_dtype}; pass accumulate_dtype="
                        f"{parameter.dtype} if that precision will do, or keep a gradient buffer"
                    )

    def _check_deterministic(self) -> None:
        if not self.deterministic:
            return
        if not isinstance(self.microbatch_size, int):
            raise ConfigError(
                "deterministic=True needs a microbatch_size that is a number: every size rounds in its own way, and "
                f"{self.microbatch_size!r} may find another one elsewhere"
            )
        frozen = self.batch_norm == FROZEN or not layers_of(self.bare_model)
        for given, name, why in [
            (self.lengths, "lengths", "which rows go together would depend on the share that a rank has"),
            (self.compile, "compile", "which shapes run compiled would depend on the share that a rank has"),
            (self.grad_scaler, "grad_scaler", "its overflows are those of one rank's microbatches"),
            (self.accumulate != "plain", "accumulate", "sums of microbatches are float32 or wider"),
            (any(self.linear_states), "gradient_buffer", "a tree of sums needs buffers of its own"),
            (not frozen, "batch_norm", 'running statistics move with each rank\'s microbatches; pass "frozen"'),
        ]:
            if given:
                raise ConfigError(f"deterministic=True does not go with {name}=: {why}; leave one of them out")

    def _check_ranks(self) -> None:
        if self.sync not in {"auto", "lean", "fast"}:
            raise ConfigError(f'sync must be "auto", "lean" or "fast", not {self.sync!r}')
        if self.reduce_dtype not in {None, torch.float32}:
            raise ConfigError(
                "reduce_dtype must be torch.float32, or None for each parameter's own dtype, not "
                f"{self.reduce_dtype!r}; float64 gradients add up in float64 anyway"
            )
        if (path := wrapped_by_the_older(self.model)) is not None:
            raise ConfigError(
                f"{path or 'the model'!r} is wrapped in FullyShardedDataParallel, which flattens parameters and "
                "averages gradients by itself; apply torch.distributed.fsdp.fully_shard to its modules instead"
            )
        if any(kind.__module__.partition(".")[0] == "deepspeed" for kind in type(self.model).__mro__):
            raise ConfigError(
                "a DeepSpeed engine adds gradients up, reduces and steps by itself: mb.DeepSpeed(engine) gives it the "
                "one denominator"
            )
        if self.is_sharded:
            check_sharded(self)
        group = self.group  # which refuses what is none
        if self.pipeline is not None:
            check_piped(self)
            check_beside(self.pipeline, group, given=self.process_group is not None)
        if self.overlap:
            check_overlap(self)

    def _check_batch_norm(self) -> None:
        how = self.batch_norm
        if how not in {None, EXACT, MICROBATCH, POOLED, FROZEN}:
            raise ConfigError(
                f'batch_norm must be "{EXACT}", "{MICROBATCH}", "{POOLED}", "{FROZEN}" or None, not {how!r}'
            )
        if how in {EXACT, POOLED} and self.compile:
            raise ConfigError(
                f'batch_norm="{how}" looks into a forward pass at every statistic, which a compiled one does not '
                "allow; leave compile= out, or compile modules without batch normalisation with torch.compile"
            )
        if how == EXACT and self.checkpoint == "auto":
            raise ConfigError(
                f'batch_norm="{EXACT}" does not go with checkpoint="auto": what microbatches keep for backward is '
                "spilled while they wait for one another; leave checkpoint= out, or name blocks without batch "
                "normalisation"
            )
        if how == EXACT and self.coupled not in {"auto", "spill"}:
            raise ConfigError(
                f'batch_norm="{EXACT}" encodes once, in turns, and spills what waits, whatever encode= returns; leave '
                f"coupled={self.coupled!r} out"
            )

        if how == EXACT and self.dropout is not None:
            raise ConfigError(
                f'batch_norm="{EXACT}" does not go with dropout={self.dropout!r}: masks are told one microbatch at a '
                "time, and microbatches run in turns; leave one of them out"
            )
        if how == EXACT and any(self.linear_states):
            raise ConfigError(
                f'batch_norm="{EXACT}" does not go with gradient_buffer="none": one backward is for all microbatches, '
                "in which autograd adds up their gradients itself; leave one of them out"
            )

    def _check_scaler(self) -> None:
        if self.grad_scaler is None:
            return
        if not isinstance(self.grad_scaler, torch.amp.GradScaler):
            raise ConfigError(f"grad_scaler must be a torch.amp.GradScaler, not a {type(self.grad_scaler).__name__}")
        for name, parameter in self.model.named_parameters():
            if parameter.dtype in {torch.float16, torch.bfloat16}:
                raise ConfigError(
                    f"grad_scaler is for float32 parameters under autocast, and {name!r} is {parameter.dtype}; keep "
                    "the parameters in float32, or leave the scaler out: narrow gradients add up in accumulate_dtype"
                )


def check_sharded(settings: Settings) -> None:
    """Refuse what does not go with a fully sharded model, before anything changes.

    Args:
        settings: The accumulator's.

    Raises:
        ConfigError: Something does not; the message says what to do.
    """
    for given, name, instead in [
        (
            settings.batch_norm == EXACT and settings.sync == "lean",
            'batch_norm="exact" with sync="lean"',
            'one backward is for all microbatches, which leaves whole gradients; say sync="fast" or "auto"',
        ),
        (any(settings.linear_states), 'gradient_buffer="none"', "leave it out: a rank holds a shard of each gradient"),
        (settings.grad_scaler is not None, "grad_scaler=", "use bfloat16, which needs no scaler"),
        (settings.deterministic, "deterministic=", "its sums are torch's own, in the order of the ranks"),
        (settings.compile, "compile=", "compile its blocks with torch.compile before fully_shard"),
        (
            settings.offload is not None and settings.batch_norm != EXACT,
            "offload=",
            "use fully_shard's CPUOffloadPolicy, or checkpoint blocks",
        ),
        (
            settings.coupled not in {"auto", "twice"},
            f'coupled="{settings.coupled}"',
            "leave it out: batches are encoded twice, since graphs would hold the weights of every pass",
        ),
        (settings.checkpoint is not None, "checkpoint=", "apply torch's checkpoint wrapper before fully_shard"),
    ]:
        if given:
            raise ConfigError(f"{name} does not go with a fully sharded model: {instead}")
    wide = settings.accumulate_dtype
    dtype = narrowest(settings.model, alone=True)
    if settings.batch_norm == EXACT and dtype is not None and torch.promote_types(dtype, wide) != dtype:
        raise ConfigError(
            f'batch_norm="{EXACT}" with a fully sharded model adds gradients up in {dtype}, in which it computes, and '
            f"accumulate_dtype is {wide}; keep the weights in {wide} and use autocast="
        )
    dtype = narrowest(settings.model)
    if settings.sync == "fast" and dtype is not None and torch.promote_types(dtype, wide) != dtype:
        raise ConfigError(
            f'sync="fast" would add gradients up in {dtype}, as the MixedPrecisionPolicy of the model says, and '
            f'accumulate_dtype is {wide}; pass reduce_dtype={wide} to the policy, or sync="lean"'
        )


def check_piped(settings: Settings) -> None:
    """Refuse what does not go with a pipeline, before anything changes.

    Args:
        settings: The accumulator's.

    Raises:
        ConfigError: Something does not; the message says what to do.
    """
    how = settings.batch_norm
    moving = how in {EXACT, POOLED} or (how != FROZEN and bool(layers_of(settings.model)))
    limited = settings.memory_budget not in {None, "none"}
    for given, name, instead in [
        (settings.microbatch_size == "auto", 'microbatch_size="auto"', "say how many rows the stages hand on at once"),
        (limited, "memory_budget=", "leave it out: a stage that stopped would leave the others waiting"),
        (
            moving,
            f"batch_norm={how!r}",
            'passes are filled up with rows that statistics would see; say "frozen", or use mb.convert_batch_norm',
        ),
        (any(settings.linear_states), 'gradient_buffer="none"', "leave it out: counts are known on the last stage"),
        (settings.grad_scaler is not None, "grad_scaler=", "use bfloat16, which needs no scaler"),
        (settings.deterministic, "deterministic=", "its sums are torch's own, in the order of its schedule"),
        (settings.compile, "compile=", "compile each stage's module with torch.compile"),
        (settings.offload is not None, "offload=", "split into more stages, or checkpoint blocks"),
        (settings.checkpoint is not None, "checkpoint=", "apply torch's checkpoint wrapper to blocks of the stages"),
        (settings.lengths is not None, "lengths=", "stages hand on equal shapes, so pad all rows to one length"),
        (settings.dropout is not None, "dropout=", "each rank draws the masks of its own stages"),
        (settings.is_sharded, "fully_shard", "keep each stage whole on its rank, or split into more stages"),
    ]:
        if given:
            raise ConfigError(f"{name} does not go with a Pipeline: {instead}")


def check_overlap(settings: Settings) -> None:
    """Refuse what does not go with gradients that are reduced while the last backward runs.

    Args:
        settings: The accumulator's.

    Raises:
        ConfigError: Something does not; the message says what to do.
    """
    parameters = [each for group in settings.optimizers for each in _parameters(group)]
    wide = settings.accumulate_dtype
    narrow = any(torch.promote_types(each.dtype, wide) != each.dtype for each in parameters)
    talks = any(isinstance(each, nn.SyncBatchNorm) for each in settings.model.modules())
    for given, name, instead in [
        (settings.pipeline is not None, "a Pipeline", "its schedule runs the backward of all microbatches"),
        (settings.is_sharded, "a fully sharded model", "torch scatters its gradients during backward by itself"),
        (any(map(is_shard, parameters)), "parameters that are spread over ranks", "leave overlap= out"),
        (settings.deterministic, "deterministic=", "its sums are made in one order, at the end"),
        (settings.batch_norm == EXACT, f'batch_norm="{EXACT}"', "one backward is for all microbatches"),
        (any(settings.linear_states), 'gradient_buffer="none"', "gradients are inside the optimizer's state"),
        (settings.accumulate != "plain", "accumulate=", "leave one of them out"),
        (settings.dropout is not None, "dropout=", "leave one of them out"),
        (talks, "SyncBatchNorm", "its backward talks to the other ranks, too; leave overlap= out"),
        (narrow, f"parameters narrower than accumulate_dtype={wide}", "their sums are beside them; leave overlap= out"),
    ]:
        if given:
            raise ConfigError(f"overlap=True does not go with {name}: {instead}")


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]


@dataclass(slots=True)
class Watched:
    """How large windows have been while somebody counted their bytes, and went well.

    Attributes:
        windows: How many went well, counted or not.
        row_bytes: Bytes of the widest row of a counted one.
        bytes: Bytes of the largest microbatch of a counted one.
        told: Most bytes by which a budget was said to be passed.
        stateless: Whether the last window began before the optimizer had its state.
    """

    windows: int = 0
    row_bytes: float = 0.0
    bytes: float = 0.0
    told: int = 0
    stateless: bool = False


@dataclass(slots=True)
class Progress:
    """What several ranks did together since the accumulator was made, or its state loaded.

    Attributes:
        steps: Windows that ended, with a step or without.
        met: Places of the parameters that were given an update.
    """

    steps: int = 0
    met: set[int] = field(default_factory=set[int])


@dataclass(slots=True)
class Memory:
    """What windows leave to the next one.

    Attributes:
        sizing: The microbatch size, as every cut is made by it.
        windows: Windows that ended, with a step or without.
        skipped: Of these, the ones that were dropped.
        count: Count of the last window, which scales the next one; only a scale, never part of a result.
        open: Whether a window is open now.
        shared: Whether the ranks have been given the first one's weights.
        warned: Whether the user has been told what batch normalisation does to microbatches.
        spilled: Tells the bytes that have been moved off the device so far.
        fusion: Reports which weights the last window fused.
        watched: What need not be watched again.
        progress: What was done together with other ranks.
        tuning: What is known of the microbatch sizes, while ``"auto"`` looks for one.
        pace: How fast windows have been since ``"auto"`` chose, where it is to look again; `None` before, or if not.
        checkpoint: Blocks that are computed again in backward; `None` before ``"auto"`` has chosen them.
        clock: Seconds since some moment.
        ways: How batches are encoded whose loss couples samples.
        seed: What masks and roundings are drawn from; the process's own seed when the first window opened.
        aside: Where states are put while gradients add up in them.
        flat: Memory in which the ranks' gradients meet.
        lean_bytes: Most bytes of a window whose sharded gradients were scattered after every microbatch.
        too_fast: Whether memory ended in a window that scattered them once.
        sync: How the last window scattered them, where that is left to the windows; `None` before the first.
    """

    sizing: Sizing
    windows: int = 0
    skipped: int = 0
    count: float = 0.0
    open: bool = False
    shared: bool = False
    warned: bool = False
    spilled: Callable[[], int] = int
    fusion: Callable[[], Mapping[str, str]] = dict
    watched: Watched = field(default_factory=Watched)
    progress: Progress = field(default_factory=Progress)
    tuning: Tuning | None = None
    pace: Pace | None = None
    checkpoint: tuple[str, ...] | None = ()
    clock: Callable[[], float] = time.perf_counter
    ways: Ways = field(default_factory=lambda: Ways("auto"))
    seed: int | None = None
    aside: Aside = field(default_factory=Aside)
    flat: Flat = field(default_factory=Flat)
    overlap: Overlap | None = None
    lean_bytes: int | None = None
    too_fast: bool = False
    sync: str | None = None

    def first_seed(self) -> int:
        """Return the seed that those of all windows are derived from."""
        return torch.initial_seed() if self.seed is None else self.seed

    def window_seed(self) -> int:
        """Return the seed of the next window: the same for every attempt at it, and when a run is resumed."""
        self.seed = self.first_seed()
        return derive(self.seed, self.windows)
