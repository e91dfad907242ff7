"""The end of a window: reduce, unscale, normalise, check, clip, step, zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from microbatch.errors import EmptyWindowError, NonfiniteError
from microbatch.gradients.clipping import clip_factor, first_nonfinite, gradient_norm, scale_
from microbatch.gradients.gradient_sum import GradientSum
from microbatch.loss.loss import wide_dtype
from microbatch.loss.tally import Tally
from microbatch.ranks.agreement import Message, agree
from microbatch.ranks.fsdp_passes import Sharded
from microbatch.ranks.process_group import Ranks
from microbatch.ranks.reduce import Flat, reduce_, reserve
from microbatch.ranks.stage_ranks import Stages
from microbatch.shards import local_of
from microbatch.step.all_or_none import together
from microbatch.step.canonical import Canonical
from microbatch.step.early import Early
from microbatch.step.optimizer_step import apply
from microbatch.step.settings import Progress, Settings


@dataclass(frozen=True, slots=True)
class Closing:
    """What a window hands in when its last microbatch is done."""

    settings: Settings
    gradients: GradientSum
    tally: Tally
    ranks: Ranks | None
    samples: int | float
    progress: Progress
    flat: Flat
    sharded: Sharded | None
    canonical: Canonical | None = None
    stages: Stages | None = None
    early: Early | None = None

    @property
    def speaks(self) -> bool:
        """Whether it is for this rank to say which rows there were: of a pipeline's, which have the same, one does."""
        pipeline = self.settings.pipeline
        return pipeline is None or pipeline.is_last

    @property
    def present(self) -> list[bool]:
        """Which parameters have a gradient of this rank's."""
        sharded, present = self.sharded, self.gradients.present
        if sharded is None:
            return present
        # A shard is of all ranks' gradients; whether this one had any, only its own backward could see.
        held, pairs = sharded.held, zip(self.gradients.named, present, strict=True)
        return [sharded.used(p.parameter) if id(p.parameter) in held else has for p, has in pairs]

    @property
    def to_reduce(self) -> tuple[list[Tensor], list[torch.dtype]]:
        """The gradients that have not met those of the other ranks yet, and what they add up in."""
        held: set[int] = set() if self.sharded is None else self.sharded.held
        narrow = self.settings.reduce_dtype is None
        found = [
            (local_of(total), each.parameter.dtype if narrow else torch.promote_types(total.dtype, torch.float32))
            for each, total in self.gradients.gradients()
            if id(each.parameter) not in held
        ]
        return [total for total, _ in found], [dtype for _, dtype in found]


@dataclass(frozen=True, slots=True)
class End:
    """How a window ended; the fields are those of `Step`."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    grad_norm: Tensor
    count: float
    counts: Mapping[str, float]
    samples: int | float
    applied: bool


@dataclass(frozen=True, slots=True)
class _Pooled:
    """The window over all ranks: the loss's sums and counts by term, and the norm of what has added up."""

    names: Sequence[str]
    sums: Tensor  # on the device; the same numbers as on the host
    host_sums: Sequence[float]
    host_counts: Sequence[float]
    samples: float
    dtype: torch.dtype  # in which the loss is reported
    norm: Tensor
    host_norm: float
    normalised: bool  # whether the gradient has been divided by the count already
    present: Sequence[bool]

    @property
    def counts(self) -> dict[str, float]:
        return dict(zip(self.names, self.host_counts, strict=True))

    @property
    def contributed(self) -> bool:
        return any(self.host_counts)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.host_norm) and all(math.isfinite(number) for number in self.host_sums)


def get_ready(closing: Closing) -> Message | None:
    """Do what may fail while the other ranks can still be told.

    Args:
        closing: The window's parts.

    Returns:
        What this rank has to say; `None` for a single process.

    Raises:
        OutOfMemoryError: There is no memory to reduce the gradients in.
    """
    if closing.ranks is None and closing.stages is None:
        return None
    flat = closing.tally.totals(closing.settings.device).flatten().tolist()
    spoke = closing.tally.spoke
    if closing.early is not None:
        closing.early.reserve()
    elif closing.ranks is not None:
        totals, dtypes = closing.to_reduce
        reserve(totals, dtypes=dtypes, flat=closing.flat)
    return Message(
        names=closing.tally.names if spoke else [],
        sums=flat[0::2] if spoke else [],
        counts=flat[1::2] if spoke else [],
        samples=closing.samples if closing.speaks else 0,
        double=closing.tally.dtype == torch.float64,
        present=closing.present if closing.canonical is None else closing.canonical.present,
        steps=closing.progress.steps,
    )


