"""The playground's settings: one typed table, which the form, the page's address and every request are read by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from microbatch.errors import ConfigError

MIB = 1024**2

MOST_MICROBATCHES = 20_000
"""Microbatches of a run: what its events take in memory has a bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Say what one setting may be.

    Attributes:
        name: As in the page's address.
        label: As people read it.
        default: Its value when nobody says anything.
        help: One sentence.
        choices: Values with their labels, for a choice.
        low: Smallest number, for a number.
        high: Largest number.
        whole: Whether the number has to be a whole one.
        word: A word that is allowed in the number's place.
        of: The only model that has it; `None` for all of them.
    """

    name: str
    label: str
    default: str | float | int
    help: str
    choices: Mapping[str, str] | None = None
    low: float = 0
    high: float = 0
    whole: bool = True
    word: str | None = None
    of: str | None = None

    def read(self, value: object) -> str | float | int:
        """Read one value.

        Args:
            value: A number, or text as it comes from a form or an address.

        Returns:
            The value in its own type.

        Raises:
            ConfigError: It is not one that is allowed; the message says which are.
        """
        text = value.strip() if isinstance(value, str) else value
        if self.choices is not None:
            if not isinstance(text, str) or text not in self.choices:
                raise ConfigError(f"{self.label} must be one of {', '.join(self.choices)}, not {_shown(value)}")
            return text
        if self.word is not None and text == self.word:
            return self.word
        number = _number(text)
        if number is None or not self.low <= number <= self.high or (self.whole and number != int(number)):
            kind = "a whole number" if self.whole else "a number"
            words = f' or "{self.word}"' if self.word is not None else ""
            raise ConfigError(
                f"{self.label} must be {kind} from {self.low:g} to {self.high:g}{words}, not {_shown(value)}"
            )
        return int(number) if self.whole else number


FIELDS: tuple[Field, ...] = (
    Field(
        name="model",
        label="Model",
        default="transformer",
        help="What is trained, on data that is on this machine.",
        choices={
            "transformer": "transformer on Python’s sources",
            "conv": "convolutional network on digits",
            "mlp": "MLP on digits",
            "pairs": "pair encoder on halves of digits",
        },
    ),
    Field(name="batch", label="Effective batch", default=32, help="Rows of one optimizer step.", low=1, high=256),
    Field(
        name="microbatch",
        label="Microbatch size",
        default=8,
        help="Rows that go through the model at once; auto finds the fastest.",
        low=1,
        high=256,
        word="auto",
    ),
    Field(
        name="tank",
        label="Tank (MiB)",
        default="none",
        help="The memory budget of a step; none for what the machine has.",
        low=0.05,
        high=4096,
        whole=False,
        word="none",
    ),
    Field(
        name="recover",
        label="When it overflows",
        default="yes",
        help="Recovering runs the same batch again, in halves.",
        choices={"yes": "recover", "no": "stop"},
    ),
    Field(
        name="precision",
        label="Precision",
        default="float32",
        help="Of the weights, the forward pass and the sums.",
        choices={
            "float32": "float32",
            "autocast": "bfloat16 autocast",
            "bfloat16": "bfloat16 weights, sums in float32",
            "bfloat16-sums": "bfloat16 weights and sums",
        },
    ),
    Field(
        name="divide",
        label="Divided by",
        default="right",
        help="What the added gradients are divided by.",
        choices={
            "right": "the batch’s own count",
            "none": "nothing (forgotten)",
            "means": "microbatches (mean of means)",
        },
    ),
    Field(
        name="norm",
        label="Normalisation",
        default="group",
        help="Of the convolutional network.",
        of="conv",
        choices={"group": "GroupNorm", "batch": "BatchNorm, by microbatch", "exact": "BatchNorm, exact"},
    ),
    Field(
        name="coupling",
        label="Coupled loss",
        default="plain",
        help="Of the pair encoder.",
        of="pairs",
        choices={"plain": "cut like any other", "coupled": "over the whole batch"},
    ),
    Field(
        name="optimizer",
        label="Optimizer",
        default="sgd",
        help="SGD shows a wrong scale at once; AdamW hides it.",
        choices={"sgd": "SGD with momentum", "adamw": "AdamW"},
    ),
    Field(
        name="lr",
        label="Learning rate",
        default=0.05,
        help="Tuned for an effective batch of 32 rows.",
        low=1e-6,
        high=10,
        whole=False,
    ),
    Field(
        name="rule",
        label="Scaled by",
        default="fixed",
        help="How the learning rate goes with another effective batch.",
        choices={"fixed": "nothing", "linear": "the linear rule", "sqrt": "the square-root rule"},
    ),
    Field(name="steps", label="Steps", default=20, help="Optimizer steps.", low=1, high=500),
    Field(name="seed", label="Seed", default=0, help="Draws weights and batches.", low=0, high=999_999),
    Field(
        name="compare",
        label="Beside it",
        default="no",
        help="A second run, trained on whole batches by plain PyTorch.",
        choices={"no": "nothing", "yes": "the full batch"},
    ),
    Field(
        name="pace",
        label="Slow motion",
        default="0",
        help="Seconds of rest after every forward and backward.",
        choices={"0": "full speed", "0.15": "slow", "0.6": "very slow"},
    ),
)

KNOBS = ("batch", "microbatch", "lr")
"""What the playground asks first."""

GROUPS = {
    "What": ("model", "norm", "coupling", "precision", "divide"),
    "The memory": ("tank", "recover"),
    "The step": ("optimizer", "rule"),
    "The run": ("steps", "seed", "compare", "pace"),
}

WIDE = ("model", "norm", "coupling", "precision", "divide", "optimizer", "rule")
"""Whose choices take more words than half a column holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Hold one run's settings; the fields are those of `FIELDS`."""

    model: str
    batch: int
    microbatch: int | str
    tank: float | str
    recover: str
    precision: str
    divide: str
    norm: str
    coupling: str
    optimizer: str
    lr: float
    rule: str
    steps: int
    seed: int
    compare: str
    pace: str

    @property
    def budget(self) -> int | None:
        """The tank in bytes; `None` for what the machine has."""
        return None if isinstance(self.tank, str) else round(self.tank * MIB)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for JSON and for an address."""
        return asdict(self)


def read_settings(values: object) -> Settings:
    """Read a run's settings; what is left out has its default.

    Args:
        values: Values by name, as they come from a form.

    Returns:
        The settings.

    Raises:
        ConfigError: Something is unknown, of the wrong kind, out of its bounds, or does not go together.

    Example:
        >>> read_settings({"batch": "64", "tank": "1.5"}).budget
        1572864
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"settings must be an object of names and values, not {_shown(values)}")
    known = {field.name: field for field in FIELDS}
    for name in values:
        if name not in known:
            raise ConfigError(f"there is no setting {_shown(name)}; the settings are {', '.join(known)}")
    read: dict[str, Any] = {name: field.read(values.get(name, field.default)) for name, field in known.items()}
    settings = Settings(**read)
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    size = settings.microbatch
    if isinstance(size, int):
        if size > settings.batch:
            raise ConfigError(f"Microbatch size {size} is larger than the effective batch of {settings.batch}")
        total = settings.steps * math.ceil(settings.batch / size)
        if total > MOST_MICROBATCHES:
            raise ConfigError(
                f"{settings.steps} steps in microbatches of {size} make {total:,} microbatches, and at most "
                f"{MOST_MICROBATCHES:,} are run here; take fewer steps or larger microbatches"
            )
    if settings.norm != "group" and settings.model != "conv":
        raise ConfigError(f"Normalisation {settings.norm!r} is the convolutional network's; the others have none")
    if settings.norm == "exact" and settings.recover != "yes":
        raise ConfigError("exact BatchNorm runs all microbatches as one, and always recovers when memory ends")
    if settings.coupling == "coupled" and settings.model != "pairs":
        raise ConfigError("Coupled loss is the pair encoder's; the losses of the others are sums over rows")
    if settings.coupling == "coupled" and settings.divide != "right":
        raise ConfigError("Coupled loss over the whole batch is divided by the batch's own count, once")


def _number(text: object) -> float | None:
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        return None
    try:
        number = float(text)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
