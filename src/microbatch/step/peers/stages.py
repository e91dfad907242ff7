"""The ranks of a pipeline: the stages of a model, and data-parallel copies of these stages."""

from __future__ import annotations

from torch import Tensor

from microbatch.errors import RankError
from microbatch.ranks.agreement import Message
from microbatch.ranks.process_group import RankGroup
from microbatch.ranks.stage_ranks import Stages
from microbatch.step.part import OpenWindow
from microbatch.step.peers.data_parallel import DataParallel


class StagePeers(DataParallel):
    """Ranks that hold the stages of one model, and optional data-parallel ranks.

    Source:
        Laws N3, N9, R2.
    """

    _stages: Stages

    def find(self, window: OpenWindow) -> None:
        """Find the stages and the data-parallel ranks."""
        super().find(window)
        pipeline = window.options.pipeline
        assert pipeline is not None  # noqa: S101 - these peers are for pipelines
        self._stages = Stages(pipeline, self.ranks)

    def groups(self) -> list[tuple[RankGroup, bool]]:
        """Return the ranks of the pipeline, whose parameters differ, and the data-parallel ranks."""
        return [(self._stages.group, False), *super().groups()]

    def share_weights(self, window: OpenWindow) -> None:
        """Warn of weights that stages share, and set the first stage's seed on all stages."""
        self._stages.warn_of_twins(window.options.model)
        assert window.setup.history.seed is not None  # noqa: S101 - the window has set it
        window.setup.history.seed = self._stages.group.tell(window.setup.history.seed)[0]
        super().share_weights(window)

    def attend(self, window: OpenWindow, rows: int, passes: int, *, first: int) -> None:
        """Check that every stage has the same rows, passes and first row."""
        self._stages.attend(rows, passes, first=first, parameters=self.setup.room(window))

    def listen(self, *, on: bool) -> None:
        """Set whether the other stages can be notified of a failure; inside a pass, they wait only for tensors."""
        self._waited = on

    def message(self, window: OpenWindow, samples: float) -> Message:
        """Create this rank's message; only the last stage reports the rows, which are the same for all stages."""
        pipeline = window.options.pipeline
        return super().message(window, samples if pipeline is not None and pipeline.is_last else 0)

    def agree(self, window: OpenWindow, message: Message | None) -> Message:
        """Add up the messages of the stages, then those of the pipelines."""
        return self._stages.agree(message, parameters=self.setup.room(window))

    def reduce(self, window: OpenWindow, agreed: Message, factor: float) -> None:
        """Reduce over the data-parallel ranks, if there are any."""
        if self.ranks is None:
            window.gradients.scale_(factor)
        else:
            super().reduce(window, agreed, factor)

    def norm(self, window: OpenWindow) -> Tensor:
        """Return the norm of the gradients of all stages."""
        return self._stages.norm(super().norm(window))

    def tell_metrics(self, own: dict[str, float]) -> list[dict[str, float]]:
        """Return the metrics of every pipeline, from its last stage."""
        told = self._stages.group.tell(own)
        merged = {name: value for each in told for name, value in each.items()}
        return super().tell_metrics(merged)

    def late(self, window: OpenWindow) -> bool:
        """Return whether the ranks have agreed already."""
        return not self.waited(window)

    def fail(self, window: OpenWindow, error: BaseException, *, again: bool) -> bool:
        """Notify the stages; a pipeline's batch is not run again, because only the failed stage knows its memory."""
        self.setup.name_lost(error)
        self.setup.record(error)
        if self.waited(window) and isinstance(error, Exception) and not isinstance(error, RankError):
            self._stages.agree(None, parameters=self.setup.room(window))
            self.setup.told()
        return again
