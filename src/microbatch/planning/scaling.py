"""Hyperparameters that go with the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch.optim import Optimizer

from microbatch.arguments import check_whole
from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of
from microbatch.planning.hyperparameters import Hyperparameters, is_number, read_optimizer, write_optimizer
from microbatch.planning.rules import Change, Rule, choose_rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """The hyperparameters for another batch, the rule that they follow, and its limits.

    Attributes:
        rule: Name of the rule.
        formula: What it does, where the batch grows ``k`` times.
        source: Where it comes from.
        holds: Where it was derived or tried.
        from_batch_size: Effective batch that the given values were tuned for, in samples.
        to_batch_size: Effective batch of the run to come, in samples.
        given: What was given, one record for each parameter group.
        scaled: What goes with the other batch, likewise.
        given_warmup_steps: Steps of warm-up that were given, or `None`.
        warmup_steps: Steps of warm-up over as many samples.
        given_steps: Steps of the schedule that were given, or `None`.
        steps: Steps of the schedule over as many samples.
        warnings: Where the rule may not hold, in words; empty where it holds.
    """

    rule: str
    formula: str
    source: str
    holds: str
    from_batch_size: int
    to_batch_size: int
    given: tuple[Hyperparameters, ...]
    scaled: tuple[Hyperparameters, ...]
    given_warmup_steps: int | None
    warmup_steps: int | None
    given_steps: int | None
    steps: int | None
    warnings: tuple[str, ...]

    @property
    def factor(self) -> float:
        """How many times larger the batch becomes: the ``k`` of the formula."""
        return self.to_batch_size / self.from_batch_size

    def apply_to(self, optimizer: Optimizer) -> None:
        """Write the scaled values into an optimizer, every parameter group, in place.

        Before the first step and before a scheduler is made: averages that the optimizer holds already stay as they
        are, and a scheduler keeps the learning rates it started from.

        Args:
            optimizer: The one that the values were read from, or one that holds the same.

        Raises:
            ConfigError: It holds other values than were given (they may have been scaled already), or a learning-rate
                scheduler holds its learning rates; nothing is written then.
        """
        write_optimizer(optimizer, given=self.given, scaled=self.scaled)

    def table(self) -> str:
        """Write the change for people.

        Returns:
            Several lines: the rule, every value before and after, and the warnings.
        """
        rows = list(self._rows())
        ratio = Fraction(self.to_batch_size, self.from_batch_size)
        left, middle = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [
            f"{self.rule} rule, batch of {self.from_batch_size:,} to {self.to_batch_size:,} (k = {ratio})",
            f"  {self.formula}",
            f"  {self.source}",
            f"  holds for {self.holds}",
            "",
            *(f"{name:<{left}}  {before:>{middle}}  {after}".rstrip() for name, before, after in rows),
            *(f"! {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Give everything as JSON can hold it.

        Returns:
            One key a field, and ``factor``.
        """
        return {
            "rule": self.rule,
            "formula": self.formula,
            "source": self.source,
            "holds": self.holds,
            "from_batch_size": self.from_batch_size,
            "to_batch_size": self.to_batch_size,
            "factor": self.factor,
            "given": [group.as_dict() for group in self.given],
            "scaled": [group.as_dict() for group in self.scaled],
            "given_warmup_steps": self.given_warmup_steps,
            "warmup_steps": self.warmup_steps,
            "given_steps": self.given_steps,
            "steps": self.steps,
            "warnings": list(self.warnings),
        }

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        yield "", "given", "scaled"
        for index, (before, after) in enumerate(zip(self.given, self.scaled, strict=True)):
            group = f", group {index}" if len(self.given) > 1 else ""
            values = after.rows()
            for name, value in before.rows().items():
                yield f"{name}{group}", f"{value:.7g}", f"{values[name]:.7g}"
        lengths = {
            "warm-up steps": (self.given_warmup_steps, self.warmup_steps),
            "steps": (self.given_steps, self.steps),
        }
        for name, (given, scaled) in lengths.items():
            if given is not None and scaled is not None:
                yield name, f"{given:,}", f"{scaled:,}"


