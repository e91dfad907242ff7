"""How hyperparameters go with the batch: each rule with its formula, its source, and where it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from microbatch.arguments import is_text
from microbatch.errors import ConfigError
from microbatch.planning.hyperparameters import Hyperparameters

# The largest batch of each source: ImageNet images, and sequences of text.
_LINEAR_LIMIT = 8192
_HALF_LIFE_LIMIT = 4096
# An average with a smaller beta looks back over less than two steps: hardly an average.
_SHORT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Say how the batch changes.

    Attributes:
        from_batch_size: Samples a step, for which the given values were tuned; at least 1.
        to_batch_size: Samples a step of the run to come; at least 1.
        warmup_steps: Steps of warm-up at the first, or `None` if it was not said.
    """

    from_batch_size: int
    to_batch_size: int
    warmup_steps: int | None

    @property
    def factor(self) -> float:
        """How many times larger the batch becomes."""
        return self.to_batch_size / self.from_batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Say how a rule is computed, who found it, and where it holds.

    Attributes:
        name: What it is asked for by.
        formula: What it does to the values, where the batch grows ``k`` times.
        source: The paper.
        holds: Where it was derived or tried.
        made_for: The optimizers it was made for.
        scale: The rule: the given values and ``k`` to the scaled ones.
        warn: What to say where it leaves that range.
    """

    name: str
    formula: str
    source: str
    holds: str
    made_for: tuple[str, ...]
    scale: Callable[[Hyperparameters, float], Hyperparameters]
    warn: Callable[[Hyperparameters, Hyperparameters, Change], Iterator[str]]


def _linear(given: Hyperparameters, factor: float) -> Hyperparameters:
    return replace(given, learning_rate=given.learning_rate * factor)


def _warn_linear(given: Hyperparameters, scaled: Hyperparameters, change: Change) -> Iterator[str]:
    if given.optimizer in {"Adam", "AdamW"}:
        yield (
            f"the linear rule is SGD's: {given.optimizer} divides by the gradient's own size, whose noise shrinks with "
            f'the square root of the batch, so {scaled.learning_rate:.6g} is likely wrong. Use rule="sqrt"'
        )
    if change.factor > 1 and not change.warmup_steps:
        yield (
            f"without warm-up, {scaled.learning_rate:.6g} meets the first steps, where the rule fails: start at "
            f"{given.learning_rate:.6g} and rise to it over the first epochs (five in the paper). Pass warmup_steps="
        )
    largest = max(change.from_batch_size, change.to_batch_size)
    if largest > _LINEAR_LIMIT:
        yield (
            f"a batch of {largest:,} is above {_LINEAR_LIMIT:,}, where the paper's accuracy began to fall: tune the "
            "learning rate there"
        )


def _square_root(given: Hyperparameters, factor: float) -> Hyperparameters:
    root = math.sqrt(factor)
    if given.optimizer == "SGD":
        return replace(given, learning_rate=given.learning_rate * root)
    if given.betas is None or given.eps is None:
        raise ConfigError(
            f"the square-root rule changes betas and eps too, and {given.optimizer} was given without them; pass "
            "Adam's, such as betas=(0.9, 0.999), eps=1e-8, or choose another rule"
        )
    beta1, beta2 = (_stretched(beta, factor) for beta in given.betas)
    return replace(given, learning_rate=given.learning_rate * root, betas=(beta1, beta2), eps=given.eps / root)


def _stretched(beta: float, factor: float) -> float:
    # A beta of 0 is no average at all, at any batch; one that would be negative has run into it.
    return max(0.0, 1 - factor * (1 - beta)) if beta else 0.0


def _warn_square_root(given: Hyperparameters, scaled: Hyperparameters, change: Change) -> Iterator[str]:
    if given.optimizer == "SGD":
        yield (
            "the square-root rule is Adam's: for SGD it leaves the noise of a step, a sample, below what it was (26.2 "
            'against 23.7 % error at a batch of 8,192 in Goyal et al. 2017, table 2); use rule="linear"'
        )
    if given.betas is None or scaled.betas is None:
        return
    for name, before, after in zip(("beta1", "beta2"), given.betas, scaled.betas, strict=True):
        value = 1 - change.factor * (1 - before)
        if before and value <= 0:
            end = round(change.from_batch_size / (1 - before))
            yield (
                f"{name} would be {value:.6g}, which no average has; 0 is taken, but the rule ends at "
                f"a batch of {end:,}: stay well below, or start from a larger {name}"
            )
        elif before > _SHORT > after:
            yield (
                f"{name} falls to {after:.6g}, an average over {1 / (1 - after):.2g} steps: the rule is derived for "
                "averages over many"
            )


def _half_life(given: Hyperparameters, factor: float) -> Hyperparameters:
    if given.betas is None:
        raise ConfigError(
            f"the half-life rule changes beta2, and {given.optimizer} was given without betas; pass Adam's, or choose "
            'another rule, such as "linear" for SGD'
        )
    beta1, beta2 = given.betas
    return replace(given, betas=(beta1, beta2**factor))


def _warn_half_life(given: Hyperparameters, scaled: Hyperparameters, change: Change) -> Iterator[str]:
    root = given.learning_rate * math.sqrt(change.factor)
    low, high = sorted((root, given.learning_rate))
    yield (
        f"the rule leaves the learning rate at {given.learning_rate:.6g} for you to tune: in the paper the best one "
        f"moves with the batch, but less than its square root, so look between {low:.6g} and {high:.6g}"
    )
    if scaled.betas is not None and given.betas is not None and given.betas[1] > _SHORT > scaled.betas[1]:
        yield (
            f"beta2 falls to {scaled.betas[1]:.6g}: a half-life of less than a step cannot be kept, so start from a "
            "larger beta2"
        )
    largest = max(change.from_batch_size, change.to_batch_size)
    if largest > _HALF_LIFE_LIMIT:
        yield f"a batch of {largest:,} is above {_HALF_LIFE_LIMIT:,}, the largest that the paper tried"


RULES = {
    rule.name: rule
    for rule in (
        Rule(
            name="linear",
            formula="learning rate * k, after a warm-up; momentum kept",
            source="Goyal et al. 2017, arXiv:1706.02677, section 2.1",
            holds="SGD; images, batches up to 8,192, with warm-up",
            made_for=("SGD",),
            scale=_linear,
            warn=_warn_linear,
        ),
        Rule(
            name="sqrt",
            formula="learning rate * sqrt(k), beta -> 1 - k (1 - beta), eps / sqrt(k)",
            source="Malladi et al. 2022, arXiv:2205.10287, section 5",
            holds="Adam, where noise dominates the gradient and k (1 - beta) stays well below 1",
            made_for=("Adam", "AdamW"),
            scale=_square_root,
            warn=_warn_square_root,
        ),
        Rule(
            name="half-life",
            formula="beta2 -> beta2 ** k: the same half-life of the second moment, in samples",
            source="Marek et al. 2025, arXiv:2507.07101",
            holds="Adam on language models, batches of 1 to 4,096; the learning rate is to be tuned",
            made_for=("Adam", "AdamW"),
            scale=_half_life,
            warn=_warn_half_life,
        ),
    )
}


def choose_rule(name: str, *, optimizer: str) -> Rule:
    """Find the rule of a name, or the one that was made for an optimizer.

    Args:
        name: ``"linear"``, ``"sqrt"``, ``"half-life"``, or ``"auto"``.
        optimizer: Name of the optimizer's class.

    Returns:
        For ``"auto"``, linear for SGD, square root for Adam and AdamW.

    Raises:
        ConfigError: There is no rule of that name, or none was made for the optimizer.

    Example:
        >>> choose_rule("auto", optimizer="AdamW").name
        'sqrt'
    """
    if is_text(name, "auto"):
        for rule in RULES.values():
            if optimizer in rule.made_for:
                return rule
        raise ConfigError(
            f"no rule was made for {optimizer}; choose one whose optimizer it resembles: "
            + ", ".join(f'rule="{rule.name}" ({" and ".join(rule.made_for)})' for rule in RULES.values())
        )
    if not isinstance(name, str) or name not in RULES:
        known = ", ".join(f'"{each}"' for each in ("auto", *RULES))
        raise ConfigError(f"rule must be one of {known}, not {name!r}")
    return RULES[name]
