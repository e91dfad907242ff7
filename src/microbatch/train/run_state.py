"""Collect the state of a run for a checkpoint, and restore a run from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from microbatch.errors import CheckpointError, MicrobatchError
from microbatch.ranks.pipeline import Pipeline
from microbatch.step.accumulator import Accumulator
from microbatch.train.best import Best
from microbatch.train.checkpoint import Checkpoint
from microbatch.train.checkpoint_shape import check_like, check_run_state
from microbatch.train.data import Position
from microbatch.train.job import Job
from microbatch.train.place import STAGES, Place, named_by_rank, named_by_stage, own_state
from microbatch.train.run_config import RunConfig
from microbatch.train.state import load_model, load_optimizer, model_tensors, random_states, set_random_states

_FOREIGN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What the ``load_state_dict`` of a job's own objects raises for a state that is not theirs."""


@dataclass(slots=True)
class Progress:
    """Hold the values that change from step to step and go into every checkpoint.

    Attributes:
        step: Optimizer steps taken, including the windows that were dropped.
        position: Position in the data.
        seconds: Time spent in steps, over all processes of the run.
        peak_bytes: Highest peak memory of the measured steps; `None` before the first.
        loss: Loss of the last step, in the loss function's unit.
        validation: Means of the last validation by name; empty before the first.
        best: The best validation so far.
        communicated: Bytes that this rank sent in the last step, and the number of collectives; `None` for a single
            rank. This value is in no checkpoint.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    seconds: float = 0.0
    peak_bytes: int | None = None
    loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict[str, float])
    best: Best = field(default_factory=Best)
    communicated: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Hold the objects whose state decides what a run computes next.

    Attributes:
        job: Model, loss and data.
        config: The run's configuration.
        place: This rank's place in the run.
        optimizers: The job's optimizers.
        schedulers: Their learning-rate schedulers.
        scaler: The loss scaler; `None` without float16 autocast.
        accumulator: The accumulator that takes the steps.
    """

    job: Job
    config: RunConfig
    place: Place
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[LRScheduler]
    scaler: torch.amp.GradScaler | None
    accumulator: Accumulator

    def scaler_state(self) -> Mapping[str, Any] | None:
        """Read the state dict of the loss scaler.

        Returns:
            The state dict; `None` without a scaler.
        """
        return self.scaler.state_dict() if self.scaler is not None else None

    def capture(self, progress: Progress) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Collect everything that a checkpoint has to hold.

        Args:
            progress: The values that change from step to step.

        Returns:
            The weights by name, and the rest of the state. The tensors are the run's own, not copies.
        """
        config, model = self.config, self.job.model
        weights, extra = model_tensors(model)
        own = {
            "extra": extra,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }
        if isinstance(model, Pipeline):
            weights, own = named_by_stage(model, weights), {STAGES: {self.place.stages: own}}
        state = {
            "run": {"seed": config.seed, "batch_size": config.batch_size, "samples": config.samples},
            "position": {"epoch": progress.position.epoch, "start": progress.position.start},
            "seconds": progress.seconds,
            "peak_bytes": progress.peak_bytes,
            "loss": progress.loss,
            "validation": progress.validation,
            "best": asdict(progress.best),
            **own,
            "scaler": self.scaler_state(),
            "accumulator": self.accumulator.state_dict(),
            "random": random_states(config.device),
        }
        return weights, state

    def check(self, state: Mapping[str, Any]) -> None:
        """Check that a checkpoint's state has the declared shape, and values of the kinds that this run's objects hold.

        Args:
            state: The decoded state.

        Raises:
            CheckpointError: It has not.
        """
        check_run_state(state)
        # Loading is the check: `restore`, which comes next, loads everything once more.
        self.accumulator.load_state_dict(state["accumulator"])
        if self.scaler is not None and state["scaler"] is not None:
            check_like(state["scaler"], self.scaler.state_dict(), place="scaler")
        own = state.get(STAGES, {}).get(self.place.stages) if self.place.stages else state
        for name, live in (("optimizers", self.optimizers), ("schedulers", self.schedulers)):
            # Where the job now makes others, `restore` refuses: that is no fault of the checkpoint.
            for index, (saved, each) in enumerate(zip((own or {}).get(name, ()), live, strict=False)):
                now = each.state_dict()
                check_like(saved, now, place=f"{name}.{index}")
                for key in {"state", "param_groups", "last_epoch"} & set(now) - set(saved):
                    raise CheckpointError(f"state.json is malformed at '{name}.{index}': it has no {key!r}")

    def restore(self, checkpoint: Checkpoint) -> Progress:
        """Restore the run from a checkpoint.

        Args:
            checkpoint: A checkpoint of this run.

        Returns:
            The progress at the checkpoint.

        Raises:
            CheckpointError: The checkpoint belongs to another run, or to a job with other parts.
        """
        try:
            return self._restored(checkpoint)
        except _FOREIGN as error:
            if isinstance(error, MicrobatchError):
                raise
            kind = type(error).__name__
            raise CheckpointError(
                f"the checkpoint {checkpoint.path.name} does not fit what the job now makes ({kind}: {error}). Go on "
                "with the job as it was, or start a new run"
            ) from error

    def _restored(self, checkpoint: Checkpoint) -> Progress:
        state, config, model = checkpoint.state, self.config, self.job.model
        now = {"seed": config.seed, "batch_size": config.batch_size, "samples": config.samples}
        for key, value in now.items():
            if state["run"][key] != value:
                raise CheckpointError(
                    f"the run was started with {key} {state['run'][key]} and would go on with {value}; a resumed run "
                    "keeps its data, its batch and its seed"
                )
        own, weights = own_state(state, self.place), checkpoint.weights
        if len(own["optimizers"]) != len(self.optimizers) or len(own["schedulers"]) != len(self.schedulers):
            raise CheckpointError("the checkpoint and the job have different numbers of optimizers or schedulers")
        if isinstance(model, Pipeline):
            weights = named_by_rank(model, weights)
        load_model(model, weights, own["extra"])
        for optimizer, saved in zip(self.optimizers, own["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        for scheduler, saved in zip(self.schedulers, own["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.accumulator.load_state_dict(state["accumulator"])
        # Last: the job drew random numbers of its own when it was made again.
        set_random_states(state["random"], config.device)
        return Progress(
            step=checkpoint.step,
            position=Position(**state["position"]),
            seconds=state["seconds"],
            peak_bytes=state["peak_bytes"],
            loss=state["loss"],
            validation=state["validation"],
            best=Best(**state.get("best", {})),  # of an earlier version, there is none
        )
