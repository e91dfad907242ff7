"""Read each rank's share of a batch, with random numbers that depend on the seed, the step and the rank alone."""

from __future__ import annotations

from typing import Any

from microbatch.batch.batch_tree import slice_rows
from microbatch.ranks.pipeline import Pipeline
from microbatch.step.saved_state import seed_everything
from microbatch.train.data import BatchOrder, Position, fetch, mix_seed
from microbatch.train.job import Job
from microbatch.train.place import Place
from microbatch.train.run_config import RunConfig
from microbatch.train.share import share


class RankBatches:
    """Read this rank's share of each batch.

    Args:
        job: Data and collate function.
        config: The run's configuration.
        place: This rank's place in the run.
        rank: This rank's index among all ranks.
    """

    def __init__(self, job: Job, *, config: RunConfig, place: Place, rank: int) -> None:
        self._job, self._config, self._place, self._rank = job, config, place, rank
        self._order = BatchOrder(config.samples, batch_size=config.batch_size, seed=config.seed)

    def first(self) -> Any:
        """Collate the whole batch that the run began with.

        Returns:
            The batch, on the host.
        """
        chosen, _ = self._order.take(Position())
        return self._job.collate(fetch(self._job.data, chosen))

    def seed(self, step: int) -> None:
        """Seed a step, so that its random numbers do not depend on how often the run was interrupted before.

        Args:
            step: Optimizer steps taken.
        """
        seed_everything(mix_seed(self._config.seed, "step", step, self._place.share))

    def take(self, step: int, position: Position) -> tuple[Any, Position]:
        """Read this rank's share of the batch at a position.

        Args:
            step: Optimizer steps taken; `seed` has been called with it.
            position: Position in the data.

        Returns:
            The collated share, on the host, and the position of the next batch.
        """
        chosen, following = self._order.take(position)
        batch = self._own_share(chosen, step)
        if isinstance(self._job.model, Pipeline):
            # All stages of a pipeline read the same rows, but their layers draw different masks.
            seed_everything(mix_seed(self._config.seed, "stage", step, self._rank))
        return batch, following

    def _own_share(self, chosen: list[int], step: int) -> Any:
        """Collate this rank's rows of a batch."""
        job, place = self._job, self._place
        size = self._config.microbatch_size if self._config.deterministic else 1
        rows = share(len(chosen), ranks=place.shares, rank=place.share, unit=size)
        own = [chosen[row] for row in rows]
        if own and self._config.deterministic:
            samples = [sample for start in rows[::size] for sample in self._seeded(chosen, start, step=step)]
            self.seed(step)
            return job.collate(samples)
        if own:
            return job.collate(fetch(job.data, own))
        # A batch of the same form with no rows: where there are more ranks than rows, some only join the collectives.
        return slice_rows(job.collate(fetch(job.data, chosen[:1])), 0, 0, rows=1)

    def _seeded(self, chosen: list[int], start: int, *, step: int) -> list[Any]:
        """Read one microbatch's samples, with random numbers that do not depend on the rank that reads them."""
        seed_everything(mix_seed(self._config.seed, "samples", step, start))
        return fetch(self._job.data, chosen[start : start + self._config.microbatch_size])
