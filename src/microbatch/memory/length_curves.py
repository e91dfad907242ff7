"""How much memory a window takes, as a function of the microbatch size and of the sequence length together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from microbatch.errors import ConfigError
from microbatch.memory.predict import Prediction, largest_that_fits, predict


@dataclass(frozen=True, slots=True)
class Lengthwise:
    """Peak memory by microbatch size and sequence length.

    A window of so many rows is predicted at each of a few lengths, operator by operator, allocation by allocation. What
    comes out is fitted by length in the very way that real windows are by rows: through three lengths, so that terms in
    the length squared, which masks and unfused attention have, are exact as well, and in the product of both.

    Attributes:
        predictions: By length, in columns; three or more, ascending.

    Raises:
        ConfigError: Fewer than three lengths, or lengths that do not ascend from 1.

    Example:
        >>> from microbatch.memory.ledger import Timeline
        >>> def at(length):  # two numbers of a byte for each pair of positions, beside a weight
        ...     def run(m):
        ...         return Timeline(operators=["scores"], live=[1000 + 2 * m * length**2], storages=[])
        ...
        ...     return predict(run)
        >>> found = Lengthwise({length: at(length) for length in (4, 8, 16)})
        >>> found.peak_bytes(3, length=100)
        61000
        >>> found.largest(61000, length=100), found.longest(61000, microbatch_size=3)
        (3, 100)
    """

    predictions: Mapping[int, Prediction]

    def __post_init__(self) -> None:
        """Refuse what no parabola goes through."""
        lengths = list(self.predictions)
        if len(lengths) < 3 or lengths != sorted(lengths) or lengths[0] < 1:
            raise ConfigError(f"lengths must be three or more, ascending, for example (64, 128, 256), not {lengths!r}")

    def peak_bytes(self, microbatch_size: int, *, length: int) -> int:
        """Predict the most bytes in use at once.

        Args:
            microbatch_size: Rows; at least 1.
            length: Columns of each; at least 1.

        Returns:
            Bytes.

        Raises:
            ConfigError: Either is below 1.
        """
        return self.by_length(microbatch_size).peak_bytes(length)

    def largest(self, budget: int, *, length: int) -> int:
        """Find the largest microbatch size that fits.

        Args:
            budget: Bytes that may be in use.
            length: Columns of each row; at least 1.

        Returns:
            Rows; 0 if not even one fits, and at most 2^24.

        Raises:
            ConfigError: The length is below 1.
        """
        return largest_that_fits(lambda rows: self.peak_bytes(rows, length=length) <= budget)

    def longest(self, budget: int, *, microbatch_size: int) -> int:
        """Find the greatest length that fits.

        Args:
            budget: Bytes that may be in use.
            microbatch_size: Rows; at least 1.

        Returns:
            Columns; 0 if not even one fits, and at most 2^24.

        Raises:
            ConfigError: The size is below 1.
        """
        return self.by_length(microbatch_size).largest(budget)

    def by_length(self, microbatch_size: int) -> Prediction:
        """Predict windows of so many rows at every length.

        Args:
            microbatch_size: Rows; at least 1.

        Returns:
            A prediction whose sizes are lengths.

        Raises:
            ConfigError: The size is below 1.
        """
        foretold = {length: each.foretell(microbatch_size) for length, each in self.predictions.items()}
        witnessed = [(length, each) for length, each in foretold.items() if each.levels]
        return predict(lambda length: foretold[length].timeline, sizes=list(foretold), witnessed=witnessed)
