"""Read each rank's share of a batch, with random numbers that depend on the seed, the step and the rank alone."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from microbatch.batch.batch_tree import slice_rows
from microbatch.errors import CheckpointError, DataError
from microbatch.ranks.pipeline import Pipeline
from microbatch.step.saved_state import RandomState, seed_everything
from microbatch.train.data import BatchOrder, Position, fetch, mix_seed
from microbatch.train.job import Job
from microbatch.train.place import Place
from microbatch.train.run_config import RunConfig
from microbatch.train.share import share
from microbatch.train.streams import Stream, is_stream, joined, rows_taken


class RankBatches:
    """Read this rank's share of each batch, by the numbers of the samples.

    Args:
        job: Data and collate function.
        config: The run's configuration.
        place: This rank's place in the run.
        rank: This rank's index among all ranks.
    """

    def __init__(self, job: Job, *, config: RunConfig, place: Place, rank: int) -> None:
        self._job, self._config, self._place, self._rank = job, config, place, rank

    @cached_property
    def _order(self) -> BatchOrder:
        return BatchOrder(self._config.samples, batch_size=self._config.batch_size, seed=self._config.seed)

    def first(self) -> Any:
        """Collate the whole batch that the run began with.

        Returns:
            The batch, on the host.
        """
        chosen, _ = self._order.take(Position())
        return self._job.collate(fetch(self._job.data, chosen))

    def state(self) -> dict[str, Any] | None:
        """Return what the data itself knows of its position; `None` where the position of the run is enough."""
        return None

    def load(self, state: dict[str, Any] | None, *, step: int, position: Position) -> None:
        """Go on where a run stood.

        Args:
            state: The result of `state`.
            step: Optimizer steps taken.
            position: Position in the data.
        """

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
        batch, following = self._read(step, position)
        if isinstance(self._job.model, Pipeline):
            # All stages of a pipeline read the same rows, but their layers draw different masks.
            seed_everything(mix_seed(self._config.seed, "stage", step, self._rank))
        return batch, following

    def _read(self, step: int, position: Position) -> tuple[Any, Position]:
        """Read this rank's share, and return the position of the next batch."""
        chosen, following = self._order.take(position)
        return self._own_share(chosen, step), following

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


class StreamBatches(RankBatches):
    """Read this rank's share of each batch from a stream; every rank reads the whole stream."""

    @cached_property
    def _stream(self) -> Stream:
        return Stream(self._job.data, rows=self._config.batch_size)

    def first(self) -> Any:
        """Collate the whole batch that the run began with; this begins the stream again."""
        items, rows, _, _ = self._pull(Stream(self._job.data, rows=self._config.batch_size), 0, Position())
        return joined(rows_taken(self._job, items, range(rows)))

    def state(self) -> dict[str, Any] | None:
        """Return where the stream itself says that it stands."""
        return self._stream.state()

    def load(self, state: dict[str, Any] | None, *, step: int, position: Position) -> None:
        """Go on where the stream stood; a stream without a state is read again, with the same random numbers."""
        if state is not None and self._stream.has_state:
            self._stream.load(state, epoch=position.epoch)
            return
        before = RandomState(self._config.device)
        read, begun = 0, step - -(-position.start // self._config.batch_size)
        while read < position.start:
            _, rows, ended, _ = self._pull(self._stream, begun, Position(position.epoch, read))
            if ended and read + rows < position.start:
                raise CheckpointError(
                    f"the run had read {position.start} samples of this pass over its data, and the data now ends "
                    f"after {read + rows}; a resumed run keeps its data"
                )
            read, begun = read + rows, begun + 1
        before.restore()

    def _read(self, step: int, position: Position) -> tuple[Any, Position]:
        items, rows, ended, epoch = self._pull(self._stream, step, position)
        self.seed(step)
        start = rows if epoch != position.epoch else position.start + rows
        own = share(rows, ranks=self._place.shares, rank=self._place.share, unit=1)
        return rows_taken(self._job, items, own), Position(epoch + 1, 0) if ended else Position(epoch, start)

    def _pull(self, stream: Stream, step: int, position: Position) -> tuple[list[Any], int, bool, int]:
        """Read the next rows, in the next epoch if this one is over; all ranks with the same random numbers."""
        seed_everything(mix_seed(self._config.seed, "stream", step))
        items, rows, ended = stream.take(position.epoch)
        epoch = position.epoch
        if not rows:  # the last piece was whole, and ended the pass; or a state that was loaded stood at the end
            epoch += bool(position.start)
            items, rows, ended = stream.take(epoch)
        if not rows:
            raise DataError("the training data has 0 samples, so there is nothing to train on")
        return items, rows, ended, epoch


def batches_of(job: Job, *, config: RunConfig, place: Place, rank: int) -> RankBatches:
    """Make the reader that a job's data needs.

    Args:
        job: Data and collate function.
        config: The run's configuration.
        place: This rank's place in the run.
        rank: This rank's index among all ranks.

    Returns:
        The reader.
    """
    kind = StreamBatches if is_stream(job.data) else RankBatches
    return kind(job, config=config, place=place, rank=rank)
