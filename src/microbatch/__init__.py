"""Exact gradient accumulation for PyTorch.

Ask for the batch you want: it runs in the memory you have, and the gradient is the large batch's gradient.

The pages ``docs/*.md`` that docstrings name are on the documentation's site: ``pip show --verbose microbatch``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from microbatch.batch.batches import Batches
    from microbatch.batch.cut import cut
    from microbatch.batch.lengths import Lengths
    from microbatch.batch.marks import Rows, Whole
    from microbatch.checking.check_report import Cause, Check
    from microbatch.checking.equal import check
    from microbatch.engines.deepspeed import DeepSpeed
    from microbatch.errors import MicrobatchError
    from microbatch.gradients.momentum_buffer import LinearState
    from microbatch.gradients.noise_estimate import NoiseScale
    from microbatch.linting.doctor import doctor
    from microbatch.linting.finding import Finding
    from microbatch.loss import losses
    from microbatch.loss.batch_reductions import batch_gather, batch_mean, batch_sum
    from microbatch.loss.convert_batch_norm import convert_batch_norm
    from microbatch.loss.loss import Loss
    from microbatch.loss.tiled_cross_entropy import linear_cross_entropy
    from microbatch.memory.kept_heap import keep_heap
    from microbatch.memory.meter import MemoryMeter
    from microbatch.memory.recompute import checkpointed
    from microbatch.memory.spill import Spill
    from microbatch.planning.arithmetic import Division, divide_batch
    from microbatch.planning.hyperparameters import Hyperparameters
    from microbatch.planning.make_plan import plan
    from microbatch.planning.plan import Plan
    from microbatch.planning.scaling import Scaling, scale_hyperparameters
    from microbatch.ranks.pipeline import Pipeline
    from microbatch.step.accumulator import Accumulator
    from microbatch.step.events import (
        BudgetPassed,
        MicrobatchDone,
        PlanChosen,
        Retry,
        SizeChanged,
        StepDone,
        SyncChosen,
    )
    from microbatch.step.options import Ranks, Sums
    from microbatch.step.record import Step
    from microbatch.step.window import Window
    from microbatch.train.job import Job
    from microbatch.tuning.find_rate import find_learning_rate
    from microbatch.tuning.learning_rate import LearningRate
    from microbatch.tuning.sweep import sweep
    from microbatch.tuning.sweep_result import Sweep
    from microbatch.warned import MicrobatchWarning

__all__ = [
    "Accumulator",
    "Batches",
    "BudgetPassed",
    "Cause",
    "Check",
    "DeepSpeed",
    "Division",
    "Finding",
    "Hyperparameters",
    "Job",
    "LearningRate",
    "Lengths",
    "LinearState",
    "Loss",
    "MemoryMeter",
    "MicrobatchDone",
    "MicrobatchError",
    "MicrobatchWarning",
    "NoiseScale",
    "Pipeline",
    "Plan",
    "PlanChosen",
    "Ranks",
    "Retry",
    "Rows",
    "Scaling",
    "SizeChanged",
    "Spill",
    "Step",
    "StepDone",
    "Sums",
    "Sweep",
    "SyncChosen",
    "Whole",
    "Window",
    "batch_gather",
    "batch_mean",
    "batch_sum",
    "check",
    "checkpointed",
    "convert_batch_norm",
    "cut",
    "divide_batch",
    "doctor",
    "find_learning_rate",
    "keep_heap",
    "linear_cross_entropy",
    "losses",
    "plan",
    "scale_hyperparameters",
    "sweep",
]

__version__ = "0.1.0"

# Names are imported when they are first used: `microbatch --help` has no need of torch.
_HOMES = {
    "Accumulator": "step.accumulator",
    "Batches": "batch.batches",
    "Ranks": "step.options",
    "Sums": "step.options",
    "Cause": "checking.check_report",
    "Check": "checking.check_report",
    "DeepSpeed": "engines.deepspeed",
    "Division": "planning.arithmetic",
    "Finding": "linting.finding",
    "Hyperparameters": "planning.hyperparameters",
    "BudgetPassed": "step.events",
    "Job": "train.job",
    "LearningRate": "tuning.learning_rate",
    "Lengths": "batch.lengths",
    "LinearState": "gradients.momentum_buffer",
    "NoiseScale": "gradients.noise_estimate",
    "Loss": "loss.loss",
    "MemoryMeter": "memory.meter",
    "MicrobatchDone": "step.events",
    "MicrobatchError": "errors",
    "MicrobatchWarning": "warned",
    "Pipeline": "ranks.pipeline",
    "Plan": "planning.plan",
    "PlanChosen": "step.events",
    "Retry": "step.events",
    "Rows": "batch.marks",
    "Scaling": "planning.scaling",
    "SizeChanged": "step.events",
    "Spill": "memory.spill",
    "Step": "step.record",
    "StepDone": "step.events",
    "Sweep": "tuning.sweep_result",
    "SyncChosen": "step.events",
    "Whole": "batch.marks",
    "Window": "step.window",
    "batch_gather": "loss.batch_reductions",
    "batch_mean": "loss.batch_reductions",
    "batch_sum": "loss.batch_reductions",
    "check": "checking.equal",
    "checkpointed": "memory.recompute",
    "convert_batch_norm": "loss.convert_batch_norm",
    "cut": "batch.cut",
    "divide_batch": "planning.arithmetic",
    "doctor": "linting.doctor",
    "keep_heap": "memory.kept_heap",
    "find_learning_rate": "tuning.find_rate",
    "linear_cross_entropy": "loss.tiled_cross_entropy",
    "plan": "planning.make_plan",
    "scale_hyperparameters": "planning.scaling",
    "sweep": "tuning.sweep",
}
_MODULES = {"losses": "loss.losses"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = import_module(f"microbatch.{_MODULES[name]}")
    elif name in _HOMES:
        value = getattr(import_module(f"microbatch.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'microbatch' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
