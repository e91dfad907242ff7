"""Peak memory of a window as a function of microbatch size and sequence length together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from microbatch.errors import ConfigError
from microbatch.memory.predict import Prediction, largest_that_fits, predict


@dataclass(frozen=True, slots=True)
class Lengthwise:
    """Predict peak memory by microbatch size and sequence length.

    First, a window with the given number of rows is predicted at each of a few lengths, operator by operator. Then
    these predictions are fitted by length, as real windows are fitted by rows. The fit goes through three lengths. So
    terms in the squared length, which masks and unfused attention have, and in its product with the rows are exact.

    Attributes:
        predictions: A prediction for each length in columns; three or more lengths, ascending.

    Raises:
        ConfigError: There are fewer than three lengths, or they do not ascend from 1.

    Example:
        >>> from microbatch.memory.ledger import Timeline
        >>> def at(length):  # a weight of 1000 bytes, and two bytes for each pair of positions
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
        """Refuse fewer than three lengths."""
        lengths = list(self.predictions)
        if len(lengths) < 3 or lengths != sorted(lengths) or lengths[0] < 1:
            raise ConfigError(f"lengths must be three or more, ascending, for example (64, 128, 256), not {lengths!r}")

    def peak_bytes(self, microbatch_size: int, *, length: int) -> int:
        """Predict the peak memory of a window.

        Args:
            microbatch_size: Rows; at least 1.
            length: Columns of each row; at least 1.

        Returns:
            Bytes.

        Raises:
            ConfigError: The size or the length is below 1.
        """
        return self.by_length(microbatch_size).peak_bytes(length)

    def largest(self, budget: int, *, length: int) -> int:
        """Return the largest microbatch size that fits into a budget.

        Args:
            budget: Bytes that may be in use.
            length: Columns of each row; at least 1.

        Returns:
            Rows; 0 if not even one row fits, and at most 2^24.

        Raises:
            ConfigError: The length is below 1.
        """
        return largest_that_fits(lambda rows: self.peak_bytes(rows, length=length) <= budget)

    def longest(self, budget: int, *, microbatch_size: int) -> int:
        """Return the greatest sequence length that fits into a budget.

        Args:
            budget: Bytes that may be in use.
            microbatch_size: Rows; at least 1.

        Returns:
            Columns; 0 if not even one column fits, and at most 2^24.

        Raises:
            ConfigError: The size is below 1.
        """
        return self.by_length(microbatch_size).largest(budget)

    def by_length(self, microbatch_size: int) -> Prediction:
        """Return a prediction by sequence length, for one microbatch size.

        Args:
            microbatch_size: Rows; at least 1.

        Returns:
            A prediction whose sizes are lengths in columns.

        Raises:
            ConfigError: The size is below 1.
        """
        runs = {length: each.predicted_run(microbatch_size) for length, each in self.predictions.items()}
        witnessed = [(length, each) for length, each in runs.items() if each.levels]
        return predict(lambda length: runs[length].timeline, sizes=list(runs), witnessed=witnessed)
