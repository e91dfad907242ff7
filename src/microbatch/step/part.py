"""The interfaces between a window and its features: parts, passes and peers.

A window calls these three interfaces, and knows no feature by name. `compose.py` lists the parts of a window. The first
part is the outermost one in `open`, `around`, `call` and `backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from microbatch.gradients.gradient_sum import GradientSum
from microbatch.step.cutting import Cutting
from microbatch.step.denominator import Denominator
from microbatch.step.events import Event
from microbatch.step.met import Met
from microbatch.step.options import Options
from microbatch.step.record import Step
from microbatch.step.undo import Undo

Function: TypeAlias = Callable[[Any, Any], Any]
"""``function(model, microbatch)`` returns a loss, or the representations of the microbatch's rows."""
Begin: TypeAlias = Callable[[], Iterable[tuple[int | None, Any]]]
"""Returns a new iterator over ``(rows, microbatch)``, from the first microbatch on."""
Run: TypeAlias = Callable[[Sequence[Any], Sequence[Tensor]], object]
"""`torch.autograd.backward`, or a function that a part wraps around it."""


@dataclass(slots=True)  # not frozen: one is made for every microbatch, and a frozen one takes five times as long
class Pass:
    """One forward and backward of a microbatch through the model.

    Attributes:
        rows: Rows of the microbatch; `None` if they are not known.
        microbatch: The microbatch, on the model's device.
        index: Index of the microbatch on this rank, from 0.
        again: Whether a coupled window encodes the microbatch for the second time, now with a graph.
        filler: Whether the pass adds nothing: this rank has no microbatch left, but other ranks need its collectives.
    """

    rows: int | None
    microbatch: Any
    index: int = 0
    again: bool = False
    filler: bool = False


