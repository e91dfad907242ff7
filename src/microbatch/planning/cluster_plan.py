"""Does it fit on hardware that one does not have, where the bytes are, and what would have to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from microbatch.errors import ConfigError
from microbatch.memory.budget import format_bytes
from microbatch.planning.arithmetic import Division, divide_batch
from microbatch.planning.block_profile import HELD, Model, Place, Profile
from microbatch.planning.communication import Assumed, Communication, communication
from microbatch.planning.model_shapes import Case
from microbatch.planning.sharding import OFFLOADS, PRECISIONS, STRATEGIES, Precision, Setup, State

_MOST = 1 << 20  # rows
_LISTED = 6
_FEW = 8  # microbatches whose bfloat16 gradients add up well enough
# How much one would rather not: an order, not a time.
_COST_OF_STRATEGY: dict[str, int] = dict(zip(STRATEGIES, (0, 1, 2, 3), strict=True))
_COST_OF_OFFLOAD: dict[str | None, int] = dict(zip(OFFLOADS, (0, 5, 8, 12), strict=True))
_COST_OF_PRECISION = {"mixed": 1, "bf16": 4, "bf16-8bit": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A setup that fits.

    Attributes:
        changes: What is different, in words.
        setup: All of it.
        microbatch_size: Rows; that which was asked for, or the largest that fits.
        peak_bytes: Of the rank that holds most.
        host_bytes: On the host, all ranks together.
    """

    changes: tuple[str, ...]
    setup: Setup
    microbatch_size: int
    peak_bytes: int
    host_bytes: int

    @property
    def words(self) -> str:
        """The alternative in one line."""
        host = f", and {format_bytes(self.host_bytes)} of host memory" if self.host_bytes else ""
        return f"{'; '.join(self.changes)}: {format_bytes(self.peak_bytes)}{host}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What training would take on hardware that may not be there.

    Attributes:
        name: The model.
        parameters: Elements of it.
        setup: On what, and how.
        division: The effective batch, how it is shared and cut.
        parts: Bytes at the peak, by category, of the rank that holds most.
        where: When the peak is.
        resident_bytes: Of parameters, gradients and optimizer state: what no microbatch size changes.
        host_bytes: On the host, all ranks together.
        largest: Rows of the largest microbatch that fits; 0 if none does.
        alternatives: Setups that fit, where this does not, cheapest change first.
        warnings: What to beware of.
        communication: What the ranks tell one another, and how long that takes; `None` for one rank.
    """

    name: str
    parameters: int
    setup: Setup
    division: Division
    parts: Mapping[str, int]
    where: str
    resident_bytes: int
    host_bytes: int
    largest: int
    alternatives: tuple[Alternative, ...]
    warnings: tuple[str, ...]
    communication: Communication | None = None

    @property
    def peak_bytes(self) -> int:
        """Most bytes in use at once on a rank."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether that is no more than the device has."""
        return self.peak_bytes <= self.setup.device.usable_bytes

    @property
    def words(self) -> str:
        """The answer in a few sentences."""
        device, precision = self.setup.device, self.setup.precision
        usable, peak = format_bytes(device.usable_bytes), format_bytes(self.peak_bytes)
        rows = f"microbatches of {self.division.microbatch_size}"
        if self.fits:
            larger = f"the largest microbatch that fits is {self.largest}"
            return f"It fits: {peak} of {usable} on each rank with {rows}; {larger}."
        resident = format_bytes(self.resident_bytes)
        said = f"It does not fit: {peak} on each rank with {rows}, where {device.name} has {usable}."
        if self.resident_bytes > device.usable_bytes:
            said += (
                f" Weights, gradients and optimizer state alone are {resident} ({precision.bytes} bytes of each of "
                f"{self.parameters:,} parameters, as they are shared): the number of microbatches changes none of it."
            )
        elif self.largest:
            said += f" A microbatch of {self.largest} fits, at the same effective batch."
        elif self.setup.checkpointing == "none":
            said += f" Of the state there are {resident}; even one row's activations do not fit beside it."
        if not self.alternatives:
            said += " No change that is known here makes it fit."
        return said

    def table(self) -> str:
        """Write the plan for people.

        Returns:
            Several lines: the setup, the batch, where the bytes are, the answer, what is communicated, and what would
            fit.
        """
        peak, usable = self.peak_bytes, self.setup.device.usable_bytes
        lines = [
            f"{self.name}, {self.parameters:,} parameters",
            self.setup.words,
            self.division.describe().splitlines()[0],
            "",
            f"peak {format_bytes(peak)} on a rank, {peak / usable:.0%} of what it has, in {self.where}",
            *(f"  {size / max(1, peak):4.0%}  {format_bytes(size):>9}  {name}" for name, size in self.parts.items()),
        ]
        if self.host_bytes:
            lines.append(f"        {format_bytes(self.host_bytes):>9}  on the host, all ranks together")
        lines += ["", self.words]
        if self.communication is not None:
            lines += ["", *self.communication.lines()]
        if self.alternatives:
            lines += ["", "what fits, cheapest change first"]
            lines += [f"  {index}. {each.words}" for index, each in enumerate(self.alternatives, 1)]
        return "\n".join([*lines, *(f"! {each}" for each in self.warnings)])

    def as_dict(self) -> dict[str, Any]:
        """Give everything as JSON can hold it.

        Returns:
            One key a field, and ``peak_bytes``, ``fits`` and ``words``.
        """
        found = asdict(self)
        found["setup"] = _plain(self.setup)
        found["division"] = self.division.as_dict()
        for written, each in zip(found["alternatives"], self.alternatives, strict=True):
            written["setup"] = _plain(each.setup)
            written["changes"] = list(each.changes)
        found["alternatives"], found["warnings"] = list(found["alternatives"]), list(self.warnings)
        found["communication"] = None if self.communication is None else self.communication.as_dict()
        return {**found, "peak_bytes": self.peak_bytes, "fits": self.fits, "words": self.words}


