"""The values of the simulation: numbers that remember where they come from, objects with a part in the loop, and data.

A loss is one weight for each microbatch. All that the doctor says about sums follows from these weights.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

__all__ = [
    "Bound",
    "Data",
    "Function",
    "Num",
    "Obj",
    "Unknown",
    "as_loss",
    "hangs_on_data",
    "is_number",
    "number",
    "tags",
]

NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Num:
    """A known number with its origins: "n" where N is in it, "len" where the length of the loader is."""

    value: Any
    tags: frozenset[str] = NOTHING


@dataclass(frozen=True, slots=True)
class Unknown:
    """A value that the file does not show.

    `key` is the expression that made it: the same key has the same truth in one run.
    """

    key: str = ""
    data: bool = False  # it hangs on the microbatch at hand
    tags: frozenset[str] = NOTHING


@dataclass(slots=True)
class Obj:
    """An object with a part in the loop: an optimizer, a model, a loader, ..."""

    kind: str
    name: str
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells it from others of its kind: two optimizers out of one function have one name."""
        return str(self.info.get("key", self.name))


@dataclass(frozen=True, slots=True)
class Function:
    """A function or class of the file; `owner` is the class that holds it."""

    name: str
    node: Any
    owner: str | None = None
    scope: Any = None


@dataclass(frozen=True, slots=True)
class Bound:
    """A method that was looked up and not yet called."""

    base: Any
    attribute: str


@dataclass(frozen=True, slots=True)
class Data:
    """A value that comes out of microbatches: a batch, an output, a loss, or the Python number of a loss.

    Attributes:
        weights: One factor for each microbatch that is in it: of multiplications by N, and for a Python number of those
            by all known numbers.
        kind: "batch" (what the loader gave), "tensor" (made from it), "loss" (a scalar with a graph).
        reduction: "mean", "sum" or "" (not known), over the rows of a microbatch.
        number: Whether it is a Python number, or detached: no backward goes through it.
        scaled: Whether a scaler multiplied it.
        opaque: What on its way could not be read.
        tokens: The line where it was divided by the count of this microbatch's tokens or masked rows, 0 if it was not.
        coupled: The line where rows of the batch were compared with one another, 0 if they were not.
        forward_synced: Whether a model made it outside of `no_sync`; `None` if no model did.
        divided: The line of a division by N, 0 if there was none.
        mixed: The line where a term that is not divided by N was added to one that is, 0 if there is none.
        inside: Whether a model returned it as a loss: a mean of it may be one over the devices of `DataParallel`.
        blurred: Whether an unknown number multiplied or divided it, so that `weights` mean nothing for a number.
    """

    weights: dict[int, Fraction]
    kind: str = "tensor"
    reduction: str = ""
    number: bool = False
    scaled: bool = False
    opaque: tuple[str, ...] = ()
    tokens: int = 0
    coupled: int = 0
    forward_synced: bool | None = None
    divided: int = 0
    blurred: bool = False
    mixed: int = 0
    inside: bool = False

    def times(self, factor: Fraction, line: int = 0) -> "Data":
        """The same with every weight multiplied."""
        return replace(self, weights={m: w * factor for m, w in self.weights.items()}, divided=line or self.divided)

    def total(self) -> Fraction:
        """The sum of the weights: 1 for a mean over its microbatches."""
        return sum(self.weights.values(), Fraction(0))


def is_number(value: Any) -> bool:
    """Whether a value is a known number."""
    return isinstance(value, (Num, int, float, Fraction))


def number(value: Any) -> Any:
    """The plain number of a value."""
    return value.value if isinstance(value, Num) else value


def tags(*values: Any) -> frozenset[str]:
    """The origins of several values together."""
    found: frozenset[str] = NOTHING
    for value in values:
        if isinstance(value, (Num, Unknown)):
            found |= value.tags
    return found


def hangs_on_data(value: Any) -> bool:
    """Whether a value hangs on the microbatch at hand."""
    return isinstance(value, Data) or (isinstance(value, Unknown) and value.data)


def as_loss(value: Data) -> Data:
    """The same value, known to be a loss."""
    return replace(value, kind="loss")
