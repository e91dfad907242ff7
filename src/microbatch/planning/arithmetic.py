"""Effective batch = microbatch size * microbatches * ranks, in every direction."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from microbatch.arguments import whole
from microbatch.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """How an effective batch is divided over ranks, and cut into microbatches.

    Ranks hold equal shares, or shares that differ by one row; each is cut into microbatches, the last of which may be
    short. Every division has the same gradient.

    Attributes:
        batch_size: Effective batch: rows over all ranks.
        microbatch_size: Rows that go through the model at once.
        microbatches: Microbatches of the rank that has most.
        ranks: Ranks that share the batch.
    """

    batch_size: int
    microbatch_size: int
    microbatches: int
    ranks: int

    @property
    def share(self) -> int:
        """Rows of the rank that has most."""
        return -(-self.batch_size // self.ranks)

    @property
    def last(self) -> int:
        """Rows of that rank's last microbatch."""
        return self.share - (self.microbatches - 1) * self.microbatch_size

    @property
    def even(self) -> bool:
        """Whether all ranks have as many microbatches, and all microbatches as many rows."""
        return self.batch_size == self.microbatch_size * self.microbatches * self.ranks

    def nearest(self) -> tuple[Division, ...]:
        """List the even divisions closest to this one.

        Returns:
            Itself if it is even. Else, smallest batch first: those of the nearest batches that its microbatch size and
            ranks divide, and, where the ranks divide the batch, those of the nearest microbatch sizes that divide the
            share. Each is below or above; where there is none below, it is left out.

        Example:
            >>> [(each.batch_size, each.microbatch_size) for each in divide_batch(100, microbatch_size=16).nearest()]
            [(96, 16), (100, 10), (100, 20), (112, 16)]
        """
        if self.even:
            return (self,)
        unit = self.microbatch_size * self.ranks
        below = self.batch_size // unit
        found = [self._even(self.microbatch_size, below)] if below else []
        if self.batch_size % self.ranks == 0:
            sizes = [size for size in range(1, self.share + 1) if self.share % size == 0]
            smaller = max(size for size in sizes if size < self.microbatch_size)
            larger = min(size for size in sizes if size > self.microbatch_size)
            found += [self._even(size, self.share // size) for size in (smaller, larger)]
        return (*found, self._even(self.microbatch_size, below + 1))

    def describe(self) -> str:
        """Write the division for people.

        Returns:
            One line, or, where it is not even, a second with the nearest that are.

        Example:
            >>> print(divide_batch(100, microbatch_size=16).describe())
            100 = 6 x 16 + 4 rows
            exact as it is: every row counts the same; even ones near it: 96 = 6 x 16 rows, 100 = 10 x 10 rows,
            100 = 5 x 20 rows, 112 = 7 x 16 rows
        """
        if self.even:
            return self._line()
        near = ", ".join(each._line() for each in self.nearest())
        return f"{self._line()}\nexact as it is: every row counts the same; even ones near it: {near}"

    def as_dict(self) -> dict[str, Any]:
        """Give everything as JSON can hold it.

        Returns:
            The four numbers, ``even``, and ``nearest``: the even divisions closest by.
        """
        return asdict(self) | {"even": self.even, "nearest": [asdict(each) for each in self.nearest()]}

    def _even(self, microbatch_size: int, microbatches: int) -> Division:
        return Division(
            batch_size=microbatch_size * microbatches * self.ranks,
            microbatch_size=microbatch_size,
            microbatches=microbatches,
            ranks=self.ranks,
        )

    def _line(self) -> str:
        full = self.microbatches if self.last == self.microbatch_size else self.microbatches - 1
        rest = "" if full == self.microbatches else f" + {self.last}"
        shared = "" if self.ranks == 1 else f"{self.ranks} ranks of "
        fewer = -self.batch_size % self.ranks
        less = f", {fewer} of them one row less" if fewer else ""
        return f"{self.batch_size} = {shared}{full} x {self.microbatch_size}{rest} rows{less}"


def divide_batch(
    batch_size: int | None = None,
    *,
    microbatch_size: int | None = None,
    microbatches: int | None = None,
    ranks: int | None = None,
) -> Division:
    """Find what is missing of an effective batch and how it is cut.

    ``batch = microbatch size * microbatches * ranks`` where everything divides; where it does not, the last microbatch
    is short, and the gradient is as exact.

    Args:
        batch_size: Effective batch in rows, over all ranks.
        microbatch_size: Rows that go through the model at once. More than a rank's share is cut down to it.
        microbatches: Microbatches in a window, on each rank; at most that many where another number settles it.
        ranks: Ranks that share the batch. Left out, they are found where the other three are given, else there is 1.

    Returns:
        All four; the batch is as it was given.

    Raises:
        ConfigError: A number is not a whole one of at least 1, there are too few to find the others, the batch has
            fewer rows than there are ranks, or all four are given and disagree.

    Example:
        >>> divide_batch(256, microbatch_size=8, ranks=4).microbatches
        8
        >>> divide_batch(microbatch_size=8, microbatches=4, ranks=2).batch_size
        64
    """
    given = {
        "batch_size": batch_size,
        "microbatch_size": microbatch_size,
        "microbatches": microbatches,
        "ranks": ranks,
    }
    for name, value in given.items():
        if value is not None and whole(value, least=1) is None:
            raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
    batch_size, microbatch_size, microbatches, ranks = (whole(value) for value in given.values())  # as ints
    if batch_size is None:
        if microbatch_size is None or microbatches is None:
            raise ConfigError("give batch_size, or both microbatch_size and microbatches, to find the others")
        batch_size = microbatch_size * microbatches * (ranks or 1)
    if ranks is None:
        ranks = -(-batch_size // (microbatch_size * microbatches)) if microbatch_size and microbatches else 1
    if batch_size < ranks:
        raise ConfigError(f"a batch of {batch_size} has no row for some of {ranks} ranks; give each at least one")
    share = -(-batch_size // ranks)
    size = microbatch_size or -(-share // (microbatches or 1))
    found = Division(
        batch_size=batch_size, microbatch_size=min(size, share), microbatches=-(-share // size), ranks=ranks
    )
    if None not in given.values() and found.microbatches != microbatches:
        raise ConfigError(
            f"{share} rows on a rank make {found.microbatches} microbatches of {found.microbatch_size}, not "
            f"{microbatches}; leave one of the four numbers out"
        )
    return found
