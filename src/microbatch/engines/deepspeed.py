"""DeepSpeed: one exact optimizer step of an engine that the user has made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from microbatch.arguments import check_callable
from microbatch.batch.cut import check_microbatch_size
from microbatch.engines.engine_denominator import EngineDenominator
from microbatch.engines.engine_peers import EnginePeers
from microbatch.engines.zero_engine import EngineGradients, ZeroEngine
from microbatch.errors import ConfigError, WindowError
from microbatch.kind_words import kind_of
from microbatch.loss.loss import LossLike
from microbatch.step.denominator import Counts
from microbatch.step.events import Listener
from microbatch.step.history import History
from microbatch.step.options import Options, Ranks, listeners_of
from microbatch.step.part import Part, Passes
from microbatch.step.parts.batch_warnings import BatchWarnings
from microbatch.step.parts.loss_warnings import CountWarning
from microbatch.step.parts.watching import WatchedWeights
from microbatch.step.record import Step
from microbatch.step.setup import Attempt, Setup
from microbatch.step.size.sizing import Sizing
from microbatch.step.window import Window


class DeepSpeed:
    r"""Run an effective batch through a DeepSpeed engine in microbatches, with one denominator over all ranks.

    The engine adds gradients up, averages them over the ranks, clips, scales losses and steps; the number of
    microbatches that it is configured for is left out. Each backward is given ``ranks * S_i / C``, where ``C`` is the
    count of the whole effective batch, so that the engine's mean over the ranks is ``sum_i grad S_i / C``. For that
    ``C`` must be known before the first backward: for plain means it is the number of rows, and for losses with counts
    of their own ``counts=`` says it. Where passes communicate, every rank makes as many. See ``docs/deepspeed.md``.

    Args:
        engine: What ``deepspeed.initialize`` returned first: ZeRO 0 to 3, whoever owns the accumulation boundary
            (``managed_gradient_accumulation``).
        microbatch_size: Rows that go through the model at once; at least 1. `None` takes what the engine
            is configured for.
        listeners: A callable, or several, that is called with every event.

    Raises:
        ConfigError: It is no such engine, or does something that this cannot make exact.

    Example:
        >>> import torch
        >>> DeepSpeed(torch.nn.Linear(1, 1))
        Traceback (most recent call last):
        microbatch.errors.ConfigError: engine must be what deepspeed.initialize(...) returned first, not a Linear
    """

    def __init__(
        self, engine: nn.Module, *, microbatch_size: int | None = None, listeners: Listener | Sequence[Listener] = ()
    ) -> None:
        checked = _checked(engine)
        size = checked.train_micro_batch_size_per_gpu() if microbatch_size is None else microbatch_size
        size = check_microbatch_size(size)
        ranks = Ranks(group=checked.data_parallel_group)
        options = EngineOptions(
            model=checked, optimizers=[], microbatch_size=size, ranks=ranks, listeners=listeners_of(listeners)
        )
        zero, passes = ZeroEngine(checked), Passes()
        self._size, self._peers = size, EnginePeers(zero)
        # ZeRO-3 itself writes to weights when it gathers them.
        watched: list[Part] = [] if zero.stage == 3 else [WatchedWeights()]
        self._setup = Setup(
            options=options,
            history=History(),
            # The peers run backward themselves, so they are the last.
            parts=[BatchWarnings(), CountWarning(), *watched, passes, self._peers],
            peers=self._peers,
            passes=passes,
            sizing=lambda rows: Sizing(asked=size),
            sums=lambda rank: EngineGradients(zero),
            couple=_none,
            finish=self._peers.finish,
            live_bytes=_none,
        )

    @property
    def microbatch_size(self) -> int:
        """Rows that go through the model at once."""
        return self._size

    def step(
        self, batch: object, loss_fn: Callable[[nn.Module, Any], LossLike], *, counts: Counts | None = None
    ) -> Step:
        """Take exactly one step of the engine on a batch.

        Args:
            batch: This rank's share of the effective batch, usually on the host; what `cut` accepts. It may be empty.
            loss_fn: ``loss_fn(engine, microbatch)`` returns the mean over the microbatch's samples (0-d), a `Loss`, a
                dict of either for several terms, or `None` for a microbatch that contributes nothing.
            counts: For every `Loss` with a count of its own: ``counts(batch)`` returns the denominators of the whole
                batch, by term, or a dict of them; the term of a single loss is ``"loss"``.

        Returns:
            The record of the step. ``applied`` is False where the engine left it out, for an overflow; ``grad_norm`` is
            NaN where it tells none; and ``comm_bytes`` are without what the engine itself communicates.

        Raises:
            BatchError: The batch cannot be cut, or is empty on every rank.
            LossError: What ``loss_fn`` returned cannot be used, or a denominator is missing.
            NonfiniteError: A loss is infinite or NaN, and the engine does not look after that by scaling losses.
            RankError: Another rank failed or is lost, or the ranks are set up differently or used different parameters.
            WindowError: Nothing contributed; or an earlier window failed, and the engine still holds part of its
                gradient.

        Cost:
            One forward and one backward a microbatch, and what the engine communicates; three or four small
            collectives, and a host synchronisation at the end. The first step checks that the ranks are set up alike.
        """
        check_callable("loss_fn", loss_fn, "loss_fn(engine, microbatch)")
        if self._peers.spoilt:
            raise WindowError(
                "an earlier window failed inside the engine, which holds part of that gradient and has no way to drop "
                "it: make the engine anew, and load its last checkpoint"
            )
        window = Window(self._setup, attempt=Attempt())
        window.denominator = EngineDenominator(counts)
        return window.enclose(partial(_run, batch, loss_fn)).step


class EngineOptions(Options):
    """The options of a window over an engine, whose weights may be on the host."""

    @property
    def device(self) -> torch.device:
        """The device where the engine computes."""
        engine: Any = self.model
        return torch.device(engine.device)


def _run(batch: object, loss_fn: Callable[[nn.Module, Any], LossLike], window: Window) -> None:
    for loss in window.losses(batch, loss_fn):
        window.backward(loss)
        del loss


def _none(*_: object, **__: object) -> Any:
    """Return `None`, for functions that a window over an engine does not need."""


def _checked(engine: Any) -> Any:
    """Refuse what is no engine, or one whose gradient would not be the batch's."""
    deepspeed: Any = sys.modules.get("deepspeed")  # never imported here: who has an engine has imported it
    kind = getattr(deepspeed, "DeepSpeedEngine", None)
    if kind is None or not isinstance(engine, kind):
        raise ConfigError(f"engine must be what deepspeed.initialize(...) returned first, not {kind_of(engine)}")
    for found, what, why in [
        (engine.pipeline_parallelism, "a PipelineModule", "its engine runs the loop over microbatches itself"),
        (engine.optimizer is None, "no optimizer", "it cannot step; pass optimizer= to deepspeed.initialize"),
        (engine.sequence_parallel_size > 1, "sequence parallelism", "ranks of a sequence would count the same rows"),
        (engine.has_moe_layers, "mixture-of-experts layers", "its experts have ranks of their own"),
        (getattr(engine, "zenflow", False), "ZenFlow", "gradients of one step are applied in others"),
        (not engine.enable_backward_allreduce, "a compressing optimizer", "it communicates momenta, not gradients"),
    ]:
        if found:
            raise ConfigError(f"the engine has {what}, which is refused: {why}")
    return engine