@runtime_checkable
class OpenWindow(Protocol):
    """The interface of an open window for its parts, passes and peers.

    Attributes:
        options: The options of the accumulator.
        setup: The parts and functions that the window consists of.
        model: The model that loss functions are called with.
        device: The device where the model computes.
        gradients: The gradient sums.
        denominator: The sums and counts of the loss.
        peers: The other ranks.
        passes: The order in which microbatches run.
        outer: Contexts that stay open until the step has been taken.
        done: Rows of each microbatch whose backward has run.
        planned: Number of microbatches on this rank; `None` while it is not known.
        order: Row numbers of each microbatch; `None` if microbatches are consecutive rows.
        rows: Rows of the microbatch whose backward is next or running; `None` if they are not known.
        function: The loss function or encoder of `Accumulator.step`; `None` in a hand-written loop.
        keeps_graphs: Whether the graphs of several microbatches are alive at the same time.
        now: The current pass; `None` between passes.
        stepping: Whether optimizers may step now.
        stepped: Whether an optimizer has begun its step.
        undo: Restores the state from before the window after an error.
        dropped: Whether the gradient is not applied, because it is not finite or nothing contributed.
        attempt: The object that decides what happens after a failure.
        coupled: The encoder of a batch with a coupled loss; `None` for other losses.
        left: Number of loops over microbatches that have not come to their end.
    """

    options: Options
    setup: Any
    model: nn.Module
    device: torch.device
    gradients: GradientSum
    denominator: Denominator
    peers: Peers
    passes: Passes
    outer: ExitStack
    done: list[float]
    planned: int | None
    order: list[Tensor] | None
    rows: float | None
    function: Function | None
    keeps_graphs: bool
    now: Pass | None
    stepping: bool
    stepped: bool
    undo: Undo
    dropped: bool
    attempt: Any
    coupled: Any
    left: int

    @property
    def seed(self) -> int:
        """Seed of the window, the same for every attempt."""
        ...

    def warn_left(self, result: str) -> None:
        """Warn once that a loop over microbatches was left by ``break``."""
        ...

    def cut(self, batch: object) -> Begin:
        """Cut this rank's share of the batch into microbatches."""
        ...

    def called(self, function: Function) -> Function:
        """Wrap a loss function or an encoder in all parts."""
        ...

    def go(self, p: Pass | None) -> None:
        """Leave the previous pass, and enter the next one."""
        ...

    def take(self, loss: Any, count: float | None) -> None:
        """Run the backward of one microbatch's loss, now or together with the other microbatches."""
        ...

    def seeds(self, shares: Sequence[Any], microbatch: int | None) -> tuple[list[Tensor], list[Tensor]]:
        """Count a loss, and return its roots for backward with their first gradients."""
        ...

    def run(self, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
        """Run a backward, wrapped in all parts."""
        ...

    def went(self, rows: float | None) -> None:
        """Count a microbatch whose backward has run."""
        ...

    def later(self, event: Event) -> None:
        """Emit an event at the end of the window, after `StepDone`."""
        ...


class Part:
    """One feature of a window, as hooks that a subclass overrides. By default, a hook does nothing.

    An accumulator creates each part once; the part itself stores its state between windows.

    Attributes:
        repeatable: Whether a window with this part may run again in smaller microbatches.
        first_windows: Number of windows that have this part, from the first one in a process; `None` for all.
    """

    repeatable = True
    first_windows: int | None = None

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Enter contexts for the window on ``stack``, which is closed before the step, and also after an error."""

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Prepare for the microbatches of a batch, before the first pass."""

    def around(self, window: OpenWindow, p: Pass) -> AbstractContextManager[object] | None:
        """Return a context manager around one pass, forward and backward, or `None`."""

    def call(self, window: OpenWindow, function: Function) -> Function:
        """Wrap the loss function or the encoder of `Accumulator.step`."""
        del window
        return function

    def whole(self, window: OpenWindow, rows: int) -> None:
        """Prepare for the loss of the whole batch, which has ``rows`` rows over all ranks."""

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Wrap every backward of the window."""
        del window
        return run

    def check(self, window: OpenWindow) -> None:
        """Raise an error instead of the step, while the other ranks can still be notified."""

    def reduced(self, window: OpenWindow, met: Met, factor: float) -> None:
        """Read or change the gradients of all ranks, which ``factor`` finishes, before they are checked and clipped."""

    def figures(self, window: OpenWindow) -> Mapping[str, Any]:
        """Return this part's fields of the `Step` record."""
        del window
        return {}

    def done(self, window: OpenWindow, step: Step) -> None:
        """Update this part after a window without an error."""

    def failed(self, window: OpenWindow, error: BaseException) -> None:
        """React to a failure while the contexts of the window are still open."""

    def put_back(self, window: OpenWindow, error: BaseException) -> None:
        """Reset this part after a failure; gradients, random state and buffers are already restored."""

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as plain values."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`."""


class Passes(Part):
    """The order in which a window runs its microbatches; by default, one after the other.

    Attributes:
        keeps: Whether graphs outlive their pass.
    """

    keeps = False

    @property
    def waiting(self) -> int:
        """Number of microbatches that wait for their backward."""
        return 0

    def of(self, window: OpenWindow, begin: Begin, *, again: bool = False, graph: bool = True) -> Iterator[Pass]:
        """Enter one pass after the other, and yield each.

        Args:
            window: The window.
            begin: Returns an iterator over this rank's microbatches.
            again: Whether a coupled window encodes for the second time.
            graph: Whether passes record a graph and run backward.

        Yields:
            The passes.
        """
        for p in window.peers.passes(window, begin, again=again, graph=graph):
            window.go(p)
            yield p
            del p  # the next microbatch is made without this one
            window.go(None)

    def values(self, window: OpenWindow, begin: Begin, function: Function) -> Iterator[tuple[Pass, Any]]:
        """Call a function with every microbatch, and yield each pass with the function's result."""
        for p in self.of(window, begin):
            yield p, function(window.model, p.microbatch)
            del p

    def losses(self, window: OpenWindow, batch: object, loss_fn: Function) -> Iterator[Any]:
        """Yield the loss of each microbatch of a batch; the caller passes it to `Window.backward`."""
        function = window.called(loss_fn)  # before the ranks agree: dummy passes after a failure run it
        for p, loss in self.values(window, window.cut(batch), function):
            yield loss
            del p, loss  # the next forward runs without this microbatch and its graph
        self.finish(window)

    def start(self, window: OpenWindow, rows: float | None, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
        """Run the backward of one microbatch, or delay it until `finish`."""
        window.run(tensors, seeds)
        window.went(rows)

    def finish(self, window: OpenWindow) -> None:
        """Run the backward passes that were delayed."""


class Peers(Part):
    """The other ranks, and all communication with them; by default, there are none.

    Attributes:
        size: Number of data-parallel ranks; 1 for a single process.
        index: Index of this rank, from 0.
        passes_together: Whether every pass communicates, so that all ranks make the same number of passes.
    """

    size, index = 1, 0
    passes_together = False

    def prepare(self, window: OpenWindow) -> None:
        """Find the other ranks, at the start of the window."""

    def total(self, window: OpenWindow, rows: float, counts: Mapping[str, float]) -> tuple[float, Mapping[str, float]]:
        """Add up rows and declared counts over the ranks, before the first backward."""
        del window
        return rows, counts

    def number_rows(self, window: OpenWindow, rows: int) -> tuple[int, list[int]]:
        """Return the first rank's seed of the window, and the rows of every rank."""
        return window.seed, [rows]

    def agree_on(self, window: OpenWindow, cutting: Cutting, batch: object) -> None:
        """Agree with the other ranks on the number of passes, if passes communicate."""

    def passes(self, window: OpenWindow, begin: Begin, *, again: bool, graph: bool) -> Iterator[Pass]:
        """Yield this rank's passes, and run filler passes if another rank has more."""
        del window, graph
        index = 0
        for rows, microbatch in begin():
            yield Pass(rows, microbatch, index, again)
            del microbatch
            index += 1  # noqa: SIM113 - `enumerate` would hold this microbatch while the next one is made

    def silence(self, loss: object) -> tuple[list[Any], list[Tensor]]:
        """Return roots and zero gradients for a backward that only communicates; none if passes do not communicate."""
        del loss
        return [], []

    def exchange(self) -> Any:
        """Return an `Exchange`, which gathers representations over the ranks; `None` for a single process."""
        return None

    def across(self) -> Any:
        """Return an `Across`, which shares batch statistics between the ranks; `None` for a single process."""
        return None

    def attend(self, window: OpenWindow, rows: int, passes: int, *, first: int) -> None:
        """Check that every stage of a pipeline has the same rows, passes and first row."""

    def listen(self, *, on: bool) -> None:
        """Set whether the other stages of a pipeline can be notified of a failure."""

    def speak(self, conversation: Any) -> None:
        """Set the exchange in which the other ranks wait for this one."""

    def encoded(self, window: OpenWindow) -> None:
        """Prepare for the loss of all representations, between the two encodings."""

    def hold(self, window: OpenWindow) -> Sequence[Any]:
        """Prepare the model for passes in lockstep, and return tensors that must not be offloaded."""
        del window
        return ()

    def scatter(self, window: OpenWindow) -> None:
        """Reduce-scatter the gradients of one backward of all passes."""

    def present(self, window: OpenWindow) -> list[bool]:
        """Return for each parameter whether this rank has a gradient."""
        return window.gradients.present

    def meet(self, window: OpenWindow) -> Met:
        """Reduce sums, counts and gradients over all ranks."""
        raise NotImplementedError

    def add_up(self, numbers: list[float]) -> list[float]:
        """Return the sums of numbers over all ranks, after they met."""
        return numbers

    def stepping(self, window: OpenWindow, met: Met) -> AbstractContextManager[object]:
        """Return a context manager around the optimizers' steps."""
        del window, met
        return nullcontext()

    def late(self, window: OpenWindow) -> bool:
        """Return whether the ranks have agreed on this window already, so that it cannot run again."""
        del window
        return False

    def relieve(self) -> bool:
        """Reduce memory use in the next attempt, and return whether that is possible."""
        return False

    def fail(self, window: OpenWindow, error: BaseException, *, again: bool) -> bool:
        """Notify the ranks that wait for this one that its window failed.

        Args:
            window: The window; everything has been restored.
            error: The failure.
            again: Whether this rank will run the batch again.

        Returns:
            Whether the batch can run again: False if another rank has given up.
        """
        del window, error
        return again
