"""A model split into stages over ranks, which run by a schedule of torch's own."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from microbatch.errors import ConfigError, RankError, WindowError

# Those whose backward is autograd's own, weights included; by name, as torch's get_schedule_class has them.
_SCHEDULES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved1f1b": "ScheduleInterleaved1F1B",
    "loopedbfs": "ScheduleLoopedBFS",
}
_SEVERAL = {"ScheduleInterleaved1F1B", "ScheduleLoopedBFS"}  # stages a rank


class Pipeline(nn.Module):
    """Say which stages of a split model this rank has, and by which schedule they run.

    It takes the place of the model: ``Accumulator(Pipeline(stage), optimizer, microbatch_size=4)``. Every rank of the
    pipeline passes the same batch and the same ``loss_fn(model, microbatch)``, the one that it would have on a single
    device; the gradient is the whole batch's. See ``docs/pipeline.md``.

    Args:
        stages: This rank's `torch.distributed.pipelining.PipelineStage`, or several of them in a list.
        schedule: ``"GPipe"`` or ``"1F1B"`` for one stage a rank, ``"Interleaved1F1B"`` or ``"LoopedBFS"`` for several;
            or torch's class of one of these. `None` for 1F1B, interleaved where there are several.

    Attributes:
        stages: The stages, in order.
        parts: Their modules, whose parameters are this one's.
        scheduled: The schedule that they last ran by.

    Raises:
        ConfigError: These are no stages, or not those that this rank has to have, or the schedule cannot be used.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.pipelining import PipelineStage
        >>> import microbatch as mb
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layers = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
        >>> _ = [torch.nn.init.ones_(layer.weight) for layer in layers]
        >>> stages = [PipelineStage(layer, index, 2, torch.device("cpu")) for index, layer in enumerate(layers)]
        >>> model = mb.Pipeline(stages)  # both on this rank, as there is no other
        >>> accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.5), microbatch_size=2)
        >>> step = accumulator.step(torch.tensor([[1.0], [2.0], [3.0]]), lambda model, x: model(x).mean())
        >>> step.loss.item(), [layer.weight.item() for layer in layers]  # of v w x: both gradients are mean(x) = 2
        (2.0, [0.0, 0.0])
        >>> dist.destroy_process_group()

    Source:
        Laws N1 to N9, R1, R2.
    """

    def __init__(self, stages: Any, *, schedule: Any = None) -> None:
        super().__init__()
        self.stages: list[Any] = list(stages) if isinstance(stages, list | tuple) else [stages]
        _check_stages(self.stages)
        self.parts = nn.ModuleList(stage.submod for stage in self.stages)
        self._schedule: Any = _schedule_class(schedule, len(self.stages))
        self.scheduled = Scheduled()

    @property
    def group(self) -> Any:
        """The process group of the stages; `None` for the default one."""
        return self.stages[0].group

    @property
    def device(self) -> torch.device:
        """Where the stages compute."""
        return torch.device(self.stages[0].device)

    @property
    def is_last(self) -> bool:
        """Whether the model's output comes out of a stage of this rank."""
        return bool(self.stages[-1].is_last)

    def forward(self, *_: object, **__: object) -> Any:
        """Refuse to be called: no rank has the whole model.

        Raises:
            WindowError: Always.
        """
        raise WindowError(
            "the stages of a pipeline run by their schedule, on all ranks together: call accumulator.step(batch, "
            "loss_fn) to train, and the eval() of one of torch's schedules to evaluate"
        )

    def passes(self, microbatches: int) -> int:
        """Say how many passes the schedule makes for so many microbatches, the last ones of nothing.

        Args:
            microbatches: At least 1.

        Returns:
            As many, or more where the schedule wants a least number or a multiple.
        """
        stage, name = self.stages[0], self._schedule.__name__
        if name == "Schedule1F1B":
            return max(microbatches, stage.num_stages)
        while name == "ScheduleInterleaved1F1B" and microbatches % max(1, microbatches // stage.group_size):
            microbatches += 1
        return microbatches

    def schedule(self, passes: int, loss_fn: Callable[[Any, Tensor], Tensor]) -> Any:
        """Make torch's schedule of so many passes.

        Args:
            passes: As `passes` says.
            loss_fn: Called on the last stage with the model's output and the number of the pass.

        Returns:
            The schedule, which leaves gradients as they add up.
        """
        stages = self.stages if self._schedule.__name__ in _SEVERAL else self.stages[0]
        return self._schedule(stages, passes, loss_fn=loss_fn, scale_grads=False)


@dataclass(frozen=True, slots=True)
class Pass:
    """What the model is called with in one pass through its stages.

    Attributes:
        args: Positional arguments, for the first stage.
        settings: Keyword arguments, for every stage.
    """

    args: tuple[Any, ...]
    settings: dict[str, Any]


class Scheduled:
    """A schedule, kept as long as passes are as many, as large, and go the same way, as before.

    A new one costs torch a pass of the first microbatch, in which the stages tell one another their shapes.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._schedule: Any = None
        self._loss_fn: Callable[[Any, Tensor], Tensor] | None = None

    def run(
        self,
        pipeline: Pipeline,
        passes: Sequence[Pass],
        *,
        loss_fn: Callable[[Any, Tensor], Tensor],
        key: object,
        backward: bool = True,
    ) -> None:
        """Run passes forward and backward.

        Args:
            pipeline: The stages.
            passes: As many as `Pipeline.passes` says, of equal shapes.
            loss_fn: Called on the last stage with the model's output and the number of the pass, from 0, as a tensor;
                what it returns is what backward begins from.
            key: The number of the passes, and their shapes; the same on every rank of the pipeline.
            backward: Whether they go backward too.

        Raises:
            RankError: Another stage did not answer.
        """
        if (key, backward) != self._key:
            self._schedule, self._key = pipeline.schedule(len(passes), self._call), (key, backward)
            self._schedule._has_backward = backward  # as its `eval` does, which cuts the batch itself
        self._loss_fn = loss_fn
        for stage in pipeline.stages:
            stage.has_backward = backward
            stage.clear_runtime_states()
        first = any(stage.is_first for stage in pipeline.stages)
        try:
            # What `step` calls with a batch that it has cut; this one was cut with care for its masks and its tail.
            self._schedule._step_microbatches(
                [each.args if first else () for each in passes],
                [each.settings for each in passes],
                [torch.tensor(index) for index in range(len(passes))],
                return_outputs=False,
            )
        except Exception as error:
            self._key = None
            if not _is_of_talking(error):
                error.add_note(
                    "microbatch: weights and gradients are as before the window. The other stages wait until this "
                    "process ends, or their process group's time-out; where memory ran out, go on with a smaller "
                    "microbatch_size"
                )
                raise
            raise RankError(
                "another stage of the pipeline failed, died or did not answer within the time-out of the process "
                f"group (its own error says why): {error}"
            ) from error
        finally:
            self._loss_fn = None
            for stage in pipeline.stages:
                stage.clear_runtime_states()

    def _call(self, output: Any, index: Tensor) -> Tensor:
        assert self._loss_fn is not None  # noqa: S101 - nobody calls it in between
        return self._loss_fn(output, index)


def _is_of_talking(error: BaseException) -> bool:
    """Tell whether a schedule's error is of talking to another stage, and not of this one's own computation."""
    # What a module raises comes out of it, or wrapped by torch, with its cause. Gloo's errors have no own type.
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    plain = type(error) is RuntimeError and error.__cause__ is None
    return isinstance(error, dist.DistError) or (plain and "distributed" in Path(innermost.filename).parts)


def _check_stages(stages: Sequence[Any]) -> None:
    needed = ("submod", "stage_index", "num_stages", "group", "group_rank", "group_size")
    for stage in stages:
        if not all(hasattr(stage, name) for name in needed):
            raise ConfigError(
                "Pipeline takes stages of torch.distributed.pipelining, PipelineStage(module, index, number, device), "
                f"not a {type(stage).__name__}"
            )
        if isinstance(stage.submod, nn.parallel.DistributedDataParallel):
            raise ConfigError(
                f"stage {stage.stage_index} is wrapped in DistributedDataParallel: give the bare module to its "
                "PipelineStage, and process_group= to the accumulator, which reduces over it"
            )
        given = getattr(stage, "_user_meta", None)
        if getattr(given, "inputs", None) is not None:
            raise ConfigError(
                f"stage {stage.stage_index} has input_args=: leave it and output_args= out, and torch finds the shapes "
                "out from the microbatches that there are"
            )
    if not stages:
        raise ConfigError("Pipeline needs at least one stage; every rank of a pipeline has as many")
    first = stages[0]
    found, due = [stage.stage_index for stage in stages], range(first.group_rank, first.num_stages, first.group_size)
    if found != list(due):
        raise ConfigError(
            f"rank {first.group_rank} of {first.group_size} has the stages {found} of {first.num_stages}, and should "
            f"have {list(due)}: stages go round the ranks, as many on each"
        )


def _schedule_class(asked: Any, stages: int) -> Any:
    default = "Interleaved1F1B" if stages > 1 else "1F1B"
    asked = default if asked is None else asked
    name = _SCHEDULES.get(asked.lower(), "") if isinstance(asked, str) else getattr(asked, "__name__", "")
    if name not in _SCHEDULES.values():
        raise ConfigError(
            'schedule must be "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS" or torch\'s class of one of these, not '
            f"{asked!r}; those that split backward in two add weight gradients up by themselves, past accumulate_dtype"
        )
    if (name in _SEVERAL) != (stages > 1):
        need = "needs several stages on each rank" if name in _SEVERAL else "takes one stage a rank"
        raise ConfigError(f"schedule {asked!r} {need}, and this one has {stages}; {default!r} would do")
    # Its room is large, and nobody else has need of it.
    return getattr(import_module("torch.distributed.pipelining"), name) if isinstance(asked, str) else asked