def close(closing: Closing, message: Message | None) -> End:
    """Turn what has added up into one optimizer step.

    Args:
        closing: The window's parts.
        message: What `get_ready` returned.

    Returns:
        How it ended.

    Raises:
        EmptyWindowError: Nothing contributed.
        NonfiniteError: The loss or the gradient is not finite, and nobody asked to skip such windows.
        OutOfMemoryError: Memory ended inside the optimizer.
        RankError: Another rank failed; over several ranks.

    Cost:
        One pass that reads the gradients and one that writes them; one host synchronisation (two over several
        ranks); over several ranks one small all-reduce and one per bucket of gradients, and a second small one in a
        step that gives a parameter its first update.
    """
    ranks = closing.ranks
    if message is None:
        end = _take_step(closing, _pool(closing))
    else:
        pooled = _pool_ranks(closing, message)
        met = {index for index, present in enumerate(pooled.present) if present}
        # The optimizer makes state for those that it meets for the first time: memory that was never asked for before.
        new = ranks is not None and met - closing.progress.met
        with together(ranks, closing.settings.optimizers) if ranks and new else nullcontext():
            end = _take_step(closing, pooled)
        closing.progress.met.update(met if end.applied else ())
        closing.progress.steps += 1
    _tidy_up(closing)
    return end


def _take_step(closing: Closing, pooled: _Pooled) -> End:
    settings = closing.settings
    factor = closing.tally.factor(pooled.counts) if pooled.contributed and not pooled.normalised else 1.0
    applied = pooled.contributed and pooled.finite
    if applied:
        clip = clip_factor(pooled.host_norm * factor, settings.max_grad_norm)
        if not pooled.normalised:
            closing.gradients.settle(factor)
        closing.gradients.scale_(factor * clip)
    elif settings.nonfinite == "raise":
        _refuse(closing, pooled)
    if applied:
        _step(closing)
    else:
        closing.gradients.put_states_back()
    return _end(pooled, math.nan if any(settings.linear_states) else factor, applied=applied)


def _pool(closing: Closing) -> _Pooled:
    if closing.canonical is not None:
        names = sorted(closing.tally.names)
        double = closing.tally.dtype == torch.float64
        present = closing.canonical.present
        alone = Message(names=names, sums=[], counts=[], samples=closing.samples, double=double, present=present)
        return _pool_in_order(closing, closing.canonical, alone)
    device = closing.settings.device
    table = closing.tally.totals(device)
    closing.gradients.drop(closing.gradients.present)
    norm = _norm(closing, device)
    # The one host synchronisation of the window: everything that the host has to decide on, in one copy.
    *flat, host_norm = torch.cat([table.flatten(), norm.to(table.dtype).reshape(1)]).tolist()
    return _Pooled(
        names=closing.tally.names,
        sums=table[:, 0],
        host_sums=flat[0::2],
        host_counts=flat[1::2],
        samples=closing.samples,
        dtype=closing.tally.dtype,
        norm=norm,
        host_norm=host_norm,
        normalised=False,
        present=[],
    )


def _pool_ranks(closing: Closing, message: Message) -> _Pooled:
    if closing.early is not None:
        agreed = closing.early.finish()
        return _agreed(closing, agreed, agreed.sums, counts=agreed.counts)
    gradients, ranks, agreed = closing.gradients, closing.ranks, _agree(closing, message)
    if closing.canonical is not None:
        return _pool_in_order(closing, closing.canonical, agreed)
    counts = dict(zip(agreed.names, agreed.counts, strict=True))
    factor = closing.tally.factor(counts) if any(agreed.counts) else 1.0
    gradients.fill(agreed.present)
    gradients.settle(factor)
    if closing.sharded is not None:
        gradients.leave_out(agreed.present)
        held = closing.sharded.held
        scale_([total for each, total in gradients.gradients() if id(each.parameter) in held], factor)
    if ranks is None:
        gradients.scale_(factor)
    else:
        totals, dtypes = closing.to_reduce
        reduce_(ranks, totals, factor, dtypes=dtypes, flat=closing.flat)
    return _agreed(closing, agreed, agreed.sums, counts=agreed.counts)


