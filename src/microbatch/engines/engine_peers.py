"""The ranks of an engine: the same number of passes on each, one agreement, and the engine's own backward and step."""

from __future__ import annotations

import math
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from microbatch.batch.prefetch import feed
from microbatch.engines.engine_denominator import engine_loss, graphs_of, silent_loss
from microbatch.engines.zero_engine import ZeroEngine
from microbatch.errors import EmptyWindowError, LossError, NonfiniteError, RankError
from microbatch.ranks.agreement import Message
from microbatch.ranks.lost_ranks import is_of_the_group
from microbatch.ranks.process_group import RankGroup
from microbatch.step.cutting import Cutting
from microbatch.step.finish import record_of
from microbatch.step.part import Begin, OpenWindow, Pass, Run
from microbatch.step.peers.borrow_rows import borrow_rows, few_of
from microbatch.step.peers.data_parallel import DataParallel
from microbatch.step.peers.rank_setup import RankSetup, describe_optimizer


class EnginePeers(DataParallel):
    """Data-parallel ranks, or a single process, whose gradients an engine adds up, reduces and applies.

    Args:
        zero: The engine.

    Attributes:
        spoilt: Whether the engine holds a part of the gradient of a window that failed, which it cannot drop.

    Source:
        Laws N3, N4, R1, R2, F5, F6.
    """

    def __init__(self, zero: ZeroEngine) -> None:
        super().__init__()
        self._zero, self.setup = zero, RankSetup(also=partial(_described, zero))
        self.passes_together, self.spoilt = zero.together, False
        self._reset()

    def _reset(self) -> None:
        self._order, self._outputs = Order(), list[Tensor]()
        self._planned = self._made = 0
        self._rows: Any = None  # a batch for fillers
        # Whether this rank makes passes, has had a backward, and has begun the engine's step.
        self._passing = self._begun = self._stepping = False
        self._inside = False  # whether a collective may have begun that is not complete

    # -- before the first backward -------------------------------------------------------------------------------------

    def prepare(self, window: OpenWindow) -> None:
        """Find the ranks; before the first window, check that they are set up alike."""
        self._reset()
        super().prepare(window)

    def share_weights(self, window: OpenWindow) -> None:
        """Do nothing: the engine has broadcast the weights."""

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Record, if passes communicate, the model's outputs and the order of the gradients."""
        self._zero.keep_boundary(window.outer)
        if not self.passes_together:
            return
        for index, each in enumerate(window.gradients.named):
            hook = each.parameter.register_post_accumulate_grad_hook(partial(self._order.add, index))
            stack.callback(hook.remove)
        stack.callback(self._zero.engine.register_forward_pre_hook(self._called).remove)
        stack.callback(self._zero.engine.register_forward_hook(self._returned).remove)

    def agree_on(self, window: OpenWindow, cutting: Cutting, batch: object) -> None:
        """Agree on the number of passes, if they communicate; send rows to ranks without any."""
        del window
        ranks, own = self.ranks, cutting.microbatches
        self._planned, self._rows = own, batch
        if ranks is not None and self.passes_together:
            numbers = torch.zeros(ranks.size, dtype=torch.float64, device=ranks.device)
            numbers[ranks.index] = own
            ranks.sum_(numbers)
            counts = [int(each) for each in numbers.tolist()]
            self._planned = max(counts)
            if not all(counts):
                lent = borrow_rows(ranks, batch, microbatches=counts)
                self._rows = batch if own else lent
        self._passing = True

    # -- passes --------------------------------------------------------------------------------------------------------

    def passes(self, window: OpenWindow, begin: Begin, *, again: bool, graph: bool) -> Iterator[Pass]:
        """Yield this rank's passes, then filler passes until every rank has made as many."""
        yield from super().passes(window, begin, again=again, graph=graph)
        while self.passes_together and self._made < self._planned:
            made = self._made
            for _, microbatch in feed([(0, few_of(self._rows))], window.device):
                yield Pass(0, microbatch, filler=True)
            if self._made == made:
                raise LossError(
                    "the other ranks wait for this rank's backward, and its loss has no graph, because the loss "
                    "function did not call the model. Call the model for every microbatch, also where no row counts"
                )

    @contextmanager
    def around(self, window: OpenWindow, p: Pass) -> Generator[None]:
        """Set whether the engine reduces in this pass, and restore random state and buffers after a filler."""
        before = window.undo.snapshot.again() if p.filler else None
        self._outputs.clear()
        self._zero.set_boundary(last=self.passes_together and self._made + 1 == self._planned)
        yield
        if before is not None:
            before.restore()

    def silence(self, loss: object) -> tuple[list[Any], list[Tensor]]:
        """Return a loss with a gradient of zero for a pass that only communicates; nothing if none is needed."""
        silent = silent_loss(self._outputs, loss) if self.passes_together else None
        return ([], []) if silent is None else ([silent], [torch.ones_like(silent)])

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Run the engine's backward instead of autograd's."""
        del window, run
        return self._run

    def _run(self, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
        divisor = self.size if self._zero.engine.gradient_average else 1
        loss = engine_loss(tensors, seeds, divisor=divisor)
        self._outputs.clear()
        self._begun = self._inside = True
        self._zero.backward(loss)
        self._inside = False
        self._order.add(-1)
        self._made += 1

    def _called(self, *_: object) -> None:
        self._inside = self._zero.stage == 3  # which gathers weights in the forward

    def _returned(self, _: nn.Module, __: object, output: object) -> None:
        self._inside = False
        self._outputs.extend(graphs_of(output))

    # -- the end -------------------------------------------------------------------------------------------------------

    def check(self, window: OpenWindow) -> None:
        """End the passes."""
        del window
        self._passing, self._rows = False, None

    def agree(self, window: OpenWindow, message: Message | None) -> Message:
        """Add up the messages of the ranks, and check that the engine reduced the same gradients together."""
        if self.ranks is None:
            assert message is not None  # noqa: S101 - a single process tells nobody of a failure
            return message
        agreed = super().agree(window, message)
        if self.passes_together and not self._order.is_alike(self.ranks):
            raise RankError(
                "the ranks' microbatches used different parameters, or in another order, and the engine added the "
                f"gradients of one to those of another: ZeRO-{self._zero.stage} reduces gradients during backward. "
                "Use every parameter in every microbatch, or take ZeRO-1 without overlap_comm"
            )
        return agreed

    def reduce(self, window: OpenWindow, agreed: Message, factor: float) -> None:
        """Refuse a gradient that cannot be applied, on all ranks alike; then let the engine reduce."""
        del factor
        if not any(agreed.counts):
            raise EmptyWindowError("no microbatch of this window contributed to the loss (every count was 0)")
        if not all(map(math.isfinite, agreed.sums)) and not self._zero.scales:
            raise NonfiniteError(microbatch=window.denominator.first_nonfinite())
        self._stepping = True
        self._norm = self._zero.reduce([each.parameter for each in window.gradients.named])

    def norm(self, window: OpenWindow) -> Tensor:
        """Return the norm of the gradient before clipping; NaN if only the engine knows it."""
        del window
        return self._norm

    def finish(self, window: OpenWindow) -> dict[str, Any]:
        """Agree with the other ranks, and take the engine's step.

        Args:
            window: The window, after its last backward.

        Returns:
            Fields of the `Step` record.
        """
        return record_of(self.meet(window)) | self._zero.step()

    # -- failures ------------------------------------------------------------------------------------------------------

    def waited(self, window: OpenWindow) -> bool:
        """Return whether the other ranks wait for this one's message; inside passes that communicate, they do not."""
        return super().waited(window) and not (self._passing and self.passes_together)

    def failed(self, window: OpenWindow, error: BaseException) -> None:
        """Run dummy passes after a failure, so that the other ranks' collectives complete."""
        ours = isinstance(error, Exception) and not isinstance(error, RankError) and not is_of_the_group(error)
        if self.ranks is None or not (self._passing and self.passes_together and ours) or self._inside:
            return
        with suppress(Exception):  # this rank's own error is the one to raise
            while self._made < self._planned:
                self._dummy_pass(window)
            self._passing = False  # now the other ranks wait for this one's message

    def _dummy_pass(self, window: OpenWindow) -> None:
        """Run a pass that adds nothing; the outputs of a pass that failed after its forward need only a backward."""
        loss = None
        if not self._outputs:
            assert window.function is not None  # noqa: S101 - the passes of `Accumulator.step` set it
            self._zero.set_boundary(last=self._made + 1 == self._planned)
            for _, microbatch in feed([(0, few_of(self._rows))], window.device):
                with suppress(Exception):
                    loss = window.function(window.model, microbatch)
        tensors, seeds = self.silence(loss)
        if self._inside or not tensors:
            raise LossError("the model has not been called")
        self._run(tensors, seeds)

    def put_back(self, window: OpenWindow, error: BaseException) -> None:
        """Drop the engine's gradient; if that is not possible, the engine is not used again."""
        del window, error
        # Passes of this rank are missing, or a collective is not complete.
        half = self._passing and self.passes_together and (self._begun or self._inside)
        self.spoilt = True
        self._outputs.clear()
        with suppress(Exception):  # the engine's own error must not hide the window's
            self._zero.drop()
            self.spoilt = half or self._stepping or (self._begun and self._zero.on_host)


def _described(zero: ZeroEngine) -> dict[str, str]:
    return zero.describe() | dict(describe_optimizer("the optimizer", zero.engine.basic_optimizer))


class Order:
    """Check that parameters got their gradients in the same order on every rank.

    An engine that reduces gradients during backward puts them into buckets in this order. If ranks differ, a bucket of
    one meets another bucket of the other: with luck their sizes differ, and the job ends; without luck, the engine adds
    up the gradients of two parameters.
    """

    def __init__(self) -> None:
        self._sum = 0

    def add(self, index: int, _: object = None) -> None:
        """Add the gradient of one parameter; an index below 0 is the end of a pass."""
        self._sum = zlib.crc32(index.to_bytes(8, "little", signed=True), self._sum)

    def is_alike(self, ranks: RankGroup) -> bool:
        """Return whether the order is the same on all ranks.

        Args:
            ranks: The ranks.

        Returns:
            The same on every rank.

        Cost:
            One all-gather of 8 bytes, and a host synchronisation.
        """
        own = torch.tensor([self._sum], dtype=torch.float64, device=ranks.device)
        return len({each.item() for each in ranks.gather(own)}) == 1
