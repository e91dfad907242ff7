"""Run several forward passes in turns, on fibers that wait for each other at every sync point.

A sync point is a place in the forward pass, such as a batch normalisation. Every microbatch contributes a value there,
such as its statistics, and gets the merged result.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from microbatch.errors import BatchStatisticsError
from microbatch.loss.backward_order import Order
from microbatch.loss.fibers import Fiber, make_fiber
from microbatch.loss.waiting_tensors import TryOffload, WaitingTensors, has_offloaded

Task: TypeAlias = Callable[[], Any]
ContextFactory: TypeAlias = Callable[[], AbstractContextManager[object]]
Offload: TypeAlias = Callable[[Tensor], Callable[[], Tensor]]
"""Offloads a tensor, and returns a function that loads it."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a torch function."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self) -> Any:
        """Call the function with these arguments."""
        return self.func(*self.args, **self.kwargs)


Rule: TypeAlias = Callable[[Any, Call], Any]
"""Called with a microbatch's `Seat` and a call, in place of the function."""
Rules: TypeAlias = Mapping[Any, Rule]
"""By function of torch, the rule that replaces it."""


@dataclass(frozen=True, slots=True)
class Puts:
    """Functions that offload tensors while they wait.

    Attributes:
        away: Offloads a tensor until backward.
        aside: Offloads a tensor only until the other microbatches have run.
        spares: Returns whether a loaded tensor may stay in memory until it is used once more.
        park: Offloads a tensor that a waiting microbatch holds, or returns `None` and leaves it.
        resized: Called with every storage whose memory was freed or allocated again.
    """

    away: Offload
    aside: Offload
    spares: Callable[[Tensor], bool]
    park: TryOffload
    resized: Callable[[UntypedStorage], None]


@dataclass(frozen=True, slots=True)
class SyncPoint:
    """A point at which all microbatches contribute to one result; the points of all microbatches must be equal.

    Attributes:
        what: Name of the result, for example ``"batch_norm"``.
        place: Where the user finds it: the name of a layer, or a line of a file.
        merge: Computes the result from the contributions of all microbatches, in the batch's order. Not compared.
    """

    what: str
    place: str
    merge: Callable[[Sequence[Any]], Any] = field(compare=False)

    def __str__(self) -> str:
        return f"{self.what} at {self.place}"


class Lockstep:
    """Run forward passes in lockstep: each on its own fiber, one at a time, from sync point to sync point.

    A pass runs until its next sync point and waits there. When all passes have arrived, their contributions are merged
    in one node of the graph, and each pass continues with the result. Autograd then orders one backward over all passes
    by itself: the gradient of a merged result waits for the gradients of all passes.

    The fibers are kept for the next call.
    """

    def __init__(self) -> None:
        self._fibers: list[Fiber] = []
        weakref.finalize(self, _close_fibers, self._fibers)

    def run(
        self,
        tasks: Sequence[Task],
        *,
        device: torch.device,
        rules: Rules,
        around: ContextFactory,
        puts: Puts,
    ) -> list[Any]:
        """Run tasks in turns, from one sync point to the next.

        Args:
            tasks: One task per microbatch; at least one.
            device: The model's device.
            rules: Functions that replace functions of torch inside the tasks.
            around: Creates the context manager in which each task runs, on the task's thread.
            puts: Functions that offload tensors while they wait.

        Returns:
            The results of the tasks, in order.

        Raises:
            BatchStatisticsError: The tasks do not have the same sync points in the same order, or a task uses a tensor
                of another task.

        Cost:
            Two switches between fibers for each task and sync point, 40 to 100 microseconds.
        """
        self._fibers += [make_fiber(device) for _ in range(len(tasks) - len(self._fibers))]
        order = Order()
        seats = [
            Seat(index, fiber=each, order=order, puts=puts)
            for index, each in zip(range(len(tasks)), self._fibers, strict=False)
        ]
        for seat, task in zip(seats, tasks, strict=True):
            seat.start(task, rules=rules, around=around)
        try:
            _run_turns(seats, order)
        except BaseException:
            for seat in seats:
                seat.cancel()
            raise
        return [seat.value for seat in seats]