def cluster_plan(
    case: Case,
    setup: Setup,
    *,
    batch_size: int,
    microbatch_size: int | None = None,
    assumed: Assumed | None = None,
) -> ClusterPlan:
    """Say whether a model can be trained on hardware that one may not have, where the bytes are, and what it takes.

    The state is counted from the parameters: ``share of elements * bytes``. What a microbatch holds is measured with
    the meter on fake tensors, for which a few blocks are run and multiplied; at every moment the state, the layers that
    are gathered then and the gradients that are not shared yet are added, and the largest sum is the peak. Not counted
    are the optimizer step's own temporaries (``fused=True`` has none), fragments that the allocator cannot use, and
    workspaces inside operators.

    Args:
        case: The model, on any device, an example batch and the loss; see `case_from_config`.
        setup: Devices, ranks, and how the state is shared.
        batch_size: Effective batch in rows, over all ranks.
        microbatch_size: Rows that go through the model at once; `None` for the largest that fits.
        assumed: How fast links and devices are; `None` for what their data sheets say.

    Returns:
        The plan.

    Raises:
        ConfigError: Numbers that cannot be, or checkpointing of blocks in a model that repeats none.

    Cost:
        A few seconds, and the memory of a few thousand Python objects for each block.
    """
    return Simulation(case).plan(setup, batch_size=batch_size, microbatch_size=microbatch_size, assumed=assumed)


