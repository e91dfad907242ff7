"""Several forward passes in turns, each waiting for the others wherever they meet."""

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
from microbatch.loss.fibers import Strand, strand
from microbatch.loss.waiting_tensors import Park, Parking, is_parked

Task: TypeAlias = Callable[[], Any]
Around: TypeAlias = Callable[[], AbstractContextManager[object]]
Away: TypeAlias = Callable[[Tensor], Callable[[], Tensor]]
"""Puts a tensor away, and returns what brings it back."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function of torch."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self) -> Any:
        """Let the function do it.

        Returns:
            What it returns.
        """
        return self.func(*self.args, **self.kwargs)


Rule: TypeAlias = Callable[[Any, Call], Any]
"""Called with a microbatch's `Seat` and a call, in the place of the function."""
Rules: TypeAlias = Mapping[Any, Rule]
"""What to call in the place of which functions of torch."""


@dataclass(frozen=True, slots=True)
class Puts:
    """Where tensors go that wait.

    Attributes:
        away: Puts away what waits for its backward.
        aside: Puts away what waits for the other microbatches only.
        spares: Tells whether what came back may stay until it is asked for once more.
        park: Puts away what a microbatch holds while it waits for its turn; `None` leaves it there.
        resized: Called with every storage whose memory went or came back.
    """

    away: Away
    aside: Away
    spares: Callable[[Tensor], bool]
    park: Park | None
    resized: Callable[[UntypedStorage], None]


@dataclass(frozen=True, slots=True)
class Topic:
    """What microbatches meet for; all that meet must have the same.

    Attributes:
        what: What is computed, for example ``"batch_norm"``.
        place: Where, as the user would find it: a layer's name, or a line of a file.
        merge: Makes what all of them are given out of what each of them brought, in the order of the batch. Not
            compared.
    """

    what: str
    place: str
    merge: Callable[[Sequence[Any]], Any] = field(compare=False)

    def __str__(self) -> str:
        return f"{self.what} at {self.place}"


class Lockstep:
    """Run forward passes as one: each on a strand of its own, one running at a time, and meeting at every statistic.

    A pass runs until it needs to know something of all of them, and waits. When the last one has come, what they
    brought is merged, in one node of the graph, and each goes on with the result. One backward over all of them then
    orders itself: the gradient of what was merged is complete when every pass has contributed to it.

    The strands stay for the next time.
    """

    def __init__(self) -> None:
        self._strands: list[Strand] = []
        weakref.finalize(self, _dismiss, self._strands)

    def run(
        self,
        tasks: Sequence[Task],
        *,
        device: torch.device,
        rules: Rules,
        around: Around,
        puts: Puts,
    ) -> list[Any]:
        """Run tasks in turns, from one meeting to the next.

        Args:
            tasks: One for each microbatch; at least one.
            device: Where the model is.
            rules: What to call in the place of which functions of torch.
            around: Makes what each task runs inside of, in its thread.
            puts: Puts away what waits.

        Returns:
            What the tasks return.

        Raises:
            BatchStatisticsError: The tasks do not meet for the same statistics in the same order, or use what another
                one computed.

        Cost:
            Two switches between strands for each task and meeting, some 40 to 100 microseconds.
        """
        self._strands += [strand(device) for _ in range(len(tasks) - len(self._strands))]
        order = Order()
        seats = [
            Seat(index, strand=each, order=order, puts=puts)
            for index, each in zip(range(len(tasks)), self._strands, strict=False)
        ]
        for seat, task in zip(seats, tasks, strict=True):
            seat.begin(task, rules=rules, around=around)
        try:
            _take_turns(seats, order)
        except BaseException:
            for seat in seats:
                seat.dismiss()
            raise
        return [seat.value for seat in seats]


