"""One window over an engine: agree on the denominators, make the passes, agree on what they gave, let it step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from microbatch.batch.batch_tree import rows_of
from microbatch.engines.engine_passes import Order, Pass, Passes, engine_loss, graphs_of, silent_loss
from microbatch.errors import (
    EmptyBatchError,
    EmptyWindowError,
    LossError,
    MissingCountError,
    NonfiniteError,
    RankError,
)
from microbatch.gradients.clipping import gradient_norm
from microbatch.loss.loss import LossLike, Share, shares_of, wide_dtype
from microbatch.ranks.agreement import Message, agree, attend
from microbatch.ranks.process_group import RankGroup
from microbatch.step.denominator import Counts, Denominator
from microbatch.step.events import Event, MicrobatchDone
from microbatch.step.finish import record_of
from microbatch.step.part import Met
from microbatch.step.peers.data_parallel import message_of, total_metrics, total_over
from microbatch.step.record import Step
from microbatch.step.saved_state import Snapshot

LossFunction: TypeAlias = Callable[[nn.Module, Any], LossLike]


class EngineWindow:
    """Run one batch through a DeepSpeed engine.

    Without ZeRO and with ZeRO-1 passes do not communicate: gradients are reduced after the ranks have agreed, and a
    rank that failed can say so. From ZeRO-2 on they are reduced while they come, and ZeRO-3 gathers weights in each.

    Args:
        engine: The engine.
        size: Rows of a microbatch.
        index: Steps taken before, the same on every rank.
        tell: Tells an event to whoever listens.
    """

    def __init__(self, engine: Any, size: int, *, index: int, tell: Callable[[Event], None]) -> None:
        self._engine, self._size, self._index, self._tell = engine, size, index, tell
        self._started = time.perf_counter()
        self._device = torch.device(engine.device)
        self._ranks = RankGroup.find(self._device, engine.data_parallel_group)
        self._parameters = [each for each in engine.module.parameters() if each.requires_grad]
        self._managed: bool = engine.managed_gradient_accumulation()
        self._stage = int(engine.zero_optimization_stage())
        # ZeRO-1 can be told to overlap what it reduces with the last backward.
        self._together = self._stage >= 2 or bool(getattr(engine.optimizer, "overlap_comm", False))
        # And every engine, to add up over the ranks without dividing.
        self._divisor = 1 if self._ranks is None or not engine.gradient_average else self._ranks.size
        self._snapshot = Snapshot(engine.module, self._device)
        self._order, self._outputs = Order(), list[Tensor]()
        self._awaited = True  # whether the other ranks wait for this one's word
        self._passing = self._begun = self._stepping = False
        self._denominator = Denominator()
        self._largest = 0

    def run(self, batch: object, loss_fn: LossFunction, *, counts: Counts | None) -> Step:
        """Take one step.

        Args:
            batch: This rank's rows.
            loss_fn: What they are learned with.
            counts: Denominators, for losses with counts of their own.

        Returns:
            Its record.
        """
        with ExitStack() as stack:
            if self._managed:  # put back, at the end, who says where an accumulation ends: `None`, the engine counts
                before = getattr(self._engine, "_is_gradient_accumulation_boundary", None)
                stack.callback(self._engine.set_gradient_accumulation_boundary, before)
            rows = self._expect(batch, counts)
            passes = Passes.agree(self._ranks, batch, size=self._size, together=self._together)
            self._awaited, self._passing = not self._together, True  # inside passes that communicate nobody hears
            with ExitStack() as hooks:
                self._watch(hooks)
                self._make(passes, loss_fn)
            self._passing, self._awaited = False, True
            agreed = self._agree(rows_of(batch))
            self._check(agreed, rows=rows, declared=counts is not None)
            norm = self._finish(agreed.present)
        return self._record(agreed, norm, microbatches=passes.own)

    def abort(self, error: BaseException) -> bool:
        """Leave the engine without this window's gradient, and tell the other ranks.

        Args:
            error: What ended the window.

        Returns:
            Whether that could be done.
        """
        heard = isinstance(error, RankError) or not isinstance(error, Exception)
        if self._ranks is not None and self._awaited and not heard:
            with suppress(RankError, RuntimeError):  # the others may have died
                agree(self._ranks, None, parameters=len(self._parameters))
        self._snapshot.restore()
        optimizer = self._engine.optimizer
        optimizer.zero_grad()
        self._engine.zero_grad()
        # As the engine itself does after an overflow. ZeRO-3 begins anew once its zero_grad has been called.
        for name in ("averaged_gradients", "all_grad_tensors"):
            held = getattr(optimizer, name, {})
            held.update(dict.fromkeys(held))
        # How far a backward that communicates had come is known to nobody; nor what a forward of ZeRO-3 had gathered.
        inside = self._passing and self._together and (self._begun or (self._stage == 3 and not self._outputs))
        return not (inside or self._stepping or self._engine.zero_use_cpu_optimizer())

    # -- before the first backward ------------------------------------------------------------------------------------

    def _expect(self, batch: object, counts: Counts | None) -> float:
        """Learn the denominators; return the rows of all ranks."""
        ranks, parameters = self._ranks, len(self._parameters)
        rows = float(rows_of(batch))
        self._denominator = Denominator(counts)
        if counts is None:
            rows = rows if ranks is None else attend(ranks, rows, parameters=parameters)
            self._denominator.declare(rows, {})
        else:

            def total(own: float, counted: Mapping[str, float]) -> tuple[float, Mapping[str, float]]:
                return (own, counted) if ranks is None else total_over(ranks, own, counted, parameters=parameters)

            self._denominator.expect([batch], int(rows), begun=False, total=total)
            rows = float(self._denominator.rows or 0)
        if not rows:
            self._awaited = False
            raise EmptyBatchError("the batch has 0 rows on every rank; skip empty batches before the training step")
        return rows

    def _watch(self, hooks: ExitStack) -> None:
        """Note, while passes communicate, which gradients come, and what the model returns."""
        if not self._together:
            return
        for index, parameter in enumerate(self._parameters):
            come = partial(self._came, index)
            hooks.callback(parameter.register_post_accumulate_grad_hook(come).remove)
        hooks.callback(self._engine.register_forward_hook(self._returned).remove)

    def _came(self, index: int, _: Tensor) -> None:
        self._order.come(index)

    def _returned(self, _: nn.Module, __: object, output: object) -> None:
        self._outputs.extend(graphs_of(output))

    # -- passes -------------------------------------------------------------------------------------------------------

    def _make(self, passes: Passes, loss_fn: LossFunction) -> None:
        """Make this rank's passes, and as many more as the other ranks have."""
        made = 0
        for number, (rows, microbatch) in enumerate(passes.microbatches(self._device)):
            last = made + 1 == passes.planned
            made += self._pass((rows, microbatch), loss_fn, last=last, number=number)
            self._largest = max(self._largest, rows)
            self._tell(MicrobatchDone(step=self._index, index=number, microbatches=passes.own, rows=rows))
        if not self._together or made == passes.planned:
            return
        before = Snapshot(self._engine.module, self._device)
        while made < passes.planned:
            last = made + 1 == passes.planned
            if not self._pass(passes.filler(self._device), loss_fn, last=last, number=passes.own):
                raise LossError(
                    "the other ranks wait for a backward through the engine, and the loss function returned a loss "
                    "without a graph, and did not call the model: call it all the same where nothing counts"
                )
            made += 1
        before.restore()

    def _pass(self, given: Pass, loss_fn: LossFunction, *, last: bool, number: int) -> bool:
        """Run a microbatch forward and backward; return whether there was a backward."""
        rows, microbatch = given
        self._outputs.clear()
        if self._managed:
            self._engine.set_gradient_accumulation_boundary(last and self._together)
        returned = loss_fn(self._engine, microbatch)
        shares = shares_of(returned, rows=rows) if rows else []
        if shares:
            self._refuse_late(shares)
            loss = engine_loss(shares, self._denominator, divisor=self._divisor)
            self._denominator.add(shares, microbatch=number)
        else:
            loss = silent_loss(self._outputs, returned) if self._together else None
        if loss is None:
            return False
        del returned
        self._outputs.clear()
        self._begun = True
        self._engine.backward(loss, scale_wrt_gas=False)
        self._order.come(-1)
        return True

    def _refuse_late(self, shares: Sequence[Share]) -> None:
        declared = self._denominator.declared or {}
        for share in shares:
            if not share.is_mean and share.name not in declared:
                raise MissingCountError(
                    f"the loss {share.name!r} has a count of its own, and the engine has to be given each microbatch's "
                    "share of the whole, over all ranks, before its backward: pass counts=, a function of the whole "
                    f"batch, for example counts=lambda batch: {{{share.name!r}: (batch['labels'] != -100).sum()}}"
                )

    # -- after the last backward --------------------------------------------------------------------------------------

    def _agree(self, samples: int) -> Message:
        """Add up what the ranks counted."""
        present = [getattr(each, self._where, None) is not None for each in self._parameters]
        own = message_of(self._denominator, self._device, samples=samples, present=present)
        own = replace(own, steps=self._index)
        self._awaited = False
        if self._ranks is None:
            return own
        agreed = agree(self._ranks, own, parameters=len(self._parameters))
        if self._together and not self._order.alike(self._ranks):
            raise RankError(
                "the ranks' microbatches used different parameters, or in another order, and the engine added the "
                f"gradients of one to those of another, as ZeRO-{self._stage} reduces them while they come: let every "
                "microbatch use every parameter, or take ZeRO-1 without overlap_comm"
            )
        return agreed

    def _check(self, agreed: Message, *, rows: float, declared: bool) -> None:
        """Refuse what must not become a step, on all ranks alike."""
        if not any(agreed.counts):
            raise EmptyWindowError("no microbatch of this window contributed to the loss (every count was 0)")
        counts = dict(zip(agreed.names, agreed.counts, strict=True))
        for name, count in counts.items():
            if not declared and 0 <= count < rows:
                raise MissingCountError(
                    f"the loss {name!r} is a mean over samples, of which {count:g} of {rows:g} contributed, and the "
                    "engine was given shares of all: pass counts=, a function of the whole batch that says how many do"
                )
        self._denominator.factor(counts)
        if not all(math.isfinite(each) for each in agreed.sums) and not self._scales:
            raise NonfiniteError(microbatch=self._denominator.first_nonfinite())

    @property
    def _scales(self) -> bool:
        """Whether the engine looks for infinities by itself, because it finds its scale by them."""
        engine = self._engine
        narrow = engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16
        return bool(engine.fp16_enabled() or narrow)

    def _finish(self, present: Sequence[bool]) -> Tensor:
        """Let the engine reduce, clip and step; return the norm of the gradient."""
        engine, norm = self._engine, torch.tensor(math.nan)
        self._stepping = True
        if not self._together:
            self._fill(present)
            if self._managed:
                engine.set_gradient_accumulation_boundary(True)
                engine.allreduce_gradients()
                if self._stage == 0 and not self._scales:
                    norm = gradient_norm([p.grad for p in self._parameters if p.grad is not None], self._device)
        elif self._managed:
            engine.set_gradient_accumulation_boundary(True)
        engine.step()
        told = engine.get_global_grad_norm()
        return norm if told is None else torch.tensor(float(told))

    @property
    def _where(self) -> str:
        """Where gradients add up that wait to be reduced."""
        return "grad_accum" if getattr(self._engine.optimizer, "use_grad_accum_attribute", False) else "grad"

    def _fill(self, present: Sequence[bool]) -> None:
        """Give a gradient of zero to what another rank has one for: ZeRO-1 would reduce different buckets."""
        optimizer = self._engine.optimizer
        if not hasattr(optimizer, "get_gradient_for_reduction"):
            return  # what brings its own zeros
        optimizer.setup_buckets()  # as the first gradient would have done, had there been any
        dtype = optimizer.gradient_accumulation_dtype if self._where == "grad_accum" else None
        for parameter, has in zip(self._parameters, present, strict=True):
            if has and getattr(parameter, self._where, None) is None:
                setattr(parameter, self._where, torch.zeros_like(parameter, dtype=dtype))

    def _metrics_of_ranks(self, own: dict[str, float]) -> list[dict[str, float]]:
        return [own] if self._ranks is None else self._ranks.tell(own)

    def _record(self, agreed: Message, norm: Tensor, *, microbatches: int) -> Step:
        ranks, device = self._ranks, self._device
        met = Met(
            names=agreed.names,
            sums=torch.tensor(agreed.sums, dtype=wide_dtype(device), device=device),
            host_sums=agreed.sums,
            counts=dict(zip(agreed.names, agreed.counts, strict=True)),
            samples=agreed.samples,
            dtype=torch.float64 if agreed.double else torch.float32,
            norm=norm.to(device),
            host_norm=math.nan,
            normalized=True,
            present=agreed.present,
            metrics=total_metrics(self._denominator, self._metrics_of_ranks, device) if agreed.metrics else {},
        )
        return Step(
            index=self._index,
            microbatches=microbatches,
            microbatch_size=self._largest,
            applied=bool(self._engine.was_step_applied()),
            seconds=time.perf_counter() - self._started,
            comm_bytes=0 if ranks is None else ranks.sent_bytes,
            comm_calls=0 if ranks is None else ranks.calls,
            **record_of(met),
        )