class Simulation:
    """Keep what was measured of a case, to plan it on several setups.

    Args:
        case: What is to be trained.
    """

    def __init__(self, case: Case) -> None:
        self.model = Model(case)
        self._profiles: dict[tuple[str, torch.dtype], Profile] = {}
        self._tops: dict[tuple[str, torch.dtype, int], dict[Place, tuple[int, ...]]] = {}

    def plan(
        self, setup: Setup, *, batch_size: int, microbatch_size: int | None = None, assumed: Assumed | None = None
    ) -> ClusterPlan:
        """Plan one setup; see `cluster_plan`.

        Args:
            setup: Devices, ranks, and how the state is shared.
            batch_size: Effective batch in rows, over all ranks.
            microbatch_size: Rows that go through the model at once; `None` for the largest that fits.
            assumed: How fast links and devices are; `None` for what their data sheets say.

        Returns:
            The plan.

        Raises:
            ConfigError: Numbers that cannot be, or checkpointing of blocks in a model that repeats none.
        """
        if setup.checkpointing == "blocks" and self.model.path is None:
            raise ConfigError('checkpointing="blocks" needs a list of blocks that are alike; this model has none')
        largest = self.largest(setup, batch_size=batch_size)
        division = divide_batch(batch_size, microbatch_size=microbatch_size or largest or 1, ranks=setup.ranks)
        place, parts = self.peak(setup, division)
        state = State(self.model, setup)
        plan = ClusterPlan(
            name=self.model.case.name,
            parameters=state.elements,
            setup=setup,
            division=division,
            parts={name: size for name, size in sorted(parts.items(), key=lambda part: -part[1]) if size},
            where=f"{place.phase} of {self.model.units[place.unit].name}",
            resident_bytes=state.resident_bytes(),
            host_bytes=state.host_bytes(),
            largest=largest,
            alternatives=(),
            warnings=tuple(_warnings(setup, division)),
            communication=communication(
                self.model,
                setup,
                microbatches=division.microbatches,
                flops=self._profile(setup).row_flops * division.microbatch_size,
                assumed=assumed or Assumed(),
            ),
        )
        return plan if plan.fits else replace(plan, alternatives=self._alternatives(setup, division))

    def peak(self, setup: Setup, division: Division) -> tuple[Place, dict[str, int]]:
        """Find the moment at which a rank holds most.

        Args:
            setup: Devices, ranks, and how the state is shared.
            division: How the batch is cut.

        Returns:
            The stretch that it is in, and bytes by category.
        """
        state = State(self.model, setup)

        def at(item: tuple[Place, tuple[int, ...]]) -> dict[str, int]:
            held = state.held(item[0], microbatches=division.microbatches)
            return held | dict(zip(HELD, item[1], strict=True))

        tops = self._held(setup, division.microbatch_size)
        most = max(tops.items(), key=lambda item: sum(at(item).values()))
        return most[0], at(most)

    def largest(self, setup: Setup, *, batch_size: int) -> int:
        """Find the largest microbatch that fits.

        Args:
            setup: Devices, ranks, and how the state is shared.
            batch_size: Effective batch in rows, over all ranks.

        Returns:
            Rows; 0 if none fits.
        """
        share = min(_MOST, divide_batch(batch_size, microbatches=1, ranks=setup.ranks).share)
        if State(self.model, setup).resident_bytes() > setup.device.usable_bytes and share > 1:
            return 0
        if not self._fits(setup, batch_size, 1):
            return 0
        if self._fits(setup, batch_size, share):
            return share
        fits, fails = 0, 1
        while fails < share and self._fits(setup, batch_size, fails):
            fits, fails = fails, min(share, 2 * fails)
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self._fits(setup, batch_size, middle) else (fits, middle)
        return fits

    def _fits(self, setup: Setup, batch_size: int, size: int) -> bool:
        division = divide_batch(batch_size, microbatch_size=size, ranks=setup.ranks)
        return sum(self.peak(setup, division)[1].values()) <= setup.device.usable_bytes

    def _held(self, setup: Setup, size: int) -> dict[Place, tuple[int, ...]]:
        """Say what is held at the fullest moment of every stretch: the state is the same all through one."""
        key = setup.checkpointing, setup.precision.dtype
        if (*key, size) not in self._tops:
            stretches = self._profile(setup).at(size)
            fullest = {place: held[held.sum(1).argmax()] for place, held in stretches.items() if len(held)}
            self._tops[*key, size] = {place: tuple(map(int, held)) for place, held in fullest.items()}
        return self._tops[*key, size]

    def _profile(self, setup: Setup) -> Profile:
        key = setup.checkpointing, setup.precision.dtype
        if key not in self._profiles:
            self._profiles[key] = Profile(self.model, checkpointing=key[0] == "blocks", dtype=key[1])
        return self._profiles[key]

    # -- what would have to change -------------------------------------------------------------------------------------

    def _alternatives(self, setup: Setup, division: Division) -> tuple[Alternative, ...]:
        """List what fits and is not worse in every way than something else that does."""
        found: list[tuple[tuple[int, ...], Setup, int]] = []
        batch_size = division.batch_size
        for other in _others(setup, blocks=self.model.path is not None):
            if other.ranks > batch_size or State(self.model, other).resident_bytes() > other.device.usable_bytes:
                continue
            cost = _cost(setup, other)
            # Largest first asks of two sizes only, which have been run for the setup itself.
            for fewer, size in enumerate(sorted({division.microbatch_size, 1}, reverse=True)):
                if self._fits(other, batch_size, size):
                    found.append(((*cost, fewer), other, size))
                    break
        best = [each for each in found if not any(_dominates(other[0], each[0]) for other in found)]
        best.sort(key=lambda each: (sum(each[0]), each[0]))
        return tuple(
            self._alternative(setup, division, other=other, fewer=cost[-1]) for cost, other, _ in best[:_LISTED]
        )

    def _alternative(self, setup: Setup, division: Division, *, other: Setup, fewer: int) -> Alternative:
        batch_size = division.batch_size
        size = self.largest(other, batch_size=batch_size) if fewer else division.microbatch_size
        cut = divide_batch(batch_size, microbatch_size=size, ranks=other.ranks)
        changes = [*_changes(setup, other), *([f"a microbatch of {size}"] if fewer else [])]
        return Alternative(
            changes=tuple(changes),
            setup=other,
            microbatch_size=cut.microbatch_size,
            peak_bytes=sum(self.peak(other, cut)[1].values()),
            host_bytes=State(self.model, other).host_bytes(),
        )


