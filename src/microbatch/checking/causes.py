"""Find which causes there are, and how much of the error each of them makes, by switching them off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from microbatch.checking.accumulating import COUNTS, COUPLING, LENGTHS, ROW_ORDER, Term
from microbatch.checking.check_report import Cause
from microbatch.checking.gradient import Gradient, combined, norm, relative_error
from microbatch.checking.samples import TOLERANCE, Found, Samples
from microbatch.checking.trial_runs import HOOKS, RANDOMNESS, STATE, STATISTICS, SWITCHES, Stage

PRECISION, UNEXPLAINED, DIVIDED = "precision", "unexplained", "divided"
_LOSS, _MODEL, _LOOP = "the loss", "the model", "the loop"

REMEDIES = {
    STATISTICS: 'Accumulator(..., batch_norm="exact") normalises over the whole batch; GroupNorm or LayerNorm need no '
    "statistics of it",
    RANDOMNESS: 'the same distribution, another sample: Accumulator(..., dropout="by_row") draws the same for a row '
    "however the batch is cut",
    STATE: "let a forward pass leave nothing behind that the next one reads, or keep it out of training",
    HOOKS: "let a hook only multiply the gradient, or change the finished gradient, after "
    "accumulator.gradient(batch, loss_fn). For a hook on the gradient of an activation, counts= is enough: then each "
    "part is divided by the count of the whole batch, and not by an estimate of it",
    COUNTS: "return mb.Loss(sum=..., count=...): the sum over what is counted, and how many that are",
    COUPLING: "accumulator.step(batch, loss_fn, encode=encode) computes the loss on the whole batch's representations; "
    "mb.losses.info_nce, mb.losses.clip and mb.losses.siglip do so without a whole similarity matrix",
    ROW_ORDER: "store the value that depends on the row's place in the batch itself, so that each row has its own",
    LENGTHS: "mask what is padded, so that trimming it changes nothing; or leave out lengths=",
    PRECISION: "sums=mb.Sums(dtype=torch.float32), the default, adds narrow gradients up without losing them; where "
    'that does not fit, mb.Sums(dtype=torch.bfloat16, how="compensated") takes a byte a parameter less',
    DIVIDED: "return the mean over the rows itself: the accumulator divides by the count of the whole batch",
    UNEXPLAINED: "compare the loss function with what is really minimised, and look for state outside of the model",
}
IN_MODEL = {
    COUPLING: "mb.batch_mean, mb.batch_sum or mb.batch_gather in the place of a statistic over the rows make it one "
    "over the whole batch",
}
_BESIDE_STATISTICS = (
    'the same distribution, another sample. dropout="by_row" draws the same for a row however the batch is cut, but '
    'not beside batch_norm="exact"; it needs layers without statistics of the batch, as '
    'mb.convert_batch_norm(model, to="group") makes them'
)


@runtime_checkable
class Subject(Protocol):
    """What is checked: a way to accumulate a gradient."""

    size: int
    terms: Mapping[str, Term]
    repairs: bool

    def gradient(self, stage: Stage, off: frozenset[str] = frozenset()) -> Gradient:
        """Accumulate it, with some causes switched off."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """Name a cause that there may be.

    Attributes:
        kind: The cause's.
        words: What was seen.
        where: Where.
        switch: Whether it can be switched off.
        remedy: What to do.
    """

    kind: str
    words: str
    where: tuple[str, ...] = ()
    switch: bool = True
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Causes:
    """Hold what was found.

    Attributes:
        causes: Largest first.
        off: What was switched off in the end.
        rest: Relative error that was left then.
    """

    causes: tuple[Cause, ...]
    off: frozenset[str]
    rest: float


def error(stage: Stage, subject: Subject, off: frozenset[str]) -> float:
    """Compare the accumulated gradient with the whole batch's, with the same things switched off in both.

    Args:
        stage: Where.
        subject: What is checked.
        off: What is switched off.

    Returns:
        The relative error.
    """
    return relative_error(subject.gradient(stage, off), stage.whole(off))


def find_causes(stage: Stage, subject: Subject, *, limit: float, more: Sequence[Suspect] = ()) -> Causes:
    """Find what keeps an accumulated gradient from being the whole batch's.

    Each suspect is switched off by itself, and left on by itself: what it makes alone, and what is left without it.

    Args:
        stage: Where to play.
        subject: What is checked.
        limit: Relative error that is none.
        more: Suspects beside those that model and loss give rise to.

    Returns:
        The causes.
    """
    suspects = [*_suspects(stage, subject), *more]
    off = frozenset(each.kind for each in suspects)
    rest = error(stage, subject, off)
    if rest > limit:
        base = off & SWITCHES
        samples = Samples(stage, base, size=subject.size, tolerance=max(TOLERANCE, 10 * limit))
        for found in samples.find():
            if found.kind == COUNTS and not subject.repairs:  # what a loop does about them it has been asked
                continue
            suspects.append(_suspect(found, switch=found.in_loss and subject.repairs))
        subject.terms = samples.terms
        off = frozenset(each.kind for each in suspects if each.switch)
        rest = error(stage, subject, off)
    return Causes(tuple(_amounts(stage, subject, suspects, off=off, limit=limit)), off, rest)


def _amounts(
    stage: Stage, subject: Subject, suspects: Sequence[Suspect], *, off: frozenset[str], limit: float
) -> list[Cause]:
    total, rest = error(stage, subject, frozenset()), error(stage, subject, off)
    causes: list[Cause] = []
    for each in suspects:
        alone, without = rest, None
        if each.switch:
            same = {COUPLING, ROW_ORDER} if each.kind in {COUPLING, ROW_ORDER} else {each.kind}
            alone, without = error(stage, subject, off - same), error(stage, subject, frozenset({each.kind}))
            # Beside a cause that cannot be switched off, this one's own part is what it adds.
            if rest > limit:
                on, none = subject.gradient(stage, off - same), subject.gradient(stage, off)
                alone = norm(combined([on, none], [1.0, -1.0])) / norm(stage.whole(off))
        # What has its remedy makes no error, but without it another cause's may happen to be smaller.
        less = without is not None and without < 0.5 * total and each.kind not in stage.remedied
        if alone > limit or less:
            causes.append(
                Cause(
                    kind=each.kind,
                    words=each.words,
                    where=each.where,
                    alone=alone,
                    without=without,
                    remedy=each.remedy or REMEDIES[each.kind],
                )
            )
    if rest > limit and all(each.switch for each in suspects):
        words = "an error is left with everything switched off that is known to make one"
        causes.append(Cause(kind=UNEXPLAINED, words=words, alone=rest, remedy=REMEDIES[UNEXPLAINED]))
    if STATISTICS in {cause.kind for cause in causes}:  # whose first remedy excludes the other one's
        causes = [replace(each, remedy=_BESIDE_STATISTICS) if each.kind == RANDOMNESS else each for each in causes]
    return sorted(causes, key=lambda cause: -(cause.alone or 0.0))


def _suspects(stage: Stage, subject: Subject) -> list[Suspect]:
    """Name what a forward pass over the whole batch shows."""
    survey = stage.survey()
    found: list[Suspect] = []
    if survey.statistics:
        count = len(survey.statistics)
        words = f"{count} module{'s normalise' if count > 1 else ' normalises'} by the statistics of a microbatch"
        found.append(Suspect(kind=STATISTICS, words=words, where=tuple(name or _MODEL for name in survey.statistics)))
    if survey.random:
        words = "other random numbers are drawn for another cut"
        found.append(Suspect(kind=RANDOMNESS, words=words, where=survey.random))
    if changed := stage.state(subject.size):
        words = "a forward pass changes what the next one computes with"
        found.append(Suspect(kind=STATE, words=words, where=tuple(changed)))
    if hooks := stage.hooks():
        words = "a hook gets each microbatch's part of a gradient, and its result is not linear in that part"
        found.append(Suspect(kind=HOOKS, words=words, where=tuple(name or _MODEL for name in hooks)))
    return found


def _suspect(found: Found, *, switch: bool) -> Suspect:
    remedy = IN_MODEL.get(found.kind, "") if not found.in_loss and found.where else ""
    made = Suspect(kind=found.kind, words=found.words, where=found.where, switch=switch, remedy=remedy)
    return made if found.where else replace(made, where=(_LOSS if found.in_loss else f"{_LOSS} or {_MODEL}",))
