"""The methods of a window for hand-written loops: hand out microbatches, encode a batch, read the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from microbatch.arguments import check_callable
from microbatch.batch.batches import Batches
from microbatch.batch.lengths import in_order
from microbatch.batch.random_masks import derive
from microbatch.errors import WindowClosedError, WindowError
from microbatch.loss.loss import LossLike
from microbatch.step.cutting import Cutting, handed_in
from microbatch.step.events import Event
from microbatch.step.part import Begin, Function, OpenWindow
from microbatch.step.record import Step
from microbatch.step.user_errors import raise_as_raised


class OwnLoop(OpenWindow):
    """A window's interface for a hand-written loop; `Window` adds how it opens, runs and closes."""

    source: Sequence[Any]
    record: Step | None
    _events: list[Event]
    _state: str
    left = 0

    @property
    def seed(self) -> int:
        """Seed of the window, the same for every attempt."""
        return derive(self.setup.history.seed, self.setup.history.windows)

    def check_open(self, verb: str) -> None:
        """Raise an error for a call outside the window's block, or in another thread."""
        if self._state != "open":
            when = "before it was entered" if self._state == "new" else "after it was closed"
            raise WindowClosedError(f"cannot {verb} a window {when}; use it inside its `with` block or its loop")
        undo = self.undo
        if undo.interrupts.waiting:
            undo.interrupts.deliver()
        if undo.ident != get_ident():
            undo.refuse_thread(verb)

    def begin(self, batch: object, cutting: Cutting) -> Begin:
        """Prepare all parts for the microbatches of a batch."""
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the window."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Open the window."""
        raise NotImplementedError

    def enclose(self, work: Callable[[Self], object]) -> Self:
        """Open the window, call a function with it, and leave it; an interrupt at any line of this closes it."""
        try:
            self.__enter__()
            work(self)
            self.__exit__(None, None, None)
            return self  # noqa: TRY300 - as above
        except BaseException as error:
            self.__exit__(BaseException, error, None)
            raise_as_raised(error)
            raise

    def split(self, batch: object) -> Iterator[Any]:
        """Cut this rank's share of the effective batch and hand out its microbatches, each on the model's device.

        Args:
            batch: A batch that `cut` accepts, usually on the host; or `Batches`.

        Returns:
            An iterator over microbatches of ``microbatch_size`` rows; the last one may have fewer.

        Raises:
            WindowError: The window is not open, or has encoded a batch.
            BatchError: The batch cannot be cut, or is empty. With several ranks, one rank's share may be empty.
        """
        self.check_open("split")
        if self.coupled is not None:
            raise WindowError("a window that encodes its batch has no microbatches beside it; open another window")
        return self._handed_out(self.cut(batch))

    def __iter__(self) -> Iterator[Any]:
        """Hand out the loader's microbatches; the end of the iteration takes the step."""
        if not self.source:
            raise WindowError(
                "this window has no loader behind it, or has handed out its microbatches; iterate over "
                "window.split(batch), or over the next window"
            )
        self.check_open("iterate over")
        source, self.source = self.source, ()  # handed out once
        yield from self._handed_out(self.begin(Batches(source), handed_in(source, self.device)))
        self.__exit__(None, None, None)  # does nothing if the window was left already

    def leave(self) -> None:
        """Drop the window if its loop over a loader's microbatches was left before the first backward."""
        if self.left and not self.done and self.peers.size == 1:
            self.warn_left("no step is taken, because none of them had its backward")
            self.__exit__(GeneratorExit, GeneratorExit(), None)

    def warn_left(self, result: str) -> None:
        """Warn once that a loop over microbatches was left by ``break``."""
        of = f" of {self.planned}" if self.planned else ""
        self.setup.warn(
            "break",
            f"a loop over the microbatches of a window was left by `break` after the backward of {len(self.done)}{of} "
            f"microbatches; {result}, and the others are not used. Write `continue` to leave out one microbatch, and "
            "end the loop over windows to end training",
        )

    def losses(self, batch: object, loss_fn: Function) -> Iterator[LossLike]:
        """Run a batch through a loss function, and yield the loss of each microbatch for `backward`."""
        return self.passes.losses(self, batch, loss_fn)

    def encode(self, batch: object, encode: Function, *, keep: bool = False) -> Any:
        """Encode this rank's share of the batch for a loss that couples samples; pass that loss to `backward`.

        Args:
            batch: A batch that `cut` accepts, usually on the host.
            encode: ``encode(model, microbatch)`` returns the representations of the microbatch's rows: tensors of
                shape ``(rows, ...)``, nested in dicts, lists and tuples. Only floating-point tensors get gradients.
            keep: Keep the graphs of all microbatches until backward, instead of encoding twice.

        Returns:
            The representations of the whole batch over all ranks, in the structure that ``encode`` returned.

        Raises:
            WindowError: The window has had a batch already.
            ConfigError: An option of the accumulator does not go with ``encode``.
            BatchError: The batch cannot be cut, or is empty on all ranks.
            LossError: ``encode`` did not return one representation for each row.

        Cost:
            One forward of every microbatch; without ``keep``, `backward` runs another one. Memory for the
            representations; with several ranks, one all-gather of them.

        Source:
            ``docs/coupled.md``.
        """
        self.check_open("encode in")
        check_callable("encode", encode, "encode(model, microbatch)")
        if self.coupled is not None or self.done:
            raise WindowError("a window encodes one batch, and takes the loss of that batch alone; open another window")
        self.keeps_graphs = (keep and not self.attempt.twice) or self.passes.keeps
        self.coupled = self.setup.couple(self, encode, keep=self.keeps_graphs)
        try:
            return self.coupled.representations_of(batch)
        except Exception as error:
            raise_as_raised(error)
            raise

    def in_order(self, results: Sequence[Tensor]) -> Tensor:
        """Concatenate the microbatches' results, each of shape ``(rows, ...)``, in the order of the batch's rows."""
        return in_order(results, self.order)

    @property
    def step(self) -> Step:
        """The record of the step, once the window has been left; before that, `WindowClosedError`."""
        if self.record is None:
            raise WindowClosedError(
                "there is no step yet: the window's record exists once its block, or the loop over its microbatches, "
                "has ended. A loop that was left by break ends when the next window begins"
            )
        return self.record

    def _handed_out(self, begin: Begin) -> Iterator[Any]:
        self.left += 1
        for p in self.passes.of(self, begin):
            self.check_open("take microbatches from")
            yield p.microbatch
            del p
        self.left -= 1
