"""What the name of a function that the file does not show says of it."""

import re
from dataclasses import dataclass
from functools import lru_cache

from microbatch.linting.guesses import COUPLED_LOSSES, MEAN_LOSSES

__all__ = ["CallWords", "words_of"]

_RESCALES = re.compile(r"(re)?scale_grad|average_grad|normali[sz]e_grad|divide_grad", re.IGNORECASE)
_STEPS = re.compile(r"step|update|optimi[sz]e")
_ADJUSTS = re.compile(r"lr|learning_rate|sched|warm|adjust|decay|save|checkpoint|state|resume|load")
_AVERAGE_RANKS = re.compile(r"reduce|gather|average|sync|mean")
_ADDS = re.compile(r"accum|sum|total|add", re.IGNORECASE)  # into a number that is shown later
_LOGS = re.compile(r"^(print|(tqdm|log)\.write|log\.info|logging\.\w+|logger\.\w+|wandb\.log|mlflow\.\w+|pprint)$")


@dataclass(frozen=True, slots=True)
class CallWords:
    """What a name says.

    Attributes:
        shows: Whether it is a whole name by which numbers are shown: `print`, `logger.info`.
        logs: Whether it shows or keeps numbers, by the whole name or by a word of its last part.
        steps: Whether it steps or updates something.
        adjusts: Whether it is about a learning rate, a checkpoint or the like, so that it steps no optimizer.
        rescales: Whether it rescales gradients.
        means: Whether it is a loss of torch that is a mean.
        couples: Whether it is a loss that compares the rows of a batch.
        averages: Whether it averages over ranks.
    """

    shows: bool
    logs: bool
    steps: bool
    adjusts: bool
    rescales: bool
    means: bool
    couples: bool
    averages: bool


@lru_cache(8192)
def words_of(text: str) -> CallWords:
    """Read a name.

    Args:
        text: The name with its dots.

    Returns:
        What it says.
    """
    last = text.rsplit(".", 1)[-1]
    shows = _LOGS.match(text) is not None
    return CallWords(
        shows=shows,
        logs=shows or (re.search(r"(^|_)log(_|$|ging)", last) is not None and _ADDS.search(last) is None),
        steps=_STEPS.search(last) is not None,
        adjusts=_ADJUSTS.search(last) is not None,
        rescales=_RESCALES.search(last) is not None,
        means=MEAN_LOSSES.search(text) is not None,
        couples=COUPLED_LOSSES.search(text) is not None,
        averages=_AVERAGE_RANKS.search(last) is not None,
    )
