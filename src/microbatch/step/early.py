"""The agreement of the ranks before the last backward, so that gradients can be reduced while it runs."""

from __future__ import annotations

from dataclasses import replace

from microbatch.gradients.gradient_sum import GradientSum
from microbatch.loss.tally import Tally
from microbatch.ranks.agreement import Message, agree
from microbatch.ranks.bucketed_reduce import Overlap
from microbatch.ranks.process_group import Ranks
from microbatch.step.settings import Memory


class Early:
    """Let the ranks agree once every loss of the window is known, and reduce from then on.

    Losses and counts are known before the last backward; which parameters it reaches, and whether it goes well, the
    ranks tell one another after it.

    Args:
        ranks: The ranks.
        gradients: The window's sums, open.
        memory: The accumulator's, which keeps the buckets' memory.
        narrow: Whether gradients add up in their own dtype, even where that is narrower than float32.

    Attributes:
        message: What this rank has said.
        waits: Whether the other ranks wait for buckets of this one, and to hear how it went.
        deaf: Whether they wait for nothing that this rank could say.
    """

    def __init__(self, ranks: Ranks, gradients: GradientSum, memory: Memory, *, narrow: bool) -> None:
        self._ranks, self._gradients, self._memory, self._narrow = ranks, gradients, memory, narrow
        self._overlap: Overlap | None = None
        self._agreed: Message | None = None
        self.message: Message | None = None
        self.waits = self.deaf = False

    @property
    def begun(self) -> bool:
        """Whether the ranks have agreed."""
        return self._agreed is not None

    def reserve(self) -> None:
        """Find out whether there is memory for all buckets, while the other ranks can still be told of it."""
        parameters = [each.parameter for each in self._gradients.named]
        held = self._memory.overlap
        if held is None or not held.fits(parameters):
            self._memory.overlap = None  # before there is another
            self._memory.overlap = held = Overlap(parameters, narrow=self._narrow)
        self._overlap = held

    def agree(self, message: Message, tally: Tally) -> None:
        """Agree with the other ranks, each of which comes here once, whatever its microbatches.

        Args:
            message: What this rank says of all its losses, the last one's among them.
            tally: Of these.

        Raises:
            RankError: A rank failed.
        """
        assert self._overlap is not None  # noqa: S101 - `reserve` comes before
        self.deaf = True
        agreed = agree(self._ranks, message, parameters=len(message.present))
        counts = dict(zip(agreed.names, agreed.counts, strict=True))
        self._overlap.begin(self._ranks, tally.factor(counts) if any(agreed.counts) else 1.0)
        self._agreed, self.message, self.waits, self.deaf = agreed, message, True, False

    def watch(self) -> None:
        """Reduce what the backward that comes has done with."""
        if self._overlap is not None:
            self._overlap.watch()

    def finish(self) -> Message:
        """Reduce what is left, and put the sums over all ranks into the gradients.

        Returns:
            What the ranks agreed on.

        Raises:
            WindowError: A gradient has grown after it had been sent.
            RankError: Another rank failed.
            RankAgainError: Another rank will run the batch again.
        """
        assert self._overlap is not None  # noqa: S101 - `agree` comes before
        assert self._agreed is not None  # noqa: S101 - likewise
        gradients = self._gradients
        sums = {id(each.parameter): total for each, total in gradients.gradients()}
        self._overlap.rest([sums.get(id(each.parameter)) for each in gradients.named])
        self.waits, self.deaf = False, True
        present = self._overlap.agree(gradients.present)
        gradients.fill(present)
        sums = {id(each.parameter): total for each, total in gradients.gradients()}
        for place, total in self._overlap.results():
            if present[place]:
                sums[id(gradients.named[place].parameter)].copy_(total)
        return replace(self._agreed, present=present)

    def fail(self, *, again: bool) -> bool:
        """Give the other ranks what they wait for, and tell them that this one failed.

        Args:
            again: Whether it will run the same batch again.

        Returns:
            Whether all ranks that failed will.
        """
        self.waits, self.deaf = False, True
        return self._overlap is not None and self._overlap.fail(again=again)