def scale_hyperparameters(
    given: Optimizer | Hyperparameters,
    *,
    from_batch_size: int,
    to_batch_size: int,
    rule: str = "auto",
    warmup_steps: int | None = None,
    steps: int | None = None,
    critical_batch_size: float | None = None,
) -> Scaling:
    """Find the hyperparameters that go with another effective batch.

    With ``k = to_batch_size / from_batch_size``, one step of the large batch takes the place of ``k`` steps of the
    small one. For SGD, ``k`` steps along nearly the same gradient are one of ``k`` times the learning rate. Adam
    divides by the gradient's size, which is mostly noise and shrinks by ``sqrt(k)``: ``sqrt(k)`` times the learning
    rate does the same, once its averages look back over as many samples, ``beta -> 1 - k (1 - beta)``, and ``eps``
    shrinks with the noise. Lengths of schedules are kept in samples, so steps are divided by ``k``.

    Nothing is changed in the optimizer: `Scaling.apply_to` does that. Weight decay and momentum are left alone.

    Args:
        given: An optimizer, all of whose parameter groups are read, or plain values. Where a scheduler is at work, the
            learning rates are those it started from.
        from_batch_size: Effective batch for which the given values are right, in samples over all ranks; at least 1.
        to_batch_size: Effective batch of the run to come, likewise.
        rule: ``"linear"`` (SGD), ``"sqrt"`` (Adam), ``"half-life"`` (beta2 of Adam on small batches), or ``"auto"``:
            linear for SGD, square root for Adam and AdamW.
        warmup_steps: Steps of warm-up at ``from_batch_size``; 0 or more, `None` if not to be scaled.
        steps: Steps of the whole schedule at ``from_batch_size``; 0 or more, `None` if not to be scaled.
        critical_batch_size: Samples beyond which a larger batch hardly saves steps, where it was measured.

    Returns:
        The given and the scaled values, and warnings where the rule leaves the range it was derived or tried for.

    Raises:
        ConfigError: A number is not positive and finite, no rule was made for the optimizer, or the rule needs values
            that were not given.

    Example:
        >>> adam = Hyperparameters(optimizer="Adam", learning_rate=1e-3, betas=(0.9, 0.999), eps=1e-8)
        >>> scaling = scale_hyperparameters(adam, from_batch_size=256, to_batch_size=1024, warmup_steps=400)
        >>> scaling.scaled[0].learning_rate, round(scaling.scaled[0].betas[0], 6), scaling.scaled[0].eps
        (0.002, 0.6, 5e-09)
        >>> scaling.warmup_steps
        100

    Source:
        Goyal et al. 2017 (arXiv:1706.02677); Malladi et al. 2022 (arXiv:2205.10287); Marek et al. 2025
        (arXiv:2507.07101); critical batch: McCandlish et al. 2018 (arXiv:1812.06162); weight decay: Wang and Aitchison
        2024 (arXiv:2405.13698).
    """
    from_batch_size = check_whole("from_batch_size", from_batch_size, least=1)
    to_batch_size = check_whole("to_batch_size", to_batch_size, least=1)
    warmup_steps = None if warmup_steps is None else check_whole("warmup_steps", warmup_steps, least=0)
    steps = None if steps is None else check_whole("steps", steps, least=0)
    if critical_batch_size is not None and not (is_number(critical_batch_size) and critical_batch_size > 0):
        raise ConfigError(f"critical_batch_size must be a positive number of samples, not {critical_batch_size!r}")
    groups = _groups(given)
    chosen = choose_rule(rule, optimizer=groups[0].optimizer)
    change = Change(from_batch_size=from_batch_size, to_batch_size=to_batch_size, warmup_steps=warmup_steps)
    scaled = tuple(chosen.scale(group, change.factor) for group in groups)
    lengths = {"warmup_steps": warmup_steps, "steps": steps}
    new_lengths = {name: None if length is None else scale_steps(length, change) for name, length in lengths.items()}
    warnings = [text for pair in zip(groups, scaled, strict=True) for text in _warn(chosen, pair, change)]
    warnings += _warn_critical(change, critical_batch_size)
    warnings += [text for name, length in lengths.items() if length for text in _warn_rounded(name, length, change)]
    return Scaling(
        rule=chosen.name,
        formula=chosen.formula,
        source=chosen.source,
        holds=chosen.holds,
        from_batch_size=from_batch_size,
        to_batch_size=to_batch_size,
        given=groups,
        scaled=scaled,
        given_warmup_steps=warmup_steps,
        warmup_steps=new_lengths["warmup_steps"],
        given_steps=steps,
        steps=new_lengths["steps"],
        # Groups that differ in nothing but their parameters would say everything twice.
        warnings=tuple(dict.fromkeys(warnings)),
    )


def scale_steps(steps: int, change: Change) -> int:
    """Turn a number of steps into the number that sees as many samples.

    Args:
        steps: Steps at the first batch size; 0 or more.
        change: How the batch changes.

    Returns:
        The nearest whole number of steps; at least 1, unless there were none.

    Example:
        >>> scale_steps(500, Change(from_batch_size=256, to_batch_size=1024, warmup_steps=None))
        125
    """
    samples, size = steps * change.from_batch_size, change.to_batch_size
    return max(min(1, steps), (2 * samples + size) // (2 * size))


def _groups(given: object) -> tuple[Hyperparameters, ...]:
    if isinstance(given, Hyperparameters):
        return (given,)
    if isinstance(given, Optimizer):
        return read_optimizer(given)
    raise ConfigError(f"give a torch.optim.Optimizer or mb.Hyperparameters, not {kind_of(given)}")


def _warn(rule: Rule, pair: Sequence[Hyperparameters], change: Change) -> Iterator[str]:
    if change.factor == 1:
        return
    given, scaled = pair
    yield from rule.warn(given, scaled, change)
    if given.optimizer not in {"SGD", "Adam", "AdamW"}:
        yield (
            f"the rule was made for {' and '.join(rule.made_for)}, and is only borrowed for {given.optimizer}, all of "
            "whose other settings are left alone: watch the first steps"
        )
    # Decoupled decay makes the weights an average of past updates, over 1 / (learning rate * decay) steps.
    weaker = change.factor * given.learning_rate / scaled.learning_rate
    if given.optimizer == "AdamW" and given.weight_decay and abs(weaker - 1) > 0.01:
        yield (
            f"weight_decay stays at {given.weight_decay:.6g}. Over the same number of samples, it now shrinks the "
            f"weights {'less' if weaker > 1 else 'more'}; {given.weight_decay * weaker:.3g} would shrink them as "
            "before (Wang and Aitchison 2024)"
        )


def _warn_critical(change: Change, critical: float | None) -> Iterator[str]:
    if critical is not None and change.to_batch_size > max(critical, change.from_batch_size):
        yield (
            f"a batch of {change.to_batch_size:,} is past the critical one of {critical:,.6g}: from there a larger "
            "batch hardly saves steps, and every rule asks for too high a learning rate"
        )


def _warn_rounded(name: str, steps: int, change: Change) -> Iterator[str]:
    samples, now = steps * change.from_batch_size, scale_steps(steps, change) * change.to_batch_size
    if abs(now - samples) > 0.05 * samples:
        yield f"{name} in whole steps are {now:,} samples rather than {samples:,}"
