"""Record the best validation of a run, and decide when a run has stopped getting better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from microbatch.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Score:
    """The number of a validation that tells which weights are the best.

    Attributes:
        name: Its name, as ``Job.evaluate`` returns it; ``"loss"`` without one.
        largest: Whether the largest value is the best, and not the smallest.
    """

    name: str
    largest: bool

    @classmethod
    def parse(cls, text: str) -> Score:
        """Read a score as the settings have it.

        Args:
            text: ``"min:NAME"`` or ``"max:NAME"``.

        Returns:
            The score.

        Raises:
            ConfigError: The text has another form.

        Example:
            >>> Score.parse("max:accuracy")
            Score(name='accuracy', largest=True)
        """
        how, _, name = text.partition(":")
        if how not in {"min", "max"} or not name:
            raise ConfigError(f"the best checkpoint is chosen by min:NAME or max:NAME, such as min:loss, not {text!r}")
        return cls(name, how == "max")


@dataclass(slots=True)
class Best:
    """The best validation of a run so far.

    Attributes:
        score: The score, as the settings have it; an earlier value of another score does not count.
        value: Its best value; `None` before the first that is finite.
        step: Optimizer steps taken when it was reached.
        waited: Validations since then.
    """

    score: str = ""
    value: float | None = None
    step: int = 0
    waited: int = 0

    def look(self, values: Mapping[str, float], *, score: str, step: int) -> bool:
        """Compare a validation with the best one.

        Args:
            values: The means of the validation, by name.
            score: The score, as the settings have it.
            step: Optimizer steps taken.

        Returns:
            Whether it is the best so far.

        Raises:
            ConfigError: The validation has no such score.
        """
        by = Score.parse(score)
        if by.name not in values:
            raise ConfigError(
                f"--best {score}: the validation has no {by.name!r}; it has {', '.join(map(repr, values)) or 'nothing'}"
            )
        if score != self.score:
            self.score, self.value, self.step, self.waited = score, None, 0, 0
        value = values[by.name]
        better = math.isfinite(value) and (
            self.value is None or (value > self.value if by.largest else value < self.value)
        )
        if better:
            self.value, self.step, self.waited = value, step, 0
        else:
            self.waited += 1
        return better
