"""What the ranks that have a model's stages between them tell one another, beside what the passes hand on."""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from microbatch.errors import BatchError, ConfigError, RankError
from microbatch.ranks.agreement import Message, agree
from microbatch.ranks.pipeline import Pipeline
from microbatch.ranks.process_group import Ranks

_SOME = 16  # numbers of a weight that tell it from others


class Stages:
    """The ranks that have the stages of one model between them, and what they tell one another beside its passes.

    Whatever one of them learns of a failure it passes on to its data-parallel ranks, who wait for its word.

    Args:
        pipeline: This rank's stages.
        ranks: The data-parallel ranks, which have the same stages; `None` if there is only this one.

    Attributes:
        ranks: Likewise.

    Source:
        Laws N3, N9, R2.
    """

    def __init__(self, pipeline: Pipeline, ranks: Ranks | None) -> None:
        self._stages = Ranks(pipeline.group, pipeline.device)
        self.ranks = ranks

    def first_of(self, number: int) -> int:
        """Return the number that the first of the ranks gives.

        Args:
            number: This one's.

        Returns:
            The first one's.

        Cost:
            Two small all-gathers.
        """
        return self._stages.tell(number)[0]

    def warn_of_twins(self, model: nn.Module) -> None:
        """Warn of weights on different ranks that are alike, as a tied embedding and head are.

        Args:
            model: This rank's stages.

        Cost:
            Two small all-gathers, and a host synchronisation for every weight.
        """
        told, first = self._stages.tell(_marks(model)), dict[Any, tuple[int, str]]()
        for rank, marks in enumerate(told):
            for mark, name in marks.items():
                where, twin = first.setdefault(mark, (rank, name))
                if where != rank:
                    warnings.warn(
                        f"{twin!r} on rank {where} of the pipeline and {name!r} on rank {rank} have the same values. "
                        "If they are one parameter of the model, they are two now that it is split, each with a part "
                        "of the gradient: untie them, or put both into stages of one rank",
                        stacklevel=2,
                    )

    def attend(self, rows: int, passes: int, *, first: int, parameters: int) -> None:
        """See to it that every stage is there, with the same batch.

        Args:
            rows: Rows of this rank's.
            passes: That it will run.
            first: What its first row is told by; below ``2**16``.
            parameters: How many gradients this rank has.

        Raises:
            BatchError: They were given different ones.
            RankError: A stage failed.

        Cost:
            An all-reduce of 6,500 bytes, and a host synchronisation.
        """
        said = {"first": float(first), "passes": float(passes), "rows": float(rows)}
        squares = [number**2 for number in said.values()]
        told = self._agree(_message(list(said), list(said.values()), squares), parameters)
        # Equal numbers, and only they, have this; every rank sees it alike.
        if any(self._stages.size * square != total**2 for total, square in zip(told.sums, told.counts, strict=True)):
            raise BatchError(
                "the ranks of a pipeline were given different batches, or microbatch sizes: all of them run the same "
                f"microbatches, so pass the same batch on each (here it has {rows} rows, in {passes} passes), and give "
                "each pipeline, not each rank, a share of the data"
            )

    def agree(self, message: Message | None, *, parameters: int) -> Message:
        """Add up what the stages say, and then, over the data-parallel ranks, what the pipelines do.

        Args:
            message: What this rank says: its loss on the last stage, elsewhere none; `None` says that it failed.
            parameters: How many gradients this rank has.

        Returns:
            The sums over all ranks.

        Raises:
            RankError: A rank failed, or they have different terms, or are at different steps.

        Cost:
            Two all-reduces of 6,500 bytes, and a host synchronisation after each.
        """
        # Gradients are of this stage alone.
        whole = self._agree(None if message is None else replace(message, present=[]), parameters)
        whole = replace(whole, present=[] if message is None else message.present)
        if self.ranks is None:
            return whole
        return agree(self.ranks, None if message is None else whole, parameters=parameters)

    def norm(self, own: Tensor) -> Tensor:
        """Return the norm of all stages' gradients.

        Args:
            own: This rank's; shape ``()``.

        Returns:
            The whole one; infinite or NaN if any of them is.

        Cost:
            One all-reduce of 8 bytes.
        """
        square = own.double().square()
        self._stages.sum_(square)
        return square.sqrt()

    def _agree(self, message: Message | None, parameters: int) -> Message:
        try:
            return agree(self._stages, message, parameters=0)
        except RankError:
            if self.ranks is not None:
                with suppress(RankError):
                    agree(self.ranks, None, parameters=parameters)
            raise


def check_beside(pipeline: Pipeline, group: Any, *, given: bool) -> None:
    """Refuse data-parallel ranks that are stages of the same pipeline.

    Args:
        pipeline: This rank's stages.
        group: The data-parallel ranks; `None` for the default group.
        given: Whether somebody has said which they are.

    Raises:
        ConfigError: They overlap, or nobody has said which they are, and there are others than the stages.
    """
    stages, me = set(dist.get_process_group_ranks(pipeline.group)), dist.get_rank()
    if not given:
        if len(stages) == dist.get_world_size():
            return
        raise ConfigError(
            f"the pipeline has {len(stages)} of {dist.get_world_size()} ranks: say which ranks have the same stages as "
            'this one, process_group=mesh["dp"] of a DeviceMesh with the dimensions "dp" and "pp"'
        )
    others = set(dist.get_process_group_ranks(group))
    if stages & others != {me}:
        raise ConfigError(
            f"process_group= has the ranks {sorted(others)}, and the stages of this rank's pipeline are on "
            f"{sorted(stages)}: they may have this rank ({me}) in common, and no other"
        )


def _marks(model: nn.Module) -> dict[Any, str]:
    """Tell the trained weights by some of their numbers."""
    marks: dict[Any, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // _SOME)].tolist()
            if len(set(some)) > 1:  # weights that begin as zeros are alike without being one
                marks[tuple(parameter.shape), *some] = name
    return marks


def _message(names: list[str], sums: list[float], counts: list[float]) -> Message:
    return Message(names=names, sums=sums, counts=counts, samples=0.0, double=False, present=[])