class Seat:
    """One microbatch of a lockstep.

    Attributes:
        index: Index of the microbatch, from 0.
        puts: Functions that offload tensors while they wait.
        calls: Counters of rules for this microbatch, by any key.
        value: Result of the task.
        waiting: The tensors that this microbatch holds while it waits.
        sync_point: The sync point that the microbatch waits at, or `None`.
        contribution: The microbatch's contribution to the sync point.
        result: Result of the sync point.
        grad: Whether grad mode was on at the sync point.
        ended: Whether the task has ended.
        runs_next: Whether this microbatch also has the next turn, so that its tensors stay in memory.
    """

    def __init__(self, index: int, *, fiber: Fiber, order: Order, puts: Puts) -> None:
        self.index, self.puts = index, puts
        self.waiting = WaitingTensors(puts.park, puts.resized)
        self.calls: dict[Any, int] = {}
        self.value: Any = None
        self.sync_point: SyncPoint | None = None
        self.contribution: Any = None
        self.result: Any = None
        self.grad = True
        self.ended = self.runs_next = False
        self._fiber, self._order = fiber, order
        self._error: BaseException | None = None
        self._cancelled = False

    # -- called on the microbatch's fiber -----------------------------------------------------------------------------

    def sync(self, sync_point: SyncPoint, contribution: Any, *, graph: Sequence[Tensor]) -> Any:
        """Wait at a sync point for all other microbatches, and return the merged result.

        Args:
            sync_point: The sync point.
            contribution: This microbatch's contribution.
            graph: The tensors in the contribution that have a graph.

        Returns:
            The result, the same for all microbatches.

        Raises:
            BatchStatisticsError: The sync point is inside a checkpoint, or the microbatch has used a tensor of another
                one.
        """
        self._check_cancelled()
        _refuse_checkpoints(sync_point)
        self._check_owner(graph, sync_point.place)
        self.sync_point, self.contribution, self.grad = sync_point, contribution, torch.is_grad_enabled()
        del contribution, graph
        if not self.runs_next:
            self.waiting.offload()
        self._fiber.pause()
        self.waiting.restore()
        self._check_cancelled()
        result, self.result, self.sync_point = self.result, None, None
        return result

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise _CancelledError

    def _check_owner(self, graph: Sequence[Tensor], place: str) -> None:
        other_owner = self._order.stamp(graph, self.index)
        if other_owner is not None:
            raise _shared_tensor_error(self.index, f"microbatch {other_owner}", place)

    def _run_task(self, task: Task, *, rules: Rules, around: ContextFactory) -> None:
        try:
            self._check_cancelled()
            with around(), _RulesMode(self, rules):
                self.value = task()
            self._check_owner(_tensors_with_graph(self.value), "the end")
        except _CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001 - `run_turn` raises it on the caller's fiber
            self._error = error
        finally:
            self.ended = True

    # -- called by `Lockstep` -----------------------------------------------------------------------------------------

    def start(self, task: Task, *, rules: Rules, around: ContextFactory) -> None:
        """Assign the task to the fiber; the task does not run before the first `run_turn`."""
        self._fiber.assign(partial(self._run_task, task, rules=rules, around=around))

    def run_turn(self) -> None:
        """Run the microbatch until it waits or ends, and raise its error, if any."""
        self._fiber.resume()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def cancel(self) -> None:
        """End the task at its current sync point."""
        self._cancelled = True
        self.contribution = self.result = self.value = None
        while not self.ended:
            self._fiber.resume()
        self._error = None


def _run_turns(seats: Sequence[Seat], order: Order) -> None:
    running_order = list(seats)
    while True:
        for seat in running_order:
            seat.runs_next = seat is running_order[-1]
            seat.run_turn()
        if all(seat.ended for seat in seats):
            return
        _check_same_point(seats)
        sync_point = seats[-1].sync_point  # of the last, whose module has the model's own buffers
        assert sync_point is not None  # noqa: S101 - _check_same_point has just checked this
        with torch.set_grad_enabled(any(seat.grad for seat in seats)):
            result = sync_point.merge([seat.contribution for seat in seats])
        order.stamp(_tensors_with_graph(result), None)
        for seat in seats:
            seat.contribution, seat.result = None, result
        del result
        # The last microbatch to arrive continues first, because its tensors are still in memory.
        running_order.reverse()


def _check_same_point(seats: Sequence[Seat]) -> None:
    first = seats[0]
    for seat in seats:
        if seat.ended != first.ended or seat.sync_point != first.sync_point:
            raise BatchStatisticsError(
                f"microbatch {first.index} {_position(first)}, and microbatch {seat.index} {_position(seat)}: "
                "statistics of the whole batch need every microbatch, in the same order. Compute such statistics "
                "outside of the branch in which the two microbatches differ, also for rows that do not use them"
            )


def _position(seat: Seat) -> str:
    return "has reached its end" if seat.ended else f"waits for {seat.sync_point}"


def _refuse_checkpoints(sync_point: SyncPoint) -> None:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            raise BatchStatisticsError(
                f"{sync_point} is inside a checkpoint, which runs the layer again in backward, one microbatch at a "
                'time, without the statistics of the whole batch. With batch_norm="exact", checkpoint only the modules '
                "between two such layers, or none: activations that wait are offloaded anyway"
            )
        frame = frame.f_back


def _shared_tensor_error(index: int, other: str, place: str) -> BatchStatisticsError:
    return BatchStatisticsError(
        f"before {place}, microbatch {index} used a tensor that {other} computed. With "
        'batch_norm="exact" microbatches run in turns, so one microbatch may replace a tensor that another one stored '
        "outside of the model (in a global, a list, a hook's variable). Return the tensor from the model, or store it "
        "as an attribute of a module: each microbatch has its own modules"
    )


class _CancelledError(BaseException):
    """Unwinds the stack of a cancelled microbatch."""


class _RulesMode(TorchFunctionMode):
    """Call rules in place of functions, and track the tensors that functions return."""

    def __init__(self, seat: Seat, rules: Rules) -> None:
        super().__init__()
        self._seat, self._rules = seat, rules

    def __torch_function__(  # noqa: PLR0917 - torch calls it by position
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if has_offloaded(args) or has_offloaded(kwargs.values()):
            raise _shared_tensor_error(self._seat.index, "another one", func.__name__)
        rule = self._rules.get(func)
        if rule is not None:
            return rule(self._seat, Call(func, args, kwargs))
        out = func(*args, **kwargs)
        self._seat.waiting.track(out)
        return out


def _close_fibers(fibers: list[Fiber]) -> None:
    """End fibers that have no task."""
    for each in fibers:
        each.close()


def _tensors_with_graph(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.requires_grad]
