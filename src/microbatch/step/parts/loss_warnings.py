"""Warn about losses that are probably not the large batch's: means over unequal counts, and contrastive losses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from torch import Tensor

from microbatch.errors import BatchError
from microbatch.loss.coupling import listen, stop
from microbatch.pages import page
from microbatch.step.cutting import Cutting
from microbatch.step.part import OpenWindow, Part, Run
from microbatch.step.parts.row_comparison import compares_rows
from microbatch.step.parts.target_counts import Mean, Unequal, is_sum, mean_behind, unequal_in, unequal_means
from microbatch.step.record import Step

_WINDOWS = 4  # windows that are looked at


class CountWarning(Part):
    """Warn about a plain mean whose microbatches have different numbers of targets, and about a plain sum.

    Source:
        Law S1.
    """

    first_windows = _WINDOWS

    def __init__(self) -> None:
        self._found: Unequal | None = None
        self._means: dict[tuple[int, int], list[Mean]] = {}  # by term
        self._sums = False

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Read from each loss what torch's cross entropy divided by."""
        self._found, self._means, self._sums = None, {}, False
        return partial(self._run, window, run)

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Find labels or masks that count differently in the microbatches."""
        if cutting.microbatches < 2 or cutting.rows is None:
            return
        try:
            self._found = unequal_in(batch, cutting)
        except BatchError:  # a loader's microbatches may be any objects
            self._found = None

    def done(self, window: OpenWindow, step: Step) -> None:
        """Warn if the loss was a plain mean over the rows of each microbatch."""
        found, self._found = self._found or next(filter(None, map(unequal_means, self._means.values())), None), None
        self._means = {}
        if not window.denominator.means or window.coupled is not None:
            return
        if self._sums and step.microbatches > 1:
            self._warn_of_sum(window)
            return
        if found is None:
            return
        use = "window.backward(mb.Loss({}))" if window.function is None else "return mb.Loss({})"
        window.setup.warn(
            "counts",
            f"the loss is a plain mean, and the microbatches have between {found.least:g} and {found.most:g} targets a "
            f"row by {found.path}: if the mean is over these targets, the gradient is not the large batch's. Use their "
            "sum with their count:\n"
            f"    n = {found.count}\n"
            f"    {use.format('sum=loss * n, count=n')}\n"
            "(a causal language model predicts the next token: count labels[:, 1:]). If the mean is over rows, "
            f"{use.format('sum=loss * rows, count=rows')}",
        )

    def _warn_of_sum(self, window: OpenWindow) -> None:
        window.setup.warn(
            "sums",
            'the loss is a sum (reduction="sum"), and a plain loss stands for the mean over the rows of a microbatch, '
            "so the gradient depends on the microbatch size. Give the sum with its count: "
            'mb.Loss(sum=loss, count=len(labels)), or use reduction="mean" where every row has one target',
        )

    def _run(self, window: OpenWindow, run: Run, tensors: Sequence[Tensor], seeds: Sequence[Tensor]) -> object:
        for term, loss in enumerate(tensors if window.rows else ()):
            mean = mean_behind(loss, window.rows or 0)
            self._sums = self._sums or is_sum(loss)
            if mean is not None:
                self._means.setdefault((len(tensors), term), []).append(mean)
        return run(tensors, seeds)


class CouplingWarning(Part):
    """Warn about a contrastive loss that sees one microbatch at a time.

    The library's own losses report themselves. A loss written by hand is recognised by its graph, in the first windows.

    Source:
        Law S8.
    """

    def __init__(self) -> None:
        self._names = set[str]()
        self._compared = 0

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Notice contrastive losses until the end of the window."""
        self._names, self._compared = listen(), 0

    def put_back(self, window: OpenWindow, error: BaseException) -> None:
        """Stop noticing."""
        stop()

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Read each loss's graph."""
        return run if window.setup.history.here >= _WINDOWS else partial(self._run, window, run)

    def done(self, window: OpenWindow, step: Step) -> None:
        """Stop noticing, and warn if a cut window computed one without ``encode=``."""
        stop()
        if window.coupled is not None or step.microbatches < 2:
            return
        if self._names:
            name = min(self._names)
            what = f"mb.losses.{name} compared the samples of one microbatch only, and not those of the whole batch"
            window.setup.warn("coupled loss", _encode_first(what, f"mb.losses.{name}(*encoded, ...)"))
        elif self._compared >= step.microbatches:
            what = (
                "the loss compares the samples of one microbatch with each other (a cross entropy over the products of "
                "their representations), and not with those of the whole batch"
            )
            window.setup.warn("coupled loss", _encode_first(what, "loss(*encoded)"))

    def _run(self, window: OpenWindow, run: Run, tensors: Sequence[Tensor], seeds: Sequence[Tensor]) -> object:
        if any(compares_rows(loss, window.rows or 0) for loss in tensors):
            self._compared += 1
        return run(tensors, seeds)


def _encode_first(what: str, call: str) -> str:
    return (
        f"{what}. Encode first, and compute the loss of all representations:\n"
        f"    accumulator.step(batch, lambda model, encoded: {call}, encode=encode)\n"
        f"where encode(model, microbatch) returns the representations ({page('coupled')}). If it is meant, "
        'call warnings.filterwarnings("ignore", category=mb.MicrobatchWarning)'
    )
