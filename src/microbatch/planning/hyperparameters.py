"""What an optimizer was told, as plain values: read from its parameter groups, and written back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from microbatch.arguments import is_finite
from microbatch.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """The hyperparameters of one parameter group of an optimizer.

    Attributes:
        optimizer: ``"SGD"``, ``"Adam"``, ``"AdamW"``, or the name of another class.
        learning_rate: The peak, before any schedule; more than 0.
        momentum: SGD's momentum, in [0, 1); `None` where there is none.
        betas: Decay, a step, of Adam's averages of the gradient and of its square, each in [0, 1); `None` where there
            are none.
        eps: What Adam adds to the denominator, in units of the gradient; 0 or more, `None` where there is none.
        weight_decay: 0 or more.
    """

    optimizer: str
    learning_rate: float
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no optimizer could use.

        Raises:
            ConfigError: A value is not a finite number of its range; the message says which.
        """
        if not isinstance(self.optimizer, str) or not self.optimizer:
            raise ConfigError(f'optimizer must be the name of one, such as "AdamW", not {self.optimizer!r}')
        if not (is_number(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning_rate must be a positive number, not {self.learning_rate!r}")
        betas = (None, None) if self.betas is None else self.betas
        if not isinstance(betas, tuple) or len(betas) != 2:
            raise ConfigError(f"betas must be a tuple of two numbers, such as (0.9, 0.999), not {betas!r}")
        for name, value in {"momentum": self.momentum, "beta1": betas[0], "beta2": betas[1]}.items():
            if value is not None and not (is_number(value) and 0 <= value < 1):
                raise ConfigError(f"{name} must be a number from 0 up to, not including, 1, not {value!r}")
        for name, value in {"eps": 0.0 if self.eps is None else self.eps, "weight_decay": self.weight_decay}.items():
            if not (is_number(value) and value >= 0):
                raise ConfigError(f"{name} must be a number of at least 0, not {value!r}")

    def rows(self) -> Mapping[str, float]:
        """Name every value that there is, one number each.

        Returns:
            For example ``{"learning rate": 0.1, "momentum": 0.9, "weight decay": 0.0}``.
        """
        beta1, beta2 = (None, None) if self.betas is None else self.betas
        named = {
            "learning rate": self.learning_rate,
            "momentum": self.momentum,
            "beta1": beta1,
            "beta2": beta2,
            "eps": self.eps,
            "weight decay": self.weight_decay,
        }
        return {name: value for name, value in named.items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        """Give the values as JSON can hold them.

        Returns:
            One key a field; ``betas`` is a list.
        """
        return asdict(self) | {"betas": None if self.betas is None else list(self.betas)}


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number.

    Args:
        value: Anything.

    Returns:
        False for a truth value, an infinity and NaN too.
    """
    return is_finite(value)


def read_optimizer(optimizer: Optimizer) -> tuple[Hyperparameters, ...]:
    """Read what every parameter group was told.

    Where a learning-rate scheduler is at work, the learning rate is the one it started from, as it is the peak that
    was tuned.

    Args:
        optimizer: Any optimizer whose groups have a learning rate. Subclasses of `SGD`, `Adam` and `AdamW` are read as
            these.

    Returns:
        One record for each parameter group, in order.

    Raises:
        ConfigError: A group has no learning rate, or holds a value that cannot work.
    """
    groups: list[Hyperparameters] = []
    for index, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise ConfigError(
                f"parameter group {index} of {type(optimizer).__name__} has no learning rate 'lr'; give its values as "
                "mb.Hyperparameters instead"
            )
        try:
            groups.append(_read(_kind(optimizer, group), group))
        except ConfigError as error:
            raise ConfigError(f"parameter group {index} of {type(optimizer).__name__}: {error}") from None
    return tuple(groups)


def _kind(optimizer: Optimizer, group: Mapping[str, Any]) -> str:
    # Each group of an Adam may be told to decouple its decay, and is AdamW's then.
    if isinstance(optimizer, AdamW) or (isinstance(optimizer, Adam) and group.get("decoupled_weight_decay", False)):
        return "AdamW"
    return next((known.__name__ for known in (Adam, SGD) if isinstance(optimizer, known)), type(optimizer).__name__)


def _read(kind: str, group: Mapping[str, Any]) -> Hyperparameters:
    betas, eps, momentum = group.get("betas"), group.get("eps"), group.get("momentum")
    return Hyperparameters(
        optimizer=kind,
        learning_rate=float(group.get("initial_lr", group["lr"])),
        momentum=float(momentum) if isinstance(momentum, int | float | Tensor) else None,
        # Others keep three betas, or a pair of eps, under these names: they are not Adam's, and are not read.
        betas=(float(betas[0]), float(betas[1])) if isinstance(betas, Sequence) and len(betas) == 2 else None,
        eps=float(eps) if isinstance(eps, int | float | Tensor) else None,
        weight_decay=float(group.get("weight_decay") or 0.0),
    )


def write_optimizer(
    optimizer: Optimizer, *, given: Sequence[Hyperparameters], scaled: Sequence[Hyperparameters]
) -> None:
    """Put scaled values in the place of the given ones, in every parameter group.

    Only what differs between the two is written, and only where the given value still stands, so that nothing is
    scaled twice.

    Args:
        optimizer: Whose groups are written.
        given: What each group holds.
        scaled: What each group is to hold.

    Raises:
        ConfigError: A learning-rate scheduler has taken its base from the optimizer already, or its groups are not
            those that were given; nothing is written then.
    """
    groups = optimizer.param_groups
    if any("initial_lr" in group for group in groups):
        raise ConfigError(
            "a learning-rate scheduler holds this optimizer's learning rates already and would write its own over the "
            "scaled ones; scale before the scheduler is made"
        )
    now = read_optimizer(optimizer)
    if len(now) != len(given):
        raise ConfigError(f"{len(given)} parameter groups were given, and this optimizer has {len(now)}")
    for index, (held, before, after) in enumerate(zip(now, given, scaled, strict=True)):
        for name in ("optimizer", *_changed(before, after)):
            if getattr(held, name) != getattr(before, name):
                raise ConfigError(
                    f"{name} of parameter group {index} is {getattr(held, name)!r} and not {getattr(before, name)!r}, "
                    "the one that was given; was it scaled before, or is it another optimizer?"
                )
    for group, before, after in zip(groups, given, scaled, strict=True):
        for name in _changed(before, after):
            _put(group, {"learning_rate": "lr"}.get(name, name), getattr(after, name))


def _changed(before: Hyperparameters, after: Hyperparameters) -> list[str]:
    return [name for name in ("learning_rate", "betas", "eps") if getattr(before, name) != getattr(after, name)]


def _put(group: dict[str, Any], key: str, value: float | tuple[float, float]) -> None:
    held = group[key]
    if isinstance(value, tuple):
        group[key] = tuple(_replaced(each, number) for each, number in zip(held, value, strict=True))
    else:
        group[key] = _replaced(held, value)


def _replaced(held: float | Tensor, value: float) -> float | Tensor:
    # A compiled or captured step reads the very tensor that it was given.
    return held.fill_(value) if isinstance(held, Tensor) else value
