"""Where a rank stands among those of its run: which rows of a batch are its, and which part of the model."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from microbatch.errors import CheckpointError, ConfigError
from microbatch.ranks.pipeline import Pipeline
from microbatch.ranks.process_group import RankGroup
from microbatch.train.config import Settings
from microbatch.train.job import Job

STAGES = "stages"
"""In a checkpoint's state: what each rank of a pipeline has alone, by the stages that it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Say which rows of a batch, and which part of the model, a rank has.

    Attributes:
        ranks: Ranks of the run; at least 1.
        shares: Parts that a batch is dealt into: one for each rank, or, of a model in stages, for each pipeline.
        share: Which of them is this rank's, from 0.
        group: Process group of the ranks that have the same stages; `None` for all ranks, or where there is no other.
        stages: This rank's stages, ``"0 of 2"``; empty for a whole model.
        parameters: Trained numbers of all stages; `None` for a whole model, which can be asked.
    """

    ranks: int = 1
    shares: int = 1
    share: int = 0
    group: Any = None
    stages: str = ""
    parameters: int | None = None


def find_place(job: Job, ranks: RankGroup | None, *, patience: float) -> Place:
    """Find out where this rank stands.

    Ranks that have the same stages are data-parallel to one another, and so are pipelines, in the order of their first
    ranks: nobody has to say it twice.

    Args:
        job: The job, whose model may be a pipeline.
        ranks: All ranks of the run, each of which calls this; `None` for a single process.
        patience: Seconds that a rank waits for the others that have its stages.

    Returns:
        Its place.

    Raises:
        ConfigError: Some ranks have a pipeline and others a whole model, or the pipelines are not alike.

    Cost:
        Two small all-gathers; for several pipelines, a process group for each of the ranks of one.
    """
    model = job.model
    own = _said_by(model) if isinstance(model, Pipeline) else None
    told = [own] if ranks is None else ranks.tell(own)
    if own is None and not any(told):
        return Place() if ranks is None else Place(ranks=ranks.size, shares=ranks.size, share=ranks.index)
    said = [each for each in told if each is not None]
    if own is None or len(said) < len(told):
        whole = [rank for rank, each in enumerate(told) if each is None]
        raise ConfigError(
            f"the job's model is a Pipeline on some ranks, and none on {_listed(whole)}: make every rank's stages, as "
            "many pipelines as fit the number of ranks"
        )
    pipelines = sorted({members for members, _, _ in said})
    layouts = {tuple(stages for members, stages, _ in said if members == each) for each in pipelines}
    if len(layouts) > 1 or sorted(rank for members in pipelines for rank in members) != list(range(len(told))):
        raise ConfigError(
            f"the pipelines are on {'; '.join(map(_listed, pipelines))}: each rank must be in one pipeline, and all "
            "pipelines must have the same stages in the same order. A DeviceMesh of ranks by stages makes such groups"
        )
    place = Place(
        ranks=len(told),
        shares=len(pipelines),
        share=pipelines.index(own[0]),
        stages=own[1],
        parameters=sum(numbers for members, _, numbers in said if members == own[0]),
    )
    if len(pipelines) == 1:
        return place
    for stages in dict.fromkeys(each for _, each, _ in said):
        # All ranks make all groups, in one order, also those that they are not in.
        alike = [rank for rank, each in enumerate(said) if each[1] == stages]
        group = dist.new_group(alike, timeout=dt.timedelta(seconds=patience))
        if stages == own[1]:
            place = replace(place, group=group)
    return place


def check_piped_job(settings: Settings, job: Job) -> None:
    """Refuse what a run has no use of in a pipeline; what a step has none of, the accumulator refuses.

    Args:
        settings: The user's.
        job: The job, whose model is a pipeline.

    Raises:
        ConfigError: Something is of that kind; the message says what to do.
    """
    auto = settings.microbatch_size == "auto" or (settings.microbatch_size is None and job.microbatch_size is None)
    for given, name, instead in [
        (auto, "a microbatch size that is to be found", "pass one, Job(microbatch_size=) or --microbatch-size"),
        (settings.shard != "none", "--shard", "keep each stage whole on its rank, or split into more stages"),
        (settings.deterministic, "--deterministic", "its sums are torch's own, in the order of its schedule"),
        (job.encode is not None, "Job(encode=)", "its losses are of one microbatch at a time"),
        (job.show is not None, "Job(show=)", "no rank has a model to call; leave it out where the model is a Pipeline"),
    ]:
        if given:
            raise ConfigError(f"the job's model is a Pipeline, with which {name} does not go: {instead}")


def named_by_stage(model: Pipeline, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name tensors by the stages of the whole model, and not by those that this rank has.

    Args:
        model: This rank's stages.
        tensors: By their names in it, ``"parts.0.weight"``.

    Returns:
        The same by names that no other stage has, ``"stage-2.weight"``.
    """
    return {_global(model, name): tensor for name, tensor in tensors.items()}


def named_by_rank(model: Pipeline, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `named_by_stage`, and leave out what is of other ranks' stages.

    Args:
        model: This rank's stages.
        tensors: Of all stages, by the names that they have there.

    Returns:
        Those of this rank's stages, by their names in it.
    """
    here = {stage.stage_index: place for place, stage in enumerate(model.stages)}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stage, _, rest = name.partition(".")
        index = int(stage.removeprefix("stage-"))
        if index in here:
            found[f"parts.{here[index]}.{rest}"] = tensor
    return found


def own_state(state: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
    """Take what this rank has alone out of a checkpoint's state.

    Args:
        state: The state.
        place: Where the rank stands.

    Returns:
        Its part; of a whole model, all of it.

    Raises:
        CheckpointError: The model was split in another way, or is split only now, or only then.
    """
    found = state.get(STAGES, {})
    if not place.stages and not found:
        return state
    if place.stages not in found:
        then, now = (f"in stages ({'; '.join(found)})" if found else "whole"), place.stages or "the whole of it"
        raise CheckpointError(
            f"the checkpoint has the model {then}, and this rank has {now}: go on with the model split as it was; the "
            "number of pipelines may be another one"
        )
    return found[place.stages]


def _said_by(model: Pipeline) -> tuple[tuple[int, ...], str, int]:
    """Say on which ranks a rank's pipeline is, which stages it has itself, and of how many trained numbers."""
    number = sum(each.numel() for each in model.parameters() if each.requires_grad)
    indices = ",".join(str(stage.stage_index) for stage in model.stages)
    members = tuple(dist.get_process_group_ranks(model.group))
    return members, f"{indices} of {model.stages[0].num_stages}", number


def _global(model: Pipeline, name: str) -> str:
    _, place, rest = name.split(".", 2)
    return f"stage-{model.stages[int(place)].stage_index}.{rest}"


def _listed(ranks: Any) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
