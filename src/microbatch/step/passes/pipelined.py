"""Run the microbatches of a window through a pipeline's schedule, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from microbatch.batch.batch_tree import rows_of
from microbatch.batch.batches import Batches
from microbatch.errors import BatchError, EmptyBatchError
from microbatch.step.part import Function, OpenWindow, Passes
from microbatch.step.passes.stage_run import StageRun


class Pipelined(Passes):
    """Run all microbatches of a window with one of torch's pipeline schedules.

    Source:
        Laws N1 to N9, R2.
    """

    def losses(self, window: OpenWindow, batch: object, loss_fn: Function) -> Iterator[Any]:
        """Run all passes, and yield nothing, because the schedule runs each backward itself."""
        options, denominator, peers = window.options, window.denominator, window.peers
        size = options.microbatch_size
        assert options.pipeline is not None  # noqa: S101 - these passes are for pipelines
        assert isinstance(size, int)  # noqa: S101 - with a pipeline, "auto" has been refused
        if isinstance(batch, Batches):
            raise BatchError("a Pipeline's stages pass on equal shapes, and mb.Batches has several: pad the batches")
        rows, size = rows_of(batch), window.setup.sizing(rows_of(batch)).rows
        if not rows and peers.size == 1:
            raise EmptyBatchError("the batch has 0 rows; skip empty batches before they reach the training step")
        run = StageRun(options.pipeline, autocast=options.autocast)
        run.line_up(batch, loss_fn, size=size, seed=window.seed)
        peers.attend(window, rows, run.passes, first=run.first)
        denominator.expect([batch], rows, begun=bool(window.done), total=partial(peers.total, window))
        denominator.share(float(rows))
        window.planned = len(run.rows)
        window.gradients.check_untouched()
        # A stage that fails inside a pass cannot notify the others, which wait for its output tensors.
        peers.listen(on=False)
        run.run(denominator)
        peers.listen(on=True)
        run.count(denominator)
        window.gradients.mark()
        for each in run.rows:
            window.went(each)
        yield from ()