def _others(setup: Setup, *, blocks: bool) -> Iterator[Setup]:
    """Yield the setups that ask for less memory, the same one first."""
    strategies = STRATEGIES[STRATEGIES.index(setup.strategy) :]
    precisions = [setup.precision, *_smaller(setup.precision)]
    checkpointing = {setup.checkpointing: None} | ({"blocks": None} if blocks else {})
    for strategy, kept, offload, precision, reduce, times in product(
        strategies,
        checkpointing,
        OFFLOADS[OFFLOADS.index(setup.offload) :],
        precisions,
        {setup.reduce: None, "microbatch": None},
        (1, 2, 4, 8),
    ):
        ranks = setup.ranks * times
        if ranks == 1 and strategy != setup.strategy and offload in {None, "optimizer"}:
            continue  # which is the same
        try:
            yield replace(
                setup,
                ranks=ranks,
                strategy=strategy,
                checkpointing=kept,
                offload=offload,
                precision=precision,
                reduce=reduce,
            )
        except ConfigError:
            continue


def _smaller(precision: Precision) -> Sequence[Precision]:
    own = precision.bytes, precision.dtype.itemsize
    known = [PRECISIONS[name] for name in _COST_OF_PRECISION]
    return [each for each in known if each.bytes < own[0] or (each.bytes == own[0] and each.dtype.itemsize < own[1])]


def _cost(setup: Setup, other: Setup) -> tuple[int, ...]:
    """Weigh every change: a list, because one that changes less of everything is better whatever the weights."""
    return (
        3 * (other.checkpointing != setup.checkpointing),
        _COST_OF_STRATEGY[other.strategy] - _COST_OF_STRATEGY[setup.strategy],
        _COST_OF_OFFLOAD[other.offload] - _COST_OF_OFFLOAD[setup.offload],
        _COST_OF_PRECISION.get(other.precision.name, 0) if other.precision != setup.precision else 0,
        int(other.reduce != setup.reduce),
        10 * (other.ranks // setup.ranks).bit_length() - 10,
    )


def _dominates(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _changes(setup: Setup, other: Setup) -> list[str]:
    """Say what is different."""
    found = {
        f"{other.ranks} ranks": other.ranks != setup.ranks,
        f"strategy {other.strategy}": other.strategy != setup.strategy,
        f"gradients reduced after each {other.reduce}": other.reduce != setup.reduce,
        "blocks checkpointed (about a third more arithmetic)": other.checkpointing != setup.checkpointing,
        f"{other.precision.name} precision ({other.precision.words})": other.precision != setup.precision,
        f"{other.offload or 'nothing'} on the host": other.offload != setup.offload,
    }
    return [words for words, changed in found.items() if changed]


def _warnings(setup: Setup, division: Division) -> Iterator[str]:
    if setup.precision.gradients < 4 and division.microbatches > _FEW:
        yield (
            f"{division.microbatches} microbatches added up in {setup.precision.gradients} bytes lose small gradients; "
            "adding up in float32 takes 2 bytes more of each parameter that a rank holds gradients of"
        )
    if not division.even:
        yield division.describe().splitlines()[-1]


def _plain(setup: Setup) -> dict[str, Any]:
    found = asdict(setup)
    found["precision"]["dtype"] = str(setup.precision.dtype).removeprefix("torch.")
    return found
