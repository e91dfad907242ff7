"""Pipeline parallelism: a model split into stages over ranks, run by a schedule of `torch.distributed.pipelining`."""

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
from microbatch.kind_words import kind_of

# The schedules whose backward is autograd's own, weights included; by the names of torch's get_schedule_class.
_SCHEDULES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved1f1b": "ScheduleInterleaved1F1B",
    "loopedbfs": "ScheduleLoopedBFS",
}
_SEVERAL = {"ScheduleInterleaved1F1B", "ScheduleLoopedBFS"}  # schedules with several stages on each rank


class Pipeline(nn.Module):
    """Wrap this rank's pipeline stages as the model of an accumulator.

    Pass it in place of the model: ``Accumulator(Pipeline(stage), optimizer, microbatch_size=4)``. Every rank of the
    pipeline passes the same batch, and the same ``loss_fn(model, microbatch)`` as on a single device. The gradient is
    that of the whole batch. See ``docs/pipeline.md``.

    Args:
        stages: This rank's `torch.distributed.pipelining.PipelineStage`, or a list of several.
        schedule: ``"GPipe"`` or ``"1F1B"`` for one stage a rank, ``"Interleaved1F1B"`` or ``"LoopedBFS"`` for several;
            or torch's class of one of these. `None` for 1F1B, or interleaved 1F1B if there are several stages.

    Attributes:
        stages: The stages, in order.
        parts: The stages' modules; their parameters are this module's parameters.
        scheduled: The schedule of the last step, kept for reuse.

    Raises:
        ConfigError: An argument is no stage, this rank has the wrong stages, or the schedule is not supported.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.pipelining import PipelineStage
        >>> import microbatch as mb
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layers = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
        >>> _ = [torch.nn.init.ones_(layer.weight) for layer in layers]
        >>> stages = [PipelineStage(layer, index, 2, torch.device("cpu")) for index, layer in enumerate(layers)]
        >>> model = mb.Pipeline(stages)  # both on this rank, because the world size is 1
        >>> accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.5), microbatch_size=2)
        >>> step = accumulator.step(torch.tensor([[1.0], [2.0], [3.0]]), lambda model, x: model(x).mean())
        >>> step.loss.item(), [layer.weight.item() for layer in layers]  # of v w x: both gradients are mean(x) = 2
        (2.0, [0.0, 0.0])
        >>> dist.destroy_process_group()
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
        """The device on which the stages compute."""
        return torch.device(self.stages[0].device)

    @property
    def is_last(self) -> bool:
        """Whether the model's last stage is on this rank."""
        return bool(self.stages[-1].is_last)

    def forward(self, *_: object, **__: object) -> Any:
        """Raise an error: no rank has the whole model, so the module cannot be called.

        Raises:
            WindowError: Always.
        """
        raise WindowError(
            "a Pipeline cannot be called: its schedule runs the stages on all ranks together. Call "
            "accumulator.step(batch, loss_fn) to train, and eval() of one of torch's schedules to evaluate"
        )

    def passes(self, microbatches: int) -> int:
        """Return how many passes the schedule runs for a number of microbatches; extra passes count for nothing.

        Args:
            microbatches: Number of microbatches; at least 1.

        Returns:
            The same number, or more if the schedule needs a minimum or a multiple.
        """
        stage, name = self.stages[0], self._schedule.__name__
        if name == "Schedule1F1B":
            return max(microbatches, stage.num_stages)
        while name == "ScheduleInterleaved1F1B" and microbatches % max(1, microbatches // stage.group_size):
            microbatches += 1
        return microbatches

    def schedule(self, passes: int, loss_fn: Callable[[Any, Tensor], Tensor]) -> Any:
        """Construct torch's schedule for a number of passes.

        Args:
            passes: Number of passes, as `Pipeline.passes` returns it.
            loss_fn: Called on the last stage with the model's output and the index of the pass.

        Returns:
            The schedule; it does not divide gradients.
        """
        stages = self.stages if self._schedule.__name__ in _SEVERAL else self.stages[0]
        return self._schedule(stages, passes, loss_fn=loss_fn, scale_grads=False)


@dataclass(frozen=True, slots=True)
class Pass:
    """The model's inputs in one pass: positional arguments of the first stage, keyword arguments of every stage."""

    args: tuple[Any, ...]
    settings: dict[str, Any]


class Scheduled:
    """A cached schedule, reused while the number, the shapes and the direction of the passes stay the same.

    For a new schedule, torch runs an extra forward of the first microbatch, in which the stages exchange shapes.
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
        """Run passes forward and, if asked, backward.

        Args:
            pipeline: The stages.
            passes: The inputs of each pass, of equal shapes; as many as `Pipeline.passes` returns.
            loss_fn: Called on the last stage with the model's output and the index of the pass, from 0, as a tensor;
                backward starts from the tensor that it returns.
            key: The number of passes and their shapes; the same on every rank of the pipeline.
            backward: Whether to run backward too.

        Raises:
            RankError: Another stage failed or did not answer in time.
        """
        if (key, backward) != self._key:
            self._schedule, self._key = pipeline.schedule(len(passes), self._call), (key, backward)
            self._schedule._has_backward = backward  # as the schedule's own `eval` does
        self._loss_fn = loss_fn
        for stage in pipeline.stages:
            stage.has_backward = backward
            stage.clear_runtime_states()
        first = any(stage.is_first for stage in pipeline.stages)
        try:
            # The schedule's own `step` would cut the batch itself, without regard to masks or a shorter last part.
            self._schedule._step_microbatches(
                [each.args if first else () for each in passes],
                [each.settings for each in passes],
                [torch.tensor(index) for index in range(len(passes))],
                return_outputs=False,
            )
        except Exception as error:
            self._key = None
            if not _is_communication_error(error):
                error.add_note(
                    "microbatch: weights and gradients are as before the window. The other stages wait until this "
                    "process ends or their process group times out; if memory ran out, restart with a smaller "
                    "microbatch_size"
                )
                raise
            raise RankError(
                "another stage of the pipeline failed, died or did not answer within the process group's timeout; read "
                f"that stage's own error. Here: {error}"
            ) from error
        finally:
            self._loss_fn = None
            for stage in pipeline.stages:
                stage.clear_runtime_states()

    def _call(self, output: Any, index: Tensor) -> Tensor:
        assert self._loss_fn is not None  # noqa: S101 - `run` sets it, and nothing else calls the schedule
        return self._loss_fn(output, index)


def _is_communication_error(error: BaseException) -> bool:
    """Return whether a schedule's error comes from communication with another stage, not from this stage's modules."""
    # A module's error arrives as it is, or wrapped by torch with a cause. Gloo's errors are plain RuntimeErrors.
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    plain = type(error) is RuntimeError and error.__cause__ is None
    return isinstance(error, dist.DistError) or (plain and "distributed" in Path(innermost.filename).parts)


def _check_stages(stages: Sequence[Any]) -> None:
    needed = ("submod", "stage_index", "num_stages", "group", "group_rank", "group_size")
    for stage in stages:
        if not all(hasattr(stage, name) for name in needed):
            raise ConfigError(
                f"Pipeline takes stages of torch.distributed.pipelining, not {kind_of(stage)}: pass "
                "PipelineStage(module, index, number of stages, device)"
            )
        if isinstance(stage.submod, nn.parallel.DistributedDataParallel):
            raise ConfigError(
                f"stage {stage.stage_index} is wrapped in DistributedDataParallel: pass the bare module to "
                "PipelineStage, and ranks=mb.Ranks(group=...) to the accumulator, which then reduces the gradients "
                "itself"
            )
        given = getattr(stage, "_user_meta", None)
        if getattr(given, "inputs", None) is not None:
            raise ConfigError(
                f"stage {stage.stage_index} was made with input_args=: leave out input_args= and output_args=, so that "
                "torch takes the shapes from the microbatches"
            )
    if not stages:
        raise ConfigError("Pipeline needs at least one stage, and the same number of stages on every rank")
    first = stages[0]
    found, due = [stage.stage_index for stage in stages], range(first.group_rank, first.num_stages, first.group_size)
    if found != list(due):
        raise ConfigError(
            f"rank {first.group_rank} of {first.group_size} has the stages {found} of {first.num_stages}, and should "
            f"have {list(due)}: assign stages to ranks in turn, the same number to each rank"
        )


def _schedule_class(asked: Any, stages: int) -> Any:
    default = "Interleaved1F1B" if stages > 1 else "1F1B"
    asked = default if asked is None else asked
    name = _SCHEDULES.get(asked.lower(), "") if isinstance(asked, str) else getattr(asked, "__name__", "")
    if name not in _SCHEDULES.values():
        raise ConfigError(
            'schedule must be "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS" or torch\'s class of one of these, not '
            f"{asked!r}; schedules that split backward in two are not supported, because they add up weight gradients "
            "themselves and ignore Sums(dtype=...)"
        )
    if (name in _SEVERAL) != (stages > 1):
        need = "needs several stages on each rank" if name in _SEVERAL else "takes one stage a rank"
        raise ConfigError(f"schedule {asked!r} {need}, and this one has {stages}; {default!r} fits")
    # Imported late: torch.distributed.pipelining takes long to import, and few users need it.
    return getattr(import_module("torch.distributed.pipelining"), name) if isinstance(asked, str) else asked