def _agree(closing: Closing, message: Message) -> Message:
    parameters = len(message.present)
    if closing.stages is not None:
        return closing.stages.agree(message, parameters=parameters)
    return message if closing.ranks is None else agree(closing.ranks, message, parameters=parameters)


def _pool_in_order(closing: Closing, canonical: Canonical, agreed: Message) -> _Pooled:
    """Pool so that no bit depends on the ranks, of which there may be one."""
    tally = closing.tally
    host_sums, host_counts = canonical.sums(tally, agreed.names)
    known = tally.spoke and any(host_counts)
    factor = canonical.factor(tally.factor(dict(zip(agreed.names, host_counts, strict=True))) if known else 0.0)
    canonical.finish(agreed.present)
    closing.gradients.scale_(factor)
    return _agreed(closing, agreed, host_sums, counts=host_counts)


def _agreed(closing: Closing, agreed: Message, sums: Sequence[float], *, counts: Sequence[float]) -> _Pooled:
    """Put together what is known once the ranks have agreed and the gradients are the mean's."""
    device = closing.settings.device
    norm = _norm(closing, device)
    return _Pooled(
        names=agreed.names,
        sums=torch.tensor(sums, dtype=wide_dtype(device), device=device),
        host_sums=sums,
        host_counts=counts,
        samples=agreed.samples,
        dtype=torch.float64 if agreed.double else torch.float32,
        norm=norm,
        host_norm=norm.item(),
        normalised=True,
        present=agreed.present,
    )


def _norm(closing: Closing, device: torch.device) -> Tensor:
    closing.gradients.coalesce()
    scaler = closing.settings.grad_scaler
    if scaler is not None:
        for optimizer in closing.settings.optimizers:
            scaler.unscale_(optimizer)
    norm = gradient_norm([gradient for _, gradient in closing.gradients.gradients()], device)
    return norm if closing.stages is None else closing.stages.norm(norm)


def _refuse(closing: Closing, pooled: _Pooled) -> None:
    """Say what is wrong with a window that cannot be applied."""
    if not pooled.contributed:
        raise EmptyWindowError(
            "no microbatch of this window contributed to the loss (every count was 0), so its mean does not exist; "
            'pass nonfinite="skip" to drop such windows'
        )
    if closing.settings.grad_scaler is None:  # which finds its scale by overflowing
        raise NonfiniteError(
            microbatch=closing.tally.first_nonfinite(), parameter=first_nonfinite(closing.gradients.gradients())
        )


def _step(closing: Closing) -> None:
    scaler = closing.settings.grad_scaler
    closing.gradients.hand_over()
    for optimizer in closing.settings.optimizers:
        step = optimizer.step if scaler is None else partial(scaler.step, optimizer)
        apply(optimizer, partial(closing.gradients.step, optimizer, step), device=closing.settings.device)


def _tidy_up(closing: Closing) -> None:
    scaler = closing.settings.grad_scaler
    if scaler is not None:
        scaler.update()
    closing.gradients.clear()
    for optimizer in closing.settings.optimizers:
        optimizer.zero_grad()


def _end(pooled: _Pooled, factor: float, *, applied: bool) -> End:
    counts = torch.tensor(pooled.host_counts, dtype=pooled.sums.dtype, device=pooled.sums.device)
    means = torch.where(counts > 0, pooled.sums / counts, 0.0).to(pooled.dtype)
    whole = {name: int(count) if count.is_integer() else count for name, count in pooled.counts.items()}
    several = list(pooled.names) != ["loss"]
    return End(
        loss=means.sum(),
        terms=dict(zip(pooled.names, means, strict=True)) if several else {},
        grad_norm=pooled.norm * factor,
        count=next(iter(whole.values()), 0),
        counts=whole if several else {},
        samples=int(pooled.samples) if float(pooled.samples).is_integer() else pooled.samples,
        applied=applied,
    )
