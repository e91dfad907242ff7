"""Data-parallel ranks: agree on counts once, reduce gradients once, and notify waiting ranks after a failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from microbatch.errors import RankError
from microbatch.loss.loss import wide_dtype
from microbatch.loss.rank_stats import Across
from microbatch.ranks.agreement import Message, agree, attend
from microbatch.ranks.gather_representations import Exchange
from microbatch.ranks.lost_ranks import is_of_the_group
from microbatch.ranks.process_group import RankGroup
from microbatch.ranks.reduce import Flat, reduce_, reserve
from microbatch.ranks.sparse_reduce import reduce_sparse
from microbatch.shards import local_of
from microbatch.step.host_numbers import numbers_of
from microbatch.step.met import Met
from microbatch.step.part import OpenWindow, Peers
from microbatch.step.peers.all_or_none import all_or_none
from microbatch.step.peers.alone import enter_no_sync, unscaled_norm
from microbatch.step.peers.rank_setup import RankSetup
from microbatch.step.record import Step


class DataParallel(Peers):
    """Ranks that hold the same weights and different rows.

    Attributes:
        ranks: The process group; `None` if a subclass runs in a single process.
        talk: The exchange in which the other ranks wait before the end of the window; `None` if there is none.
        setup: What the ranks have alike, and their heartbeats.

    Source:
        Laws N3, N4, N9, R1 to R5.
    """

    def __init__(self) -> None:
        self.ranks: RankGroup | None = None
        self.talk: Across | Exchange | None = None
        self._shared, self._waited = False, True
        self._total: tuple[float, Mapping[str, float]] | None = None
        self._numbers: tuple[int, list[int]] | None = None
        self._flat, self.setup = Flat(), RankSetup()
        # Number of windows that all ranks ended, parameters that have been updated, and parameters with a gradient.
        self._steps, self._updated, self._present = 0, set[int](), set[int]()

    # -- before the first backward -------------------------------------------------------------------------------------

    def prepare(self, window: OpenWindow) -> None:
        """Find the ranks; before the first window, check that they are set up alike, and broadcast the weights."""
        self.find(window)
        self.talk, self._waited = None, True
        if self.ranks is not None:
            self.size, self.index = self.ranks.size, self.ranks.index
        if not window.attempt.retries:  # an agreement of the ranks holds for every attempt
            self._total = self._numbers = None
        self.setup.begin(window, self.groups())
        if not self._shared:
            with self.setup.first(window, self.groups()):
                self.share_weights(window)
            self._shared = True

    def find(self, window: OpenWindow) -> None:
        """Find the ranks."""
        self.ranks = window.options.find_ranks()

    def groups(self) -> list[tuple[RankGroup, bool]]:
        """Return the process groups of this rank, and whether all ranks of each have the same parameters."""
        return [] if self.ranks is None else [(self.ranks, True)]

    def share_weights(self, window: OpenWindow) -> None:
        """Broadcast the first rank's parameters and buffers."""
        model = window.options.model
        if self.ranks is not None and not isinstance(model, DistributedDataParallel):  # which broadcasts itself
            self.ranks.broadcast_(model)

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Turn off the gradient reductions of a DistributedDataParallel wrapper."""
        enter_no_sync(window, stack)

    def total(self, window: OpenWindow, rows: float, counts: Mapping[str, float]) -> tuple[float, Mapping[str, float]]:
        """Add up rows and declared counts over the ranks, once for all attempts."""
        if self.ranks is None:
            return rows, counts
        if self._total is None:
            own = Message(names=list(counts), sums=[0.0] * len(counts), counts=list(counts.values()), samples=rows)
            agreed = agree(self.ranks, own, parameters=self.setup.room(window))
            self._total = agreed.samples, dict(zip(agreed.names, agreed.counts, strict=True))
        return self._total

    def number_rows(self, window: OpenWindow, rows: int) -> tuple[int, list[int]]:
        """Return the first rank's seed, and the rows of every rank, exchanged once for all attempts."""
        ranks = self.ranks
        if ranks is None:
            return window.seed, [rows]
        if self._numbers is None:
            attend(ranks, rows, parameters=self.setup.room(window))
            told = torch.zeros(ranks.size + 1, dtype=torch.int64, device=ranks.device)
            told[ranks.index] = rows
            if ranks.index == 0:
                told[-1] = window.seed
            ranks.sum_(told)
            *shares, seed = told.tolist()
            self._numbers = seed, shares
        return self._numbers

    def exchange(self) -> Exchange | None:
        """Return an `Exchange` for representations; from now on, the other ranks wait in this exchange."""
        self.talk = None if self.ranks is None else Exchange(self.ranks, together=self.passes_together)
        return self.talk

    def across(self) -> Across | None:
        """Return an `Across` for batch statistics; from now on, the other ranks wait in this exchange."""
        ranks = self.ranks
        if ranks is None:
            return None
        self.talk = Across(
            size=ranks.size,
            index=ranks.index,
            device=ranks.device,
            add_=ranks.sum_,
            share=ranks.share,
            failures=ranks.failures,
        )
        return self.talk

    def speak(self, conversation: Across | Exchange | None) -> None:
        """Set the exchange in which the other ranks wait for this one."""
        self.talk = conversation

    # -- the end -------------------------------------------------------------------------------------------------------

    def check(self, window: OpenWindow) -> None:
        """Start the gradient sums of a rank without a microbatch, because rank 0 may have to add optimizer state."""
        window.gradients.begin(lambda: 1.0)

    def meet(self, window: OpenWindow) -> Met:
        """Agree on sums and counts in one small message, then reduce the gradients."""
        message = self.message(window, sum(window.done))
        self._waited = False
        agreed = self.agree(window, message)
        counts = dict(zip(agreed.names, agreed.counts, strict=True))
        factor = window.denominator.factor(counts) if any(agreed.counts) else 1.0
        window.gradients.fill(agreed.present, agreed.sparse)
        window.gradients.settle(factor)
        self.reduce(window, agreed, factor)
        return self.met(window, agreed, agreed.sums, counts)

    def message(self, window: OpenWindow, samples: float) -> Message:
        """Reserve memory for the reduction, and create this rank's message about its window: a host synchronisation."""
        self.reserve(window)
        denominator, device = window.denominator, window.device
        totals, spoke = denominator.totals(device), denominator.contributed
        flat = numbers_of([number for pair in totals for number in pair], device)
        message = Message(
            names=denominator.names if spoke else (),
            sums=flat[0::2] if spoke else (),
            counts=flat[1::2] if spoke else (),
            samples=samples,
            double=denominator.dtype == torch.float64,
            present=self.present(window),
            sparse=window.gradients.sparse,
            steps=self._steps,
            metrics=len(denominator.metrics),
        )
        return self.setup.arrive(window, message)

    def reserve(self, window: OpenWindow) -> None:
        """Reserve memory for a bucket, while the other ranks can still be notified of a failure."""
        if self.ranks is not None:
            totals, dtypes = self._to_reduce(window)
            reserve(totals, dtypes=dtypes, flat=self._flat)

    def agree(self, window: OpenWindow, message: Message | None) -> Message:
        """Add up the messages of the ranks; `None` means that this rank failed."""
        assert self.ranks is not None  # noqa: S101 - a subclass without ranks overrides this
        return agree(self.ranks, message, parameters=self.setup.room(window))

    def reduce(self, window: OpenWindow, agreed: Message, factor: float) -> None:
        """Multiply the gradients by this rank's factor, and reduce them."""
        assert self.ranks is not None  # noqa: S101 - a subclass without ranks overrides this
        totals, dtypes = self._to_reduce(window)
        reduce_(self.ranks, totals, factor, dtypes=dtypes, flat=self._flat)
        places = [place for place, sparse in enumerate(agreed.sparse) if sparse]
        if places:
            gradients = window.gradients
            sums = {id(each.parameter): total for each, total in gradients.gradients()}
            like = [gradients.named[place].parameter for place in places]
            dtypes = [gradients.zeros(place).dtype for place in places]
            own = [sums.get(id(each)) for each in like]
            found = reduce_sparse(self.ranks, own, factor, like=like, dtypes=dtypes)
            for place, total in zip(places, found, strict=True):
                gradients.put(place, total)

    def held(self) -> set[int]:
        """Return the ids of the parameters whose gradients the model reduces itself."""
        return set()

    def norm(self, window: OpenWindow) -> Tensor:
        """Return the norm of the reduced gradients."""
        return unscaled_norm(window)

    def met(self, window: OpenWindow, agreed: Message, sums: Sequence[float], counts: Mapping[str, float]) -> Met:
        """Create the results of the window, after gradients are reduced and divided."""
        self._present = {index for index, present in enumerate(agreed.present) if present}
        norm = self.norm(window)
        return Met(
            names=agreed.names,
            sums=sums,
            counts=counts,
            samples=agreed.samples,
            dtype=torch.float64 if agreed.double else torch.float32,
            norm=norm,
            host_norm=norm.item(),
            normalized=True,
            present=agreed.present,
            metrics=self._total_metrics(window) if agreed.metrics else {},
        )

    def _total_metrics(self, window: OpenWindow) -> dict[str, Tensor]:
        """Add up the metrics of all ranks by name."""
        device, metrics = window.device, window.denominator.metrics
        dtype = wide_dtype(device)
        values = torch.stack([value.to(device, dtype) for value in metrics.values()]).tolist() if metrics else []
        total: dict[str, float] = {}
        for told in self.tell_metrics(dict(zip(metrics, values, strict=True))):
            for name, value in told.items():
                total[name] = total.get(name, 0.0) + value
        return {name: torch.tensor(value, dtype=dtype, device=device) for name, value in total.items()}

    def tell_metrics(self, own: dict[str, float]) -> list[dict[str, float]]:
        """Return the metrics of every rank."""
        return [own] if self.ranks is None else self.ranks.tell(own)

    def add_up(self, numbers: list[float]) -> list[float]:
        """Add up numbers over the ranks in one small all-reduce."""
        if self.ranks is None:
            return numbers
        total = torch.tensor(numbers, dtype=wide_dtype(self.ranks.device), device=self.ranks.device)
        self.ranks.sum_(total)
        return total.tolist()

    def stepping(self, window: OpenWindow, met: Met) -> AbstractContextManager[object]:
        """Make all ranks or none take the step, if it updates parameters for the first time and creates state."""
        if self.ranks is None or self._present <= self._updated:
            return nullcontext()
        return all_or_none(self.ranks, window)

    def done(self, window: OpenWindow, step: Step) -> None:
        """Count a window that all ranks have ended."""
        del step
        self._steps += 1
        self._updated |= self._present if window.stepped else set()

    def figures(self, window: OpenWindow) -> dict[str, Any]:
        """Return the bytes that this rank sent, and the number of collectives."""
        ranks = self.ranks
        return {} if ranks is None else {"comm_bytes": ranks.sent_bytes, "comm_calls": ranks.calls}

    # -- failures ------------------------------------------------------------------------------------------------------

    def late(self, window: OpenWindow) -> bool:
        """Return whether the ranks have agreed already, or have shared statistics that an attempt would need again."""
        talk = self.talk
        over = talk is not None and talk.over
        met = window.passes.keeps and isinstance(talk, Exchange) and not talk.begun
        return self.ranks is not None and (not self.waited(window) or over or met)

    def waited(self, window: OpenWindow) -> bool:
        """Return whether the other ranks wait for this one's message about its window."""
        del window
        return self._waited

    def fail(self, window: OpenWindow, error: BaseException, *, again: bool) -> bool:
        """Notify the ranks that wait for this one, unless the error came from another rank."""
        self.setup.name_lost(error)
        if not again:
            self.setup.record(error)
        if not self.waited(window) or not isinstance(error, Exception) or isinstance(error, RankError):
            return again
        try:
            if self.talk is not None and not self.talk.over:
                self.talk.fail(again=again)
            else:
                again = self.tell_failure(window, again=again)
        except Exception as told:
            if isinstance(told, RankError) or is_of_the_group(told):
                return False  # another rank has given up, or is lost, and this rank raises its own error
            raise
        self.setup.told()
        return again

    def tell_failure(self, window: OpenWindow, *, again: bool) -> bool:
        """Notify the ranks that wait at the end of the window; if this rank runs its batch again, they keep waiting."""
        if not again and self.ranks is not None:
            agree(self.ranks, None, parameters=self.setup.room(window))
        return again

    def _to_reduce(self, window: OpenWindow) -> tuple[list[Tensor], list[torch.dtype]]:
        """Return the gradients that are not reduced yet, and the dtypes to reduce them in."""
        narrow, held = window.options.ranks.reduce_dtype is None, self.held()
        found = [
            (local_of(total), each.parameter.dtype if narrow else torch.promote_types(total.dtype, torch.float32))
            for each, total in window.gradients.gradients()
            if id(each.parameter) not in held and not total.is_sparse
        ]
        return [total for total, _ in found], [dtype for _, dtype in found]