class Seat:
    """One microbatch's place in a lockstep.

    Attributes:
        index: Which microbatch it is, from 0.
        puts: Puts away what waits.
        calls: For rules to count what this microbatch did, by anything.
        value: What its task returned.
        parking: Where what it holds goes while it waits.
        next: Whether it has the next turn again, so that it keeps what it holds.
    """

    def __init__(self, index: int, *, strand: Strand, order: Order, puts: Puts) -> None:
        self.index, self.puts = index, puts
        self.parking = Parking(puts.park, puts.resized)
        self.calls: dict[Any, int] = {}
        self.value: Any = None
        self.topic: Topic | None = None
        self.brought: Any = None
        self.given: Any = None
        self.grad = True
        self.ended = self.next = False
        self._strand, self._order = strand, order
        self._error: BaseException | None = None
        self._dismissed = False

    # -- on its own strand --------------------------------------------------------------------------------------------

    def meet(self, topic: Topic, brought: Any, *, graph: Sequence[Tensor]) -> Any:
        """Wait for the others, and return what came of what all of them brought.

        Args:
            topic: What for.
            brought: What this microbatch brings.
            graph: The tensors in it that have a graph.

        Returns:
            The result, the same for all.

        Raises:
            BatchStatisticsError: The microbatch is inside a checkpoint, or has used what another one computed.
        """
        self._check_dismissed()
        _refuse_checkpoints(topic)
        self._check_own(graph, topic.place)
        self.topic, self.brought, self.grad = topic, brought, torch.is_grad_enabled()
        del brought, graph
        if not self.next:
            self.parking.leave()
        self._strand.pause()
        self.parking.come_back()
        self._check_dismissed()
        given, self.given, self.topic = self.given, None, None
        return given

    def _check_dismissed(self) -> None:
        if self._dismissed:
            raise _Dismissed

    def _check_own(self, graph: Sequence[Tensor], place: str) -> None:
        stranger = self._order.stamp(graph, self.index)
        if stranger is not None:
            raise _shared_tensor(self.index, f"microbatch {stranger}", place)

    def _work(self, task: Task, *, rules: Rules, around: Around) -> None:
        try:
            self._check_dismissed()
            with around(), _Rules(self, rules):
                self.value = task()
            self._check_own(_with_graph(self.value), "the end")
        except _Dismissed:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised again, where the caller waits
            self._error = error
        finally:
            self.ended = True

    # -- for who hands out the turns -----------------------------------------------------------------------

    def begin(self, task: Task, *, rules: Rules, around: Around) -> None:
        """Prepare; nothing runs before the first `turn`."""
        self._strand.give(partial(self._work, task, rules=rules, around=around))

    def turn(self) -> None:
        """Let it run until it waits or ends, and raise what it raised."""
        self._strand.resume()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def dismiss(self) -> None:
        """End it, wherever it is."""
        self._dismissed = True
        self.brought = self.given = self.value = None
        while not self.ended:
            self._strand.resume()
        self._error = None


def _take_turns(seats: Sequence[Seat], order: Order) -> None:
    turns = list(seats)
    while True:
        for seat in turns:
            seat.next = seat is turns[-1]
            seat.turn()
        if all(seat.ended for seat in seats):
            return
        _check_together(seats)
        topic = seats[0].topic
        assert topic is not None  # noqa: S101 - as was just checked
        with torch.set_grad_enabled(any(seat.grad for seat in seats)):
            given = topic.merge([seat.brought for seat in seats])
        order.stamp(_with_graph(given), None)
        for seat in seats:
            seat.brought, seat.given = None, given
        del given
        # The last to come is the first to go on: what it works on is at hand.
        turns.reverse()


def _check_together(seats: Sequence[Seat]) -> None:
    first = seats[0]
    for seat in seats:
        if seat.ended != first.ended or seat.topic != first.topic:
            raise BatchStatisticsError(
                f"microbatch {first.index} {_whereabouts(first)}, and microbatch {seat.index} {_whereabouts(seat)}: "
                "statistics of the whole batch need every microbatch to take part, in the same order; compute them "
                "outside of the branch that the two differ in, also for rows that do not use them"
            )


def _whereabouts(seat: Seat) -> str:
    return "has come to its end" if seat.ended else f"waits for {seat.topic}"


def _refuse_checkpoints(topic: Topic) -> None:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            raise BatchStatisticsError(
                f"{topic} is inside a checkpoint, which runs it again in backward, one microbatch at a time, where "
                'the statistics of the whole batch cannot be had. With batch_norm="exact", checkpoint what lies '
                "between two such layers; what waits is spilled anyway"
            )
        frame = frame.f_back


def _shared_tensor(index: int, other: str, place: str) -> BatchStatisticsError:
    return BatchStatisticsError(
        f"before {place}, microbatch {index} used what {other} computed: with "
        'batch_norm="exact" microbatches run in turns, so what one of them leaves outside of the model (in a '
        "global, a list, a hook's variable) is another one's when it comes back to it; return it from the "
        "model, or keep it on a module as an attribute, of which each microbatch has its own"
    )


class _Dismissed(BaseException):
    """Unwinds a microbatch."""


class _Rules(TorchFunctionMode):
    """Calls rules in the place of functions."""

    def __init__(self, seat: Seat, rules: Rules) -> None:
        super().__init__()
        self._seat, self._rules = seat, rules

    def __torch_function__(  # noqa: PLR0917 - torch calls it by position
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if is_parked(args) or is_parked(kwargs.values()):
            raise _shared_tensor(self._seat.index, "another one", func.__name__)
        rule = self._rules.get(func)
        if rule is not None:
            return rule(self._seat, Call(func, args, kwargs))
        out = func(*args, **kwargs)
        self._seat.parking.saw(out)
        return out


def _dismiss(strands: list[Strand]) -> None:
    """End strands that wait for a task."""
    for each in strands:
        each.leave()


def _with_graph(thing: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(thing) if isinstance(leaf, Tensor) and leaf.requires_grad]
