"""Run the window of a batch again after it runs out of memory, each time in a way that takes less memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from microbatch.errors import MicrobatchError, NonfiniteError, OutOfMemoryError, RankAgainError
from microbatch.gradients.clipping import first_nonfinite
from microbatch.memory.out_of_memory import explained, is_out_of_memory, let_go
from microbatch.step.cutting import Cut
from microbatch.step.denominator import Counts
from microbatch.step.events import Retry, SizeChanged
from microbatch.step.part import Function, OpenWindow
from microbatch.step.setup import Attempt, Setup
from microbatch.step.size.coupled_way import CoupledWay
from microbatch.step.size.microbatch_size import MicrobatchSize
from microbatch.step.window import Window


@dataclass(frozen=True, slots=True)
class Policies:
    """The choices that change between windows: the microbatch size, and how coupled batches are encoded."""

    size: MicrobatchSize
    way: CoupledWay


class ByHand(Attempt):
    """The policy for a hand-written loop, which runs its batch again itself: the next window is cut smaller."""

    def __init__(self, policies: Policies) -> None:
        self._policies = policies

    def failed(self, window: OpenWindow, error: BaseException) -> bool:
        """Halve the microbatch size after memory ran out, and add a note to the error; return False."""
        if not is_out_of_memory(error):
            return False
        if _relieves_graphs(window) and not _is_late(window):
            error.add_note(
                "microbatch: everything is as before the window, which kept the graphs of all its microbatches; "
                "without keep=True window.encode(batch, encode) encodes them twice instead"
            )
            return False
        changed = self._policies.size.shrink(_cut_to_blame(window, self._policies))
        if changed is not None:
            before, after = changed
            error.add_note(
                f"microbatch: everything is as before the window. The next one cuts into microbatches of {after} rows "
                f"instead of {before}: run the same batch again. accumulator.step(batch, loss_fn) does this itself."
            )
            reason = "memory ran out in a window that only its own loop can run again"
            step = window.setup.history.windows
            window.options.emit(SizeChanged(step=step, before=before, after=after, reason=reason))
        return False


class Attempts(Attempt):
    """Run the window of a batch until it succeeds, or until nothing is left that takes less memory.

    After memory runs out, the first of these that applies is changed for the next attempt:

    - encode a coupled batch twice instead of keeping its graphs;
    - reduce sharded gradients after every microbatch instead of once;
    - halve the microbatch size.

    Args:
        setup: Creates the setup of each window.
        policies: The choices that change between windows.
        run: Runs the batch through an open window.
        counts: As for `Accumulator.step`.

    Attributes:
        started: Start of the first attempt, from `time.perf_counter`; `None` before it.
        retries: Number of attempts before the current one.
        twice: Whether a coupled batch must be encoded twice.
        window: The window of the last attempt; `None` before the first.

    Source:
        Laws M1 to M6, R7.
    """

    def __init__(
        self, setup: Callable[[], Setup], policies: Policies, run: Callable[[Window], object], counts: Counts | None
    ) -> None:
        self._setup, self._policies, self._run, self._counts = setup, policies, run, counts
        self._relief: Retry | None = None
        self.window: Window | None = None

    def step(self) -> Window:
        """Run windows until one succeeds, and return it closed; or raise `OutOfMemoryError`."""
        while True:
            self.window = window = Window(self._setup(), attempt=self, counts=self._counts)
            failure = self._attempt(window)
            if failure is None:
                return window
            if self._relief is not None:
                window.options.emit(self._relief)
            # Outside the `except` block, nothing else refers to the error, so its tensors can be freed.
            let_go(failure, window.device)
            del failure
            self.retries += 1

    def _attempt(self, window: Window) -> Exception | None:
        self._relief = None
        self.started = self.started or time.perf_counter()
        try:
            window.enclose(self._run)
        except Exception as error:
            if self._relief is not None:
                return error
            told = window.stepped and isinstance(error, MicrobatchError)
            if not is_out_of_memory(error) or told or (window.record is not None and not window.stepped):
                raise
            if window.stepped:
                raise OutOfMemoryError(
                    "out of memory after the optimizer had begun its step: weights may be partly updated, so continue "
                    f"from a checkpoint. The original error: {error}"
                ) from error
            raise self._explained(window, error) from error
        return None

    def failed(self, window: OpenWindow, error: BaseException) -> bool:
        """Decide whether the batch runs again, and change the size or the way of encoding for that."""
        policies, coupled = self._policies, window.coupled
        cut = policies.size.cut_of
        before = after = 0 if cut is None else cut.rows
        in_vain = coupled is not None and coupled.kept_in_vain(error)
        if is_out_of_memory(error):
            rows = policies.size.sizing.rows if cut is not None else 0
            if _relieves_graphs(window) and not _is_late(window):
                before = after = rows
                in_vain = coupled is not None and coupled.keeps
            else:
                changed = policies.size.shrink(_cut_to_blame(window, policies))
                if changed is None:
                    return False
                before, after = changed
        elif not in_vain and not isinstance(error, RankAgainError):
            if self.retries:
                error.add_note(
                    "microbatch: memory had run out in this window, so that it was being run again, in microbatches of "
                    f"{policies.size.sizing.rows} rows"
                )
            return False
        if in_vain and coupled is not None:
            self.twice = True
            policies.way.too_much(coupled.own)
        done = len(window.done)
        self._relief = Retry(
            step=window.setup.history.windows, index=done, before=before, after=after, error=str(error)
        )
        return True

    def give_up(self) -> None:
        """Do not run the batch again, because another rank has given up."""
        self._relief = None

    def _explained(self, window: Window, error: Exception) -> Exception:
        cut = self._policies.size.cut_of
        one = cut is not None and cut.rows == 1
        limit = "with a microbatch of 1 row, the smallest there is" if one else "where a smaller microbatch cannot help"
        if window.coupled is not None and window.coupled.waiting:
            limit = (
                "in the loss over the whole batch's representations, where a smaller microbatch cannot help (the "
                "losses of mb.losses never hold a whole similarity matrix)"
            )
        return explained(error, model=window.options.model, device=window.device, limit=limit)


def locate(
    window: Window, setup: Setup, *, batch: object, function: Function, counts: Counts | None, error: NonfiniteError
) -> NonfiniteError:
    """Find the microbatch whose gradient is not finite, by running the window again."""
    together = window.options.pipeline is not None or (window.passes.keeps and window.coupled is None)
    if error.microbatch is not None or window.peers.size > 1 or together:
        return error
    if window.coupled is not None:
        return NonfiniteError(microbatch=window.coupled.first_nonfinite(), parameter=error.parameter)
    found: int | None = None
    # All losses were finite, or the window would have named a microbatch; so the gradients are checked.
    again = Window(setup, attempt=Attempt(), counts=counts)
    with suppress(_LeaveWithoutStep), again:
        for index, microbatch in enumerate(again.split(batch)):
            again.backward(function(again.model, microbatch))
            if first_nonfinite(again.gradients.held()) is not None:
                found = index
                break
        raise _LeaveWithoutStep
    return NonfiniteError(microbatch=found, parameter=error.parameter)


class _LeaveWithoutStep(Exception):  # noqa: N818 - not an error: the only way to leave a window without a step
    pass


def _is_late(window: OpenWindow) -> bool:
    """Return whether the window cannot run again: the step has begun, the ranks have agreed, or bits would change."""
    return window.stepped or window.peers.late(window) or not all(part.repeatable for part in window.setup.parts)


def _relieves_graphs(window: OpenWindow) -> bool:
    """Return whether the next attempt takes less memory at the same microbatch size."""
    kept = window.coupled is not None and window.coupled.keeps
    return window.peers.relieve() or kept


def _cut_to_blame(window: OpenWindow, policies: Policies) -> Cut | None:
    """Return how the batch was cut, or `None` if a smaller microbatch cannot help."""
    # The loss of all representations takes the same memory at any microbatch size.
    waiting = window.coupled is not None and window.coupled.waiting
    return None if waiting or _is_late(window) else policies.size.cut_of
