"""The learning-rate range test: a job's own steps at a rate that grows, and everything restored afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch.optim import Optimizer

from microbatch.errors import ConfigError
from microbatch.ranks.fsdp import fully_sharded
from microbatch.ranks.pipeline import Pipeline
from microbatch.ranks.process_group import RankGroup
from microbatch.train.baselines import take_step
from microbatch.train.data import Position
from microbatch.train.evaluate import untouched
from microbatch.train.job import Job
from microbatch.train.job_accumulator import accumulator_for, scaler_for
from microbatch.train.kept import Kept, kept, kept_data
from microbatch.train.place import Place
from microbatch.train.rank_batches import RankBatches, batches_of
from microbatch.train.run_config import RunConfig
from microbatch.train.schedule import learning_rate_of
from microbatch.train.state import optimizers_of
from microbatch.train.streams import is_stream
from microbatch.tuning.learning_rate import RangeStep
from microbatch.tuning.range_curve import diverged


class GroupRates:
    """Set the learning rate of every parameter group, in proportion to its own rate.

    Args:
        optimizers: The job's optimizers.

    Attributes:
        given: The rate of the first group of the first optimizer, without what a scheduler has made of it.

    Raises:
        ConfigError: An optimizer has no learning rate.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        if not optimizers:
            raise ConfigError("the job has no optimizer; pass one, or several, to mb.Job(optimizer=...)")
        self._optimizers = optimizers
        rates = [
            [learning_rate_of(optimizer, group, key="initial_lr") for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        self.given = rates[0][0]
        # As for ``microbatch train --lr``: where the first rate is 0, nothing is in proportion to it.
        self._shares = [[each / self.given if self.given else 1.0 for each in those] for those in rates]

    def set(self, rate: float) -> None:
        """Set the rate of the first group, and those of the others in proportion.

        Args:
            rate: The rate.
        """
        for optimizer, shares in zip(self._optimizers, self._shares, strict=True):
            # Groups are made anew whenever a state is loaded.
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = rate * share


class RangeTest:
    """Run a job's steps while the learning rate grows, as often as needed, from the same state each time.

    Use it as a context: it restores everything when it is left.

    Args:
        job: The job.
        config: The configuration that `microbatch.train.resolve.resolve` returned for the job.
        rates: The groups of the job's optimizers.
        progress: Called with every step.
        copies: The job's state at the start.
    """

    def __init__(
        self,
        job: Job,
        config: RunConfig,
        *,
        rates: GroupRates,
        copies: Kept,
        progress: Callable[[RangeStep], object] | None = None,
    ) -> None:
        self._job, self._config, self._rates, self._copies, self._progress = job, config, rates, copies, progress
        self._scaler = scaler_for(config)
        self._scale = self._scaler.state_dict() if self._scaler is not None else {}
        # One for all passes, so that "auto" looks for a size once.
        self._accumulator = accumulator_for(job, config, grad_scaler=self._scaler, nonfinite="skip")
        self._stream: tuple[RankBatches, int, Position] | None = None

    @property
    def microbatch_size(self) -> int:
        """Return the rows that go through the model at once."""
        return self._accumulator.microbatch_size or self._config.microbatch_size

    def run(self, rates: Sequence[float], *, seed: int, sweep: int, sweeps: int) -> list[float]:
        """Take a step at each rate, from the job's own state, until the loss diverges.

        Args:
            rates: The rates, in the order of the steps.
            seed: Seed of the order of the data and of everything else that is random.
            sweep: Index of this pass.
            sweeps: Passes that are planned.

        Returns:
            The losses: first that of the job as it is, then the one after the step of each rate. Fewer than the rates
            and one if the loss diverged.
        """
        self._copies.restore()
        if self._scaler is not None:
            self._scaler.load_state_dict(self._scale)
        batches, step, position = self._begin(seed)
        losses = list[float]()
        # After the last rate, one more loss is needed, and the step that brings it is taken at the same rate.
        for rate in [*rates, rates[-1]]:
            self._rates.set(rate)
            batches.seed(step)
            batch, position = batches.take(step, position)
            taken = take_step(self._accumulator, self._job, batch, plain=self._config.plain)
            step += 1
            dropped = not taken.applied and self._scaler is None
            losses.append(math.inf if dropped else float(taken.loss))
            if self._progress is not None:
                done = len(losses)
                told = RangeStep(
                    sweep=sweep, sweeps=sweeps, step=done, steps=len(rates) + 1, rate=rate, loss=losses[-1]
                )
                self._progress(told)
            if diverged(losses):
                break
        if self._stream is not None:
            self._stream = batches, step, position
        return losses

    def _begin(self, seed: int) -> tuple[RankBatches, int, Position]:
        """Return the batches of a pass: of another order for each seed; a stream, which has one order, goes on."""
        if self._stream is not None:
            return self._stream
        config = replace(self._config, seed=seed)
        begun = batches_of(self._job, config=config, place=Place(), rank=0), 0, Position()
        if is_stream(self._job.data):
            self._stream = begun
        return begun


@contextmanager
def range_test(
    job: Job, config: RunConfig, *, progress: Callable[[RangeStep], object] | None = None
) -> Generator[tuple[RangeTest, GroupRates]]:
    """Open a range test, and restore the job when the block ends, also by an error or Ctrl-C.

    Args:
        job: The job.
        config: Its configuration.
        progress: Called with every step.

    Yields:
        The test, and the rates of the job's optimizers.

    Raises:
        ConfigError: An optimizer has no learning rate, or the model is spread over several processes.
    """
    ranks = RankGroup.find(config.device)
    if isinstance(job.model, Pipeline) or fully_sharded(job.model) or (ranks is not None and ranks.size > 1):
        raise ConfigError(
            "the range test runs in one process, on a whole model: start it without torchrun, with a batch that one "
            "process can step through"
        )
    optimizers = optimizers_of(job.optimizer)
    rates = GroupRates(optimizers)
    with (
        kept(job.model, optimizers) as copies,
        untouched(job.model, config.device, training=True),
        kept_data(job.data),
    ):
        yield RangeTest(job, config, rates=rates, copies=copies, progress=progress), rates
