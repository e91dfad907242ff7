"""Is the accumulated gradient the large batch's? On the user's own model, data and loss, leaving all of it alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from microbatch.arguments import check_callable, is_text
from microbatch.batch.batch_tree import rows_of, take_rows
from microbatch.batch.cut import check_microbatch_size, cut
from microbatch.batch.layouts import doubtful_numbers, modules_with_time_first, other_layout
from microbatch.checking.accumulating import LENGTHS, with_possible_cut
from microbatch.checking.causes import DIVIDED, PRECISION, REMEDIES, Causes, Subject, Suspect, error, find_causes
from microbatch.checking.check_copies import Given
from microbatch.checking.check_progress import CheckProgress
from microbatch.checking.check_report import Cause, Check, ParameterError
from microbatch.checking.gradient import Gradient, difference, norm, relative_error
from microbatch.checking.trial_runs import RANDOMNESS, REMEDIED, STATISTICS, Play, Stage
from microbatch.checking.user_loop import Looping
from microbatch.devices.backend import wide_dtype
from microbatch.errors import ConfigError, EmptyBatchError, OutOfMemoryError
from microbatch.kind_words import kind_of
from microbatch.memory.budget import available_bytes, parse_bytes
from microbatch.memory.meter import MemoryMeter
from microbatch.memory.out_of_memory import is_out_of_memory, let_go
from microbatch.memory.signal_errors import is_from_signal
from microbatch.step.options import Sums
from microbatch.step.saved_state import Snapshot

EXACT = 1e-9
"""Relative error in float64 that rounding may make in a deep network, and that no cause worth naming stays below."""

_MANY_DRAWS = 16
_OTHER_DRAWS = 8
_WITHOUT = frozenset({"listeners", "nonfinite"})
"""Arguments of the accumulator that a gradient by itself knows nothing of."""


def check(  # noqa: PLR0913 - each is one thing that a user may want to say, by name
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: Any,
    *,
    microbatch_size: int | None = None,
    encode: Callable[..., Any] | None = None,
    counts: Any = None,
    loop: Callable[..., Any] | None = None,
    optimizer: Any = None,
    memory_budget: int | str | None = None,
    progress: Callable[[str, float], object] | None = None,
    **options: Any,
) -> Check:
    """Check that accumulating gives the large batch's gradient, and if it does not, find out why.

    The yardstick is the whole batch's gradient in float64, by one backward of plain PyTorch. The accumulated gradient
    is equal to rounding when its error is at most the whole batch's own in the precision that is trained in, and one
    rounding unit of what is added up. If it is not, batch statistics, random numbers, state, counts, coupling, places
    and precision are switched off one at a time, to see which of them make the error, and how much of it.

    Everything runs on copies: weights, gradients, optimizer, buffers and random state stay as they are.

    Args:
        model: The module, in the mode it is to be checked in.
        loss_fn: As for `Accumulator.step`.
        batch: The whole batch, as for `Accumulator.step`; fewer of its rows are taken where it does not fit at once.
        microbatch_size: Rows of a microbatch; `None` for a quarter of the batch.
        encode: As for `Accumulator.step`.
        counts: As for `Accumulator.step`.
        loop: A loop of your own to check in the accumulator's place: ``loop(model, optimizer, batch)`` takes one
            optimizer step on a batch, which it cuts itself. ``loss_fn`` says what it should minimise.
        optimizer: What the loop is given.
        memory_budget: Bytes, or a text such as ``"6 GiB"``, that the check may use beside what is in use; `None` for
            what the device has.
        progress: Called with what is being done, and how much of the check is done, from 0 to 1, as an estimate.
        options: Other arguments of the `Accumulator`, such as ``autocast``, ``sums`` or ``lengths``.

    Returns:
        What was found; print it, or read ``ok`` and ``causes``.

    Raises:
        ConfigError: An argument cannot work, something cannot be copied, or this process is one of several ranks.
        CheckError: The whole batch has no gradient to compare with, or the loop took no step.
        BatchError: The batch cannot be cut, or has fewer than two rows.
        OutOfMemoryError: Not even two rows fit at once.

    Cost:
        Copies of the model, in float64 too; four to six passes over the batch where all is well, some forty where the
        causes have to be found.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> batch = {"x": torch.arange(18.0).reshape(6, 3), "mask": torch.tensor([1.0, 1, 1, 1, 0, 1])}
        >>> def masked_mean(model, batch):
        ...     return (model(batch["x"]).square().squeeze(1) * batch["mask"]).sum() / batch["mask"].sum()
        >>> found = check(model, masked_mean, batch, microbatch_size=3)
        >>> found.ok, [cause.kind for cause in found.causes]
        (False, ['counts'])
    """
    given = _given(model, loss_fn, batch, encode=encode, loop=loop, optimizer=optimizer)
    given = replace(given, progress=CheckProgress(progress))
    size = max(1, rows_of(batch) // 4) if microbatch_size is None else microbatch_size
    size = check_microbatch_size(size)
    options = {name: value for name, value in options.items() if name not in _WITHOUT}
    if isinstance(options.get("sums"), Sums):  # a gradient inside the optimizer's state cannot be compared
        options["sums"] = replace(options["sums"], buffer="own")
    snapshot = Snapshot(given.bare_model, given.device)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        bench = _Bench(given, size=size, budget=memory_budget, options=options)
        return bench.check(counts=counts)
    finally:
        # What the copies cannot keep away: a function that reaches the user's own model by another way.
        snapshot.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _given(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: Any,
    *,
    encode: Callable[..., Any] | None,
    loop: Callable[..., Any] | None,
    optimizer: Any,
) -> Given:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, not {kind_of(model)}")
    check_callable("loss_fn", loss_fn, "loss_fn(model, microbatch)")
    if encode is not None:
        check_callable("encode", encode, "encode(model, microbatch)")
    if (loop is None) != (optimizer is None):
        raise ConfigError("pass loop= and optimizer= together: a loop is called as loop(model, optimizer, batch)")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            "check runs in one process, and this is one of several ranks; run it without torchrun, on one rank's share"
        )
    rows = rows_of(batch)
    if rows < 2:
        raise EmptyBatchError(f"the batch has {rows} rows, and it takes two to accumulate anything")
    return Given(model=model, loss_fn=loss_fn, batch=batch, encode=encode, loop=loop, optimizer=optimizer)


class _Bench:
    """The stages in both precisions, and what is compared on them."""

    def __init__(self, given: Given, *, size: int, budget: int | str | None, options: Mapping[str, Any]) -> None:
        layout = other_layout(given.batch, time_first=modules_with_time_first(given.bare_model), thorough=True)
        self.notes = [text for text in (layout, doubtful_numbers(given.batch)) if text]
        self.options = options
        self._budget = None if budget is None or is_text(budget, "none") else parse_bytes(budget)
        self.given = given
        self.wide = self._widest()
        self.own = self._stage(None)
        if self.wide.dtype is not None and torch.finfo(self.wide.unit).eps > torch.finfo(torch.float32).eps:
            self.notes.append(
                f"the model computes in {_named(self.wide.unit)} by itself, so the yardstick is the full batch's "
                "gradient in its own precision"
            )
            self.wide = self.own
        if self.wide.dtype is None or self.own.unit is torch.float64:
            self.own = self.wide
        self.size = self._size(size)

    # -- what fits ----------------------------------------------------------------------------------------------------

    def _stage(self, dtype: torch.dtype | None) -> Stage:
        right = {"batch_norm": "exact", "dropout": "by_row"}
        taken = frozenset(cause for cause, name in REMEDIED.items() if self.options.get(name) == right[name])
        remedied = taken if self.given.loop is None else frozenset[str]()
        return Stage(self.given, dtype=dtype, autocast=self.options.get("autocast"), remedied=remedied)

    def _widest(self) -> Stage:
        """Make the stage for the yardstick: float64 where the model can, on as many rows as fit."""
        wide = torch.float64 if wide_dtype(self.given.device) is torch.float64 else None
        rows = rows_of(self.given.batch)
        fitting = rows
        while True:
            stage = self._stage(wide)
            failure = self._fails(stage)
            if failure is None:
                break
            if not is_out_of_memory(failure):
                if wide is None:
                    raise failure
                first = str(failure).partition("\n")[0]
                self.notes.append(
                    f"the model cannot run in float64 ({type(failure).__name__}: {first}), so the yardstick is the "
                    "full batch's gradient in its own precision"
                )
                wide = None
                continue
            let_go(failure, self.given.device)
            if fitting <= 2:
                raise OutOfMemoryError(
                    f"not even two rows fit at once, in {wide or 'their own precision'}, beside copies of the model: "
                    f"{failure}"
                )
            fitting = max(2, fitting // 2)
            fewer = take_rows(self.given.batch, range(fitting), rows=rows_of(self.given.batch), marked=True)
            self.given = replace(self.given, batch=fewer)
        if fitting < rows:
            self.notes.append(f"{fitting} of the {rows} rows were compared, as many as fit at once")
        return stage

    def _fails(self, stage: Stage) -> Exception | None:
        """Take the whole batch's gradient, and return what went wrong."""
        budget = self._budget
        if budget is None and self.given.device.type == "cpu":  # where nothing else refuses
            budget = available_bytes(self.given.device)
        try:
            with nullcontext() if budget is None else MemoryMeter(budget=budget):
                stage.whole()
        except Exception as error:
            if is_from_signal(error):
                raise
            return error  # whatever a model does that float64 cannot
        return None

    def _size(self, size: int) -> int:
        rows = rows_of(self.given.batch)
        if size < rows:
            return size
        size = -(-rows // 2)
        self.notes.append(f"microbatches of {size} rows were used: one microbatch with the whole batch shows nothing")
        return size

    # -- the comparison -----------------------------------------------------------------------------------------------

    def check(self, *, counts: Any) -> Check:
        rows, looping = rows_of(self.given.batch), None
        step = {} if counts is None else {"counts": counts}
        if self.given.loop is not None:
            subject, refused = (looping := Looping(self.wide, rows=rows)), list[Cause]()
        else:
            subject, refused = with_possible_cut(self.wide, size=self.size, options=self.options, step=step)
        self.size = subject.size or self.size
        limit = self._limit_of_exactness()
        everything = frozenset[str]()
        exact, found = self._is_exact(subject, limit), Causes((), everything, 0.0)
        if not exact:
            self.given.progress.search()
            more = self._options_suspected() if looping is None else looping.suspects()
            found = find_causes(self.wide, subject, limit=limit, more=more)
        # In another precision other random numbers are drawn, so what rounding makes is looked at without them.
        off = found.off | ({RANDOMNESS} if self.own.survey().random else everything)
        rounding = self._rounding(subject, off, limit=limit)
        causes = refused + list(found.causes)
        if rounding.error > rounding.limit:
            causes.append(self._imprecise(rounding.error, subject))
        if looping is None:
            causes += self._divided(subject)
        else:
            causes += looping.others()
            self.notes += [looping.refused] if looping.refused else []
        stage, shown = (self.own, off) if exact else (self.wide, everything)
        gradient, yardstick = subject.gradient(stage, shown), self.wide.whole(shown)
        return Check(
            relative_error=relative_error(gradient, yardstick),
            rounding=rounding.own,
            limit=rounding.limit,
            equal=exact and rounding.error <= rounding.limit,
            precision=_named(self.own.unit),
            yardstick=_named(self.wide.unit),
            rows=rows,
            microbatch_size=subject.size,
            microbatches=-(-rows // subject.size),
            causes=tuple(causes),
            parameters=_by_parameter(gradient, yardstick, own=difference(self.own.whole(off), self.wide.whole(off))),
            notes=tuple(self.notes),
        )

    def _is_exact(self, subject: Subject, limit: float) -> bool:
        """Compare once; where random numbers are drawn, from several random states, since one may be luck."""
        everything, random = frozenset[str](), self.wide.survey().random
        while error(self.wide, subject, everything) <= limit:
            if not random or self.wide.draw == _OTHER_DRAWS:
                if random:
                    self.notes.append(
                        f"random numbers are drawn (in {', '.join(random[:4])}), and made no difference from "
                        f"{_OTHER_DRAWS + 1} random states; they may make one from another"
                    )
                return True
            self.wide.redraw()
        return False

    def _divided(self, subject: Subject) -> list[Cause]:
        """Name a division by the number of microbatches, which only a loop of one's own needs."""
        # The whole batch's loss has this division too, so no gradient differs.
        found: list[Cause] = []
        rows = self.wide.rows
        microbatches, divisors = -(-rows // subject.size), self.wide.survey().divisors
        fewer = self.wide.survey(range(rows - 1)).divisors if divisors and rows > 2 else {}
        for term, divisor in divisors.items():
            if fewer.get(term) != divisor:  # then it is a count
                continue
            if divisor == microbatches:
                words = (
                    f"the last operation of the loss divides it by {divisor:g}, which is the number of microbatches; "
                    "the accumulator has divided by the count already, so the gradient is that many times too small"
                )
                found.append(Cause(kind=DIVIDED, words=words, where=(term or "the loss",), remedy=REMEDIES[DIVIDED]))
            elif divisor > 1 and divisor.is_integer():
                self.notes.append(
                    f"the last operation of the loss divides it by {divisor:g}; if that is the number of microbatches "
                    "in training, leave it out, because the accumulator divides by the count of the whole batch"
                )
        return found

    def _rounding(self, subject: Subject, off: frozenset[str], *, limit: float) -> _Rounding:
        """Compare what rounding makes of the accumulated gradient with what it makes of the whole batch's."""
        whole = self.wide.whole(off)
        if self.own is self.wide:
            return _Rounding(0.0, 0.0 if self.own.unit is torch.float64 else self.own.rounding(off, whole), limit)
        precise = relative_error(subject.gradient(self.own, off), subject.gradient(self.wide, off))
        own, unit = relative_error(self.own.whole(off), whole), torch.finfo(self.own.unit).eps
        if precise > own + unit:  # then what is added up may be larger than its sum
            unit = self._unit(off)
        if precise > own + unit:  # then the whole batch may be as sensitive, and one run of it has not shown that
            own = self.own.rounding(off, whole)
        if precise > own + unit:  # then a few runs may have been lucky
            own = self.own.rounding(off, whole, draws=_MANY_DRAWS)
        return _Rounding(precise, own, own + unit)

    def _limit_of_exactness(self) -> float:
        """Say which error is none where everything is as precise as it can be."""
        off, narrowest = frozenset[str](), self.wide.unit
        if self.wide is self.own and narrowest is not torch.float64:
            return self.wide.rounding(off, self.wide.whole(off)) + self._unit(off)
        if narrowest is torch.float64:
            return EXACT
        self.notes.append(f"the model itself computes in {_named(narrowest)}, so smaller errors cannot be seen")
        return max(EXACT, 64 * torch.finfo(narrowest).eps)

    def _unit(self, off: frozenset[str]) -> float:
        """Return a rounding unit of what is added up: where microbatches cancel, it is larger than their sum's."""
        # At fixed statistics, because one microbatch alone may be too few rows for a normalisation.
        lengths = self.wide.play(self._lengths, off=off | {STATISTICS})
        cancellation = mean(lengths) / norm(self.wide.whole(off)) if lengths else 1.0
        return torch.finfo(self.own.unit).eps * max(1.0, cancellation)

    def _lengths(self, play: Play) -> list[float]:
        found = [norm(play.slope(piece)) for piece in cut(play.replica.given.batch, self.size)]
        return [each for each in found if math.isfinite(each)]

    def _imprecise(self, precise: float, subject: Subject) -> Cause:
        return Cause(
            kind=PRECISION,
            words=f"adding up in low precision loses what the whole batch in {_named(self.own.unit)} keeps",
            alone=precise,
            without=error(self.wide, subject, frozenset()),
            remedy=REMEDIES[PRECISION],
        )

    def _options_suspected(self) -> list[Suspect]:
        if self.options.get("lengths") is None:
            return []
        return [Suspect(kind=LENGTHS, words="trimming rows to the longest of their microbatch changes what they give")]


@dataclass(frozen=True, slots=True)
class _Rounding:
    """Hold what rounding makes of the accumulated gradient, of the whole batch's, and what the first may be at most."""

    error: float
    own: float
    limit: float


def _by_parameter(gradient: Gradient, yardstick: Gradient, *, own: Gradient) -> tuple[ParameterError, ...]:
    """Compare every parameter; one whose gradient is 0, but for rounding, with the largest of them."""
    off, largest = difference(gradient, yardstick), max(norm({"": each}) for each in yardstick.values())
    found: list[ParameterError] = []
    for name, each in off.items():
        size = max(norm({"": yardstick[name]}) if name in yardstick else 0.0, 1e-6 * largest)
        wrong = norm({"": each}) / size
        rounded = norm({"": own[name]}) / size if name in own else 0.0
        wrong = wrong if math.isfinite(wrong) else math.inf
        found.append(ParameterError(name=name, relative_error=wrong, rounding=rounded))
    return tuple(sorted(found, key=lambda each: -each.relative_error))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
