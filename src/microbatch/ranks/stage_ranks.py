"""Agreement among the ranks of a pipeline, on top of what its passes send between stages."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from microbatch.devices.backend import to_wide
from microbatch.errors import BatchError, ConfigError, RankError
from microbatch.ranks.agreement import Message, agree
from microbatch.ranks.pipeline import Pipeline
from microbatch.ranks.process_group import RankGroup
from microbatch.warned import warn

_SOME = 16  # elements of a weight that identify it


class Stages:
    """The ranks of one pipeline, together with this rank's data-parallel group.

    If a stage fails, every rank of the pipeline reports the failure to its data-parallel ranks, which wait for it.

    Args:
        pipeline: This rank's stages.
        ranks: The data-parallel ranks, which have the same stages; `None` if there is one pipeline only.

    Source:
        Laws N3, N9, R2.
    """

    def __init__(self, pipeline: Pipeline, ranks: RankGroup | None) -> None:
        self.group = RankGroup(pipeline.group, pipeline.device)
        self.ranks = ranks

    def warn_of_twins(self, model: nn.Module) -> None:
        """Warn about equal weights on different ranks, which may be one tied weight, such as embedding and head."""
        found, first = self.group.tell(_fingerprints(model)), dict[Any, tuple[int, str]]()
        for rank, fingerprints in enumerate(found):
            for fingerprint, name in fingerprints.items():
                where, twin = first.setdefault(fingerprint, (rank, name))
                if where != rank:
                    warn(
                        f"{twin!r} on rank {where} of the pipeline and {name!r} on rank {rank} have the same values. "
                        "If they are one tied parameter, splitting the model made two parameters of it, each with a "
                        "part of the gradient: untie them, or put both into stages of one rank",
                    )

    def attend(self, rows: int, passes: int, *, first: int, parameters: int) -> None:
        """Check that no stage has failed, and that all ranks of the pipeline have the same batch.

        Args:
            rows: Number of rows in this rank's batch.
            passes: Number of passes that this rank will run.
            first: A hash of the batch's first row; below ``2**16``.
            parameters: Number of gradients on this rank.

        Raises:
            BatchError: The ranks have different batches or microbatch sizes.
            RankError: A stage failed.

        Cost:
            One all-reduce of 6,500 bytes, and one host synchronisation.
        """
        own = {"first": float(first), "passes": float(passes), "rows": float(rows)}
        squares = [number**2 for number in own.values()]
        found = self._agree(Message(names=list(own), sums=list(own.values()), counts=squares), parameters)
        # n * sum(x^2) == sum(x)^2 only if all n numbers are equal, and every rank gets the same answer.
        if any(self.group.size * square != total**2 for total, square in zip(found.sums, found.counts, strict=True)):
            raise BatchError(
                "the ranks of a pipeline were given different batches or microbatch sizes, but all of them run the "
                f"same microbatches; this rank has {rows} rows in {passes} passes. Pass the same batch on every rank "
                "of a pipeline, and give each pipeline, not each rank, a share of the data"
            )

    def agree(self, message: Message | None, *, parameters: int) -> Message:
        """Sum the messages of all stages, and then the sums of all pipelines over the data-parallel ranks.

        Args:
            message: This rank's message, which has a loss only on the last stage; `None` if this rank failed.
            parameters: Number of gradients on this rank.

        Returns:
            The sums over all ranks.

        Raises:
            RankError: A rank failed, or ranks are at different steps, or their losses have different terms.

        Cost:
            Two all-reduces of 6,500 bytes, and one host synchronisation after each.
        """
        # Each stage has parameters of its own, so which gradients exist is not summed over stages.
        whole = self._agree(message and replace(message, present=[], sparse=[], trained=0), parameters)
        if message is not None:
            kept = {name: getattr(message, name) for name in ("present", "sparse", "trained", "describe")}
            whole = replace(whole, **kept)
        if self.ranks is None:
            return whole
        return agree(self.ranks, None if message is None else whole, parameters=parameters)

    def norm(self, own: Tensor) -> Tensor:
        """Return the gradient norm of the whole model from that of this stage, in one all-reduce of 8 bytes."""
        square = to_wide(own).square()
        self.group.sum_(square)
        return square.sqrt()

    def _agree(self, message: Message | None, parameters: int) -> Message:
        try:
            return agree(self.group, message, parameters=0)
        except RankError:
            if self.ranks is not None:
                with suppress(RankError):
                    agree(self.ranks, None, parameters=parameters)
            raise


def check_beside(pipeline: Pipeline, group: Any, *, given: bool) -> None:
    """Refuse a data-parallel process group that contains other stages of the same pipeline."""
    stages, me = set(dist.get_process_group_ranks(pipeline.group)), dist.get_rank()
    if not given:
        if len(stages) == dist.get_world_size():
            return
        raise ConfigError(
            f"the pipeline has {len(stages)} of {dist.get_world_size()} ranks, so ranks=mb.Ranks(group=...) is needed: "
            'pass the ranks that have the same stages as this one, for example mesh["dp"] of a DeviceMesh with the '
            'dimensions "dp" and "pp"'
        )
    others = set(dist.get_process_group_ranks(group))
    if stages & others != {me}:
        raise ConfigError(
            f"Ranks: group has the ranks {sorted(others)}, and this rank's pipeline has the ranks {sorted(stages)}: "
            f"only this rank ({me}) may be in both"
        )


def _fingerprints(model: nn.Module) -> dict[Any, str]:
    """Return the names of the trainable matrices by their shape and a few of their elements."""
    fingerprints: dict[Any, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // _SOME)].tolist()
            if len(set(some)) > 1:  # several weights may be initialised to one constant without being tied
                fingerprints[tuple(parameter.shape), *some] = name
    return fingerprints
